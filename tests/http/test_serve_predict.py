"""Labels over HTTP: the numbers are those of an engine in this process, bit for bit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from cli_runs import MODEL
from serving import Server, error_of

from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.classification import Classification
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.engine import Engine
from fwdllm.engine.settings import LoRAConfig
from fwdllm.http.limits import MAX_WAITING
from fwdllm.http.schemas import MAX_INPUTS

TEXTS = ["a wonderful film", "dull and far too long", "I loved it", "😀 a\0b", "x" * 90]
LABELS = ("so so", "negative", "positive")


@pytest.fixture(scope="module")
def engine(shared: Path) -> Engine:
    """An encoder whose adapter and head do something."""
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    found = Engine.load(path, LoRAConfig(2), labels=LABELS)
    assert found.adapter is not None
    theta = found.adapter.theta
    theta += np.random.default_rng(1).normal(0, 0.05, theta.size).astype(np.float32)
    return found


@pytest.fixture(scope="module")
def server(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("encoder")
    assert engine.adapter is not None
    save_gguf(engine.adapter, folder / "mood.gguf")
    options = ("--adapter", folder / "mood.gguf")
    with Server(folder / "state", *options, model=engine.file.path) as running:
        yield running


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("decoder") / "state") as running:
        yield running


def expected(engine: Engine, *texts: str, labels: tuple[str, ...] = ()) -> list[Classification]:
    return list(engine.classify([Example(text=text) for text in texts], labels))


def answer_of(found: Classification, raw: bool = False) -> list[dict[str, Any]]:
    scores = found.scores if raw else found.probabilities
    return [{"score": s, "label": label} for s, label in zip(scores, found.labels, strict=True)]


def refused(server: Server, body: object) -> Any:
    answer = server.http.post("/predict", json=body)
    assert answer.status_code == 400
    return error_of(answer)


def test_a_text_gets_its_labels_likeliest_first(server: Server, engine: Engine) -> None:
    for text, found in zip(TEXTS, expected(engine, *TEXTS), strict=True):
        assert server.post("/predict", {"inputs": text}) == answer_of(found)
        body = {"inputs": text, "raw_scores": True, "truncate": None}
        assert server.post("/predict", body) == answer_of(found, raw=True)
    assert {found.label for found in expected(engine, *TEXTS)} > {"positive"}


def test_a_list_gets_a_list_of_answers(server: Server, engine: Engine) -> None:
    """As strings, and as text-embeddings-inference has it, each in a list."""
    answers = [answer_of(found) for found in expected(engine, *TEXTS)]
    assert server.post("/predict", {"inputs": TEXTS}) == answers
    assert server.post("/predict", {"inputs": [[text] for text in TEXTS]}) == answers
    assert server.post("/predict", {"inputs": TEXTS[:1]}) == answers[:1]
    short = [answer_of(found) for found in expected(engine, "a", "b")]
    many = server.post("/predict", {"inputs": ["a", "b"] * (MAX_INPUTS // 2)})
    assert many == short * (MAX_INPUTS // 2)


def test_a_long_text_is_refused_or_cut(server: Server, engine: Engine) -> None:
    long = "word " * 600
    error = refused(server, {"inputs": ["short", long]})
    assert (error["param"], error["code"]) == ("inputs", "context_length_exceeded")
    assert error["message"].startswith("inputs:2: the text has 602 tokens")
    assert error["message"].endswith("512; shorten it, or set truncate to true")
    [cut] = engine.classify([Example(text=long)], max_tokens=512)
    assert server.post("/predict", {"inputs": long, "truncate": True}) == answer_of(cut)


@pytest.mark.parametrize(
    ("body", "param", "said"),
    [
        ({}, "inputs", "required"),
        ({"inputs": ""}, "inputs", "there is no text"),
        ({"inputs": []}, "inputs", "there is no text"),
        ({"inputs": 5}, "inputs", "neither a text nor a list"),
        ({"inputs": ["a", 5]}, "inputs", "item 2 is no text"),
        ({"inputs": ["a", ""]}, "inputs", "item 2 is empty"),
        ({"inputs": [["a"], ["a", "b"]]}, "inputs", "item 2 is a pair"),
        ({"inputs": [["a", "b", "c"]]}, "inputs", "item 1 is no text"),
        ({"inputs": ["x"] * (MAX_INPUTS + 1)}, "inputs", "2,048 texts, not 2,049"),
        ({"inputs": "x", "truncation_direction": "left"}, "truncation_direction", "right"),
        ({"inputs": "x", "raw_scores": 7}, "raw_scores", "boolean"),
        ({"inputs": "x", "top_k": 1}, "top_k", "no such field"),
        ({"inputs": "x", "parameters": {"top_k": 0}}, "parameters.top_k", "greater"),
        ({"inputs": "x", "labels": ["a", "b"]}, None, "its own labels"),
    ],
)
def test_what_cannot_be_answered_is_refused(
    server: Server, body: object, param: str | None, said: str
) -> None:
    error = refused(server, body)
    assert error["param"] == param
    assert said in error["message"]


def test_half_of_a_surrogate_pair_is_refused(server: Server) -> None:
    headers = {"content-type": "application/json"}
    for body in (b'{"inputs": "\\ud800"}', b'{"inputs": ["a", "\\udfff"]}'):
        answer = server.http.post("/predict", content=body, headers=headers)
        assert answer.status_code == 400
        assert "surrogate" in error_of(answer)["message"]


def test_a_model_without_a_head_says_so(server: Server, engine: Engine) -> None:
    base = {"inputs": "x", "model": engine.file.path.stem}
    assert "needs an adapter with a head" in refused(server, base)["message"]
    answer = server.http.post("/predict", json={"inputs": "x", "model": "none"})
    assert (answer.status_code, error_of(answer)["code"]) == (404, "model_not_found")
    # And after it the default one answers as before.
    [found] = expected(engine, "x")
    assert server.post("/predict", {"inputs": "x"}) == answer_of(found)


def test_a_request_names_whose_labels(server: Server, engine: Engine, tmp_path: Path) -> None:
    made = server.post("/v1/adapters", {"rank": 1, "labels": ["left", "right"]})
    update = {"seeds": [1], "coefficients": [0.1], "head": [0.01 * i for i in range(2 * 385)]}
    server.post(f"/v1/adapters/{made['id']}/updates", update)
    (tmp_path / "a.gguf").write_bytes(server.content(made["id"]))
    here = Engine.load(engine.file.path, adapter=tmp_path / "a.gguf")
    body = {"inputs": TEXTS[0], "model": made["model"]}
    for _ in range(2):
        assert server.post("/predict", body) == answer_of(expected(here, TEXTS[0])[0])
        [found] = expected(engine, TEXTS[0])
        assert server.post("/predict", {"inputs": TEXTS[0]}) == answer_of(found)


def test_nothing_is_computed_for_who_has_gone(server: Server, engine: Engine) -> None:
    body = {"inputs": ["word " * 500] * MAX_INPUTS}
    with pytest.raises(httpx.ReadTimeout):
        server.http.post("/predict", json=body, timeout=1)
    began = time.monotonic()
    [found] = expected(engine, "x")
    assert server.post("/predict", {"inputs": "x"}) == answer_of(found)
    assert time.monotonic() - began < 20  # all of it would take minutes


def test_many_at_once_wait_their_turn(server: Server, engine: Engine) -> None:
    [found] = expected(engine, TEXTS[0])

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as client:
            body = {"inputs": TEXTS[0]}
            asked = [client.post("/predict", json=body) for _ in range(MAX_WAITING)]
            return await asyncio.gather(*asked)

    answers = asyncio.run(ask())
    assert [answer.json() for answer in answers] == [answer_of(found)] * MAX_WAITING


def test_hugging_faces_client_works(server: Server, engine: Engine) -> None:
    hub = pytest.importorskip("huggingface_hub")
    client, url = hub.InferenceClient(), f"{server.url}/predict"
    [found] = expected(engine, TEXTS[0])
    answer = client.text_classification(TEXTS[0], model=url)
    assert [dict(item) for item in answer] == answer_of(found)
    [best] = client.text_classification(TEXTS[0], model=url, top_k=1, function_to_apply="none")
    assert dict(best) == answer_of(found, raw=True)[0]


def test_a_decoder_chooses_from_the_labels_of_a_request(decoder: Server) -> None:
    engine = Engine.load(MODEL)
    labels = ("positive", "negative", "so so")
    body = {"inputs": TEXTS[:3], "labels": labels}
    answers = [answer_of(found) for found in expected(engine, *TEXTS[:3], labels=labels)]
    assert decoder.post("/predict", body) == answers
    made = decoder.post("/v1/adapters", {"rank": 2})
    moved = {"seeds": [1], "coefficients": [0.1]}
    decoder.post(f"/v1/adapters/{made['id']}/updates", moved)
    assert decoder.post("/predict", {**body, "model": made["model"]}) != answers
    assert decoder.post("/predict", body) == answers
    assert "no labels of its own" in refused(decoder, {"inputs": "x"})["message"]
    assert "two or more labels" in refused(decoder, {"inputs": "x", "labels": ["a"]})["message"]
    many = refused(decoder, {"inputs": ["x"] * 1000, "labels": labels})
    assert (many["param"], "2,048" in many["message"]) == ("labels", True)
