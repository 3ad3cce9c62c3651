"""Several adapters in one server: named, mixed, loaded and unloaded while it runs."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import MODEL
from serving import NAME, Server, error_of

from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.adapters.io import save_gguf, save_peft
from fwdllm.engine.errors import AdapterError, ConfigError
from fwdllm.engine.llamacpp import generation
from fwdllm.http.application import ServerConfig, application
from fwdllm.http.serve import named

PROMPT = "A cow is an animal"
# llama.cpp's threads wait for one another actively, which a busy machine makes long.
ONE_THREAD = {"FWDLLM_NUM_THREADS": "1"}
GREEDY: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters: one, two, half of one, and three as PEFT folder; and what none may read."""
    folder = tmp_path_factory.mktemp("adapters") / "allowed"
    (folder / "deep").mkdir(parents=True)
    for seed, name in enumerate(("one", "two", "three")):
        save(folder / f"{name}.gguf", seed)
    save(folder / "half.gguf", 0, alpha=4.0)
    engine = Engine.load(MODEL, adapter=folder / "three.gguf")
    assert engine.adapter is not None
    args = engine.args
    save_peft(engine.adapter, folder / "deep/three", args.n_heads, args.n_kv_heads, "a/model")
    shutil.copy(folder / "one.gguf", folder.parent / "outside.gguf")
    (folder / "link.gguf").symlink_to(folder.parent / "outside.gguf")
    (folder / "inside.gguf").symlink_to("two.gguf")
    (folder / "loop.gguf").symlink_to("loop.gguf")
    shutil.copytree(folder / "deep/three", folder / "leak")
    (folder / "leak/adapter_config.json").unlink()
    (folder / "leak/adapter_config.json").symlink_to(folder.parent / "secret.json")
    (folder.parent / "secret.json").write_text("{}")
    shutil.copy(MODEL, folder / "model.gguf")
    return folder


def save(path: Path, seed: int, alpha: float = 8.0) -> None:
    engine = Engine.load(MODEL, LoRAConfig(4, alpha, ("attn_q", "attn_v", "ffn_down")))
    assert engine.adapter is not None
    theta = engine.adapter.theta
    theta[:] = np.random.default_rng(seed).normal(0, 0.1, theta.size)
    save_gguf(engine.adapter, path)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of two adapters, the first named."""
    state = tmp_path_factory.mktemp("adapters") / "state"
    given = ("--adapter", f"first={folder / 'one.gguf'}", "--adapter", folder / "two.gguf")
    with Server(state, *given, "--adapter-folder", folder, environment=ONE_THREAD) as running:
        yield running


FIRST, SECOND = "first", f"{NAME}:two"


def ask(server: Server, **fields: Any) -> str:
    return str(server.post("/v1/completions", {**GREEDY, **fields})["choices"][0]["text"])


@cache
def alone(adapter: Path | None = None) -> str:
    return "".join(generation.generate(MODEL, PROMPT, adapter, 12, n_threads=1))


def embedding(server: Server, **fields: Any) -> np.ndarray:
    found = server.post("/v1/embeddings", {"input": PROMPT, **fields})
    return np.array(found["data"][0]["embedding"])


def test_all_are_listed_and_the_first_is_the_default(server: Server) -> None:
    assert {model["id"] for model in server.get("/v1/models")["data"]} == {NAME, FIRST, SECOND}
    listed = server.get("/lora-adapters")
    assert [(a["id"], a["model"], a["scale"]) for a in listed[:2]] == [
        (0, FIRST, 1.0),
        (1, SECOND, 0.0),
    ]
    assert server.http.get(listed[0]["path"]).content[:4] == b"GGUF"
    assert server.post("/v1/completions", GREEDY)["model"] == FIRST


def test_a_request_chooses_by_name_or_by_number(server: Server, folder: Path) -> None:
    want = [alone(), alone(folder / "one.gguf"), alone(folder / "two.gguf")]
    assert len(set(want)) == 3
    names = [{"model": NAME}, {"model": FIRST}, {"model": SECOND}]
    numbers: list[Any] = [[], [{"id": 0, "scale": 1.0}], [{"id": 1, "scale": 1}]]
    for _ in range(2):  # in turn, so that every request switches
        assert [ask(server, **fields) for fields in names] == want
        assert [ask(server, lora=lora) for lora in numbers] == want
    assert ask(server) == want[1]
    chat = {"messages": [{"role": "user", "content": "Hi."}], "max_tokens": 8, "temperature": 0}
    texts = [
        server.post("/v1/chat/completions", {**chat, **fields})["choices"][0]["message"]["content"]
        for fields in ({"model": SECOND}, {"lora": numbers[2]}, {"model": NAME})
    ]
    assert texts[0] == texts[1] != texts[2]


def test_scales_count_and_adapters_add_up(server: Server, folder: Path) -> None:
    half = embedding(server, lora=[{"id": 0, "scale": 0.5}])
    want = generation.embed(MODEL, [PROMPT], folder / "half.gguf")[0]
    np.testing.assert_allclose(half, want, atol=3e-3)  # keys and values in half precision
    assert np.abs(half - embedding(server, model=FIRST)).max() > 0.02
    both = embedding(server, lora=[{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.0}])
    np.testing.assert_allclose(both, half, atol=1e-6)
    both = embedding(server, lora=[{"id": 0, "scale": 0.5}, {"id": 1, "scale": 0.5}])
    assert np.abs(both - half).max() > 0.02


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"model": "third"}, 404, "The model 'third' does not exist"),
        ({"model": "third", "lora": []}, 404, "The model 'third' does not exist"),
        ({"lora": [{"id": 99, "scale": 1}]}, 400, "there is no adapter 99"),
        ({"lora": [{"id": 0, "scale": 1}] * 2}, 400, "adapter 0 is there twice"),
        ({"lora": [{"id": 0}]}, 400, "lora.0.scale"),
        ({"lora": [{"id": -1, "scale": 1}]}, 400, "lora.0.id"),
        ({"lora": [{"id": 0, "scale": 1e9}]}, 400, "lora.0.scale"),
        ({"lora": [{"id": 0, "scale": 1, "name": "x"}]}, 400, "lora.0.name"),
        ({"lora": {"id": 0, "scale": 1}}, 400, "lora"),
        ({"model": SECOND, "lora": []}, 400, f"{SECOND} has an adapter already"),
    ],
)
def test_wrong_names_and_numbers_are_refused(
    server: Server, fields: Any, status: int, said: str
) -> None:
    for path, body in (("/v1/completions", GREEDY), ("/v1/embeddings", {"input": "x"})):
        answer = server.http.post(path, json={**body, **fields})
        assert (answer.status_code, said in error_of(answer)["message"]) == (status, True)


def test_the_largest_scales_do_not_end_the_server(server: Server) -> None:
    for scale in (100, -100):
        lora = [{"id": 0, "scale": scale}, {"id": 1, "scale": scale}]
        server.http.post("/v1/completions", json={**GREEDY, "lora": lora, "temperature": 1})
    assert ask(server, model=NAME) == alone()


def test_scales_of_requests_that_name_nothing_can_be_set(server: Server, folder: Path) -> None:
    set_to: list[Any] = [{"id": 1, "scale": 1.0}]
    assert server.post("/lora-adapters", set_to) == {"success": True}
    try:
        assert [a["scale"] for a in server.get("/lora-adapters")[:2]] == [0.0, 1.0]
        assert ask(server) == alone(folder / "two.gguf")
        assert ask(server, model=FIRST) == alone(folder / "one.gguf")
        error_of(server.http.delete(f"/v1/models/{SECOND}"))
        server.post("/lora-adapters", [])
        assert (ask(server), server.post("/v1/completions", GREEDY)["model"]) == (alone(), NAME)
        error_of(server.http.post("/lora-adapters", json=[{"id": 99, "scale": 1}]))
    finally:
        server.post("/lora-adapters", [{"id": 0, "scale": 1.0}])


@pytest.mark.parametrize("path", ["three.gguf", "deep/three", "./deep/../three.gguf"])
def test_an_adapter_is_loaded_used_and_unloaded(server: Server, folder: Path, path: str) -> None:
    made = server.post("/v1/load_lora_adapter", {"lora_name": "third", "lora_path": path})
    assert made["model"] == "third"
    assert server.content(made["id"]) == (folder / "three.gguf").read_bytes()
    [number] = [a["id"] for a in server.get("/lora-adapters") if a["model"] == "third"]
    want = alone(folder / "three.gguf")
    assert [ask(server, model="third"), ask(server, lora=[{"id": number, "scale": 1}])] == [
        want
    ] * 2
    body = {"lora_name": "third", "lora_path": "one.gguf"}
    said = error_of(server.http.post("/v1/load_lora_adapter", json=body))["message"]
    assert said == "there is a model 'third' already: unload it first"
    server.post("/v1/unload_lora_adapter", {"lora_name": "third"})
    for fields in ({"model": "third"}, {"lora": [{"id": number, "scale": 1}]}):
        error_of(server.http.post("/v1/completions", json={**GREEDY, **fields}))


def test_an_absolute_path_in_the_folder_and_a_link_that_stays_there_are_fine(
    server: Server, folder: Path
) -> None:
    for path in (str(folder / "two.gguf"), "inside.gguf"):
        server.post("/v1/load_lora_adapter", {"lora_name": "again", "lora_path": path})
        server.post("/v1/unload_lora_adapter", {"lora_name": "again"})


@pytest.mark.parametrize(
    ("name", "path", "status", "said"),
    [
        ("x", "../outside.gguf", 403, "only from the folder"),
        ("x", "../none.gguf", 403, "only from the folder"),
        ("x", "/etc/passwd", 403, "only from the folder"),
        ("x", "/proc/self/environ", 403, "only from the folder"),
        ("x", "link.gguf", 403, "only from the folder"),
        ("x", "leak", 403, "only from the folder"),
        ("x", "leak/adapter_model.safetensors", 403, "only from the folder"),
        ("x", ".", 403, "only from the folder"),
        ("x", "loop.gguf", 400, "is not a path"),
        ("x", "a\0b", 400, "is not a path"),
        ("x", "none.gguf", 404, "there is no 'none.gguf'"),
        ("x", "deep", 400, "adapter_config.json does not exist"),
        ("x", "model.gguf", 400, "model.gguf is not an adapter"),
        (NAME, "three.gguf", 400, "cannot be named"),
        ("ft:x", "three.gguf", 400, "cannot be named"),
        ("a/b", "three.gguf", 400, "cannot be named"),
        (FIRST, "three.gguf", 400, "unload it first"),
    ],
)
def test_what_cannot_be_loaded_is_refused(
    server: Server, folder: Path, name: str, path: str, status: int, said: str
) -> None:
    body = {"lora_name": name, "lora_path": path}
    answer = server.http.post("/v1/load_lora_adapter", json=body)
    message = error_of(answer)["message"]
    assert (answer.status_code, said in message) == (status, True), message
    assert str(folder) not in message
    assert len(server.get("/v1/models")["data"]) == 3


def test_only_what_was_loaded_can_be_unloaded(server: Server) -> None:
    def unload(name: str) -> tuple[int, str]:
        answer = server.http.post("/v1/unload_lora_adapter", json={"lora_name": name})
        return answer.status_code, error_of(answer)["message"]

    assert unload("none") == (404, "The adapter 'none' does not exist")
    assert unload(FIRST)[0] == 403
    made = server.post("/v1/adapters", {"rank": 1, "suffix": "mine"})
    assert "there is no file to load it from again" in unload(made["model"])[1]
    assert server.http.delete(f"/v1/models/{made['model']}").status_code == 200


def test_a_stream_is_not_disturbed_by_switches(server: Server, folder: Path) -> None:
    body = {**GREEDY, "max_tokens": 60, "model": SECOND}
    want = str(server.post("/v1/completions", body)["choices"][0]["text"])
    others: list[str] = []
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = (line for line in answer.iter_lines() if line.startswith("data: {"))
        texts = [json.loads(next(lines)[6:])["choices"][0]["text"]]
        names = (FIRST, NAME, FIRST)
        threads = [
            threading.Thread(target=lambda n=name: others.append(ask(server, model=n)))  # type: ignore[misc]
            for name in names
        ]
        for thread in threads:
            thread.start()
        server.post("/lora-adapters", [{"id": 1, "scale": 0.3}])
        server.post("/lora-adapters", [{"id": 0, "scale": 1.0}])
        server.post("/v1/load_lora_adapter", {"lora_name": "third", "lora_path": "three.gguf"})
        server.post("/v1/unload_lora_adapter", {"lora_name": "third"})
        server.post("/v1/unload_lora_adapter", {"lora_name": SECOND})
        texts += [json.loads(line[6:])["choices"][0]["text"] for line in lines]
        for thread in threads:
            thread.join()
    path = str(folder / "two.gguf")
    assert "".join(texts) == want
    assert sorted(others) == sorted([alone(), *[alone(folder / "one.gguf")] * 2])
    server.post("/v1/load_lora_adapter", {"lora_name": SECOND, "lora_path": path})


def test_a_loaded_adapter_outlives_a_restart_and_without_a_folder_none_is_loaded(
    folder: Path, tmp_path: Path
) -> None:
    body = {"lora_name": "kept", "lora_path": "two.gguf"}
    state = tmp_path / "state"
    with Server(state, "--adapter-folder", folder, environment=ONE_THREAD) as server:
        assert (server.get("/lora-adapters"), ask(server)) == ([], alone())
        server.post("/v1/load_lora_adapter", body)
    with Server(state, environment=ONE_THREAD) as server:
        assert ask(server, model="kept") == alone(folder / "two.gguf")
        assert server.get("/lora-adapters")[0]["model"] == "kept"
        answer = server.http.post("/v1/load_lora_adapter", json={**body, "lora_name": "x"})
        assert answer.status_code == 403
        assert "without --adapter-folder" in error_of(answer)["message"]


@pytest.mark.parametrize(
    ("adapters", "error", "said"),
    [
        (("one.gguf", "deep/one.gguf"), ConfigError, "would both be"),
        (("a=one.gguf", "a=two.gguf"), ConfigError, "would both be a"),
        ((f"{NAME}=one.gguf",), ConfigError, "cannot be named"),
        (("ft:a=one.gguf",), ConfigError, "cannot be named"),
        (("a=none.gguf",), AdapterError, "none.gguf does not exist"),
        (("model.gguf",), AdapterError, "model.gguf is not an adapter"),
    ],
)
def test_adapters_that_cannot_be_served_are_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    adapters: tuple[str, ...],
    error: type[Exception],
    said: str,
) -> None:
    monkeypatch.chdir(folder)
    config = ServerConfig(MODEL, tmp_path / "state", 2**30, tuple(map(named, adapters)))
    with pytest.raises(error, match=said), application(config):
        pass


def test_a_path_may_have_an_equals_sign(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "lr=0.01.gguf"
    shutil.copy(folder / "one.gguf", path)
    assert named(str(path)) == (None, path)
    assert named(f"a={path}") == ("a", path)
