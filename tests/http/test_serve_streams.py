"""Answers of the models: streams that are closed, what OpenAI's clients send, and the end."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cli_runs import MODEL, TRAIN
from serving import Server, error_of

from fwdllm import TrainConfig, tune
from fwdllm.engine.data.tokenizer import Tokenizer

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "What does a cow say?"}]
LONG: dict[str, Any] = {"messages": HELLO, "max_tokens": 400, "temperature": 2.0, "stream": True}
NO_END = {str(Tokenizer.open(MODEL).eos): -100}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("streams") / "state") as running:
        yield running


def events(server: Server, **fields: Any) -> list[Any]:
    """The chunks of a stream, which must end as it should."""
    with server.http.stream("POST", CHAT, json={"messages": HELLO, "stream": True, **fields}) as r:
        data = [line.removeprefix("data: ") for line in r.iter_lines() if line.startswith("data")]
    assert data[-1] == "[DONE]"
    return [json.loads(text) for text in data[:-1]]


def metric(server: Server, name: str) -> float:
    text = server.http.get("/metrics").text
    [line] = [row for row in text.splitlines() if row.startswith(f"{name} ")]
    return float(line.split()[1])


def await_idle(server: Server) -> None:
    deadline = time.monotonic() + 30
    while metric(server, "fwdllm_waiting_requests"):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_closed_streams_leave_the_model_to_others(server: Server) -> None:
    """A coroutine that is cancelled must not let the next one into a context that is in use."""
    for _ in range(40):
        with server.http.stream("POST", CHAT, json=LONG) as answer:
            next(answer.iter_lines())
        assert server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 1}).status_code == 200
    await_idle(server)


def test_closed_streams_end_soon(server: Server) -> None:
    before = metric(server, "fwdllm_generated_tokens_total")
    with server.http.stream("POST", CHAT, json={**LONG, "logit_bias": NO_END}) as answer:
        next(answer.iter_lines())
    await_idle(server)
    assert metric(server, "fwdllm_generated_tokens_total") - before < LONG["max_tokens"]


def test_many_at_once_get_the_answers_they_would_get_alone(server: Server) -> None:
    body = {"messages": HELLO, "max_tokens": 12, "temperature": 0}
    alone = server.post(CHAT, body)["choices"][0]["message"]["content"]
    found: list[str] = []

    def ask(stream: bool) -> None:
        if stream:
            chunks = events(server, max_tokens=12, temperature=0)
            found.append("".join(c["choices"][0]["delta"].get("content", "") for c in chunks))
        else:
            found.append(server.post(CHAT, body)["choices"][0]["message"]["content"])

    threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 12


def test_too_many_at_once_are_sent_away(server: Server) -> None:
    statuses: list[int] = []

    def ask() -> None:
        body = {"messages": HELLO, "max_tokens": 40, "temperature": 2.0}
        answer = server.http.post(CHAT, json=body)
        statuses.append(answer.status_code)
        if answer.status_code != 200:
            assert error_of(answer)["type"] == "rate_limit_error"
            assert answer.headers["Retry-After"] == "1"

    threads = [threading.Thread(target=ask) for _ in range(90)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 429}
    await_idle(server)


def test_a_conversation_has_the_tokens_that_tuning_has(server: Server) -> None:
    ids = Tokenizer.open(MODEL).encode_chat(HELLO)
    usage = server.post(CHAT, {"messages": HELLO, "max_tokens": 2})["usage"]
    assert usage == {
        "prompt_tokens": len(ids),
        "completion_tokens": 2,
        "total_tokens": len(ids) + 2,
    }


def test_a_stream_can_end_with_its_usage(server: Server) -> None:
    *chunks, last = events(server, max_tokens=3, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": None, "top_p": None, "stream": None, "seed": None, "stop": None},
        {"presence_penalty": None, "frequency_penalty": None, "n": None, "user": None},
        {"messages": [{"role": "developer", "content": "Be kind."}, *HELLO]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]},
        {
            "messages": [
                *HELLO,
                {"role": "assistant", "content": None, "tool_calls": None, "refusal": None},
                *HELLO,
            ]
        },
        {"response_format": {"type": "text"}},
        {"response_format": {"type": "json_object"}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "object", "properties": {}}},
            }
        },
        {"grammar": 'root ::= "moo"'},
        {"logit_bias": {"5": -100}},
        {"min_tokens": 3},
        {"seed": 7, "stop": ["cow"], "top_k": 5, "mirostat_mode": 2},
    ],
)
def test_what_clients_send_is_understood(server: Server, fields: Any) -> None:
    answer = server.http.post(CHAT, json={"messages": HELLO, "max_tokens": 6, **fields})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("stop", ["", [], [""], ["", "~never~"]])
def test_an_empty_stop_stops_nothing(server: Server, stop: Any) -> None:
    body = {"messages": HELLO, "max_tokens": 6, "temperature": 0}
    want, found = (server.post(CHAT, {**body, **more}) for more in ({}, {"stop": stop}))
    assert want["choices"] == found["choices"]
    assert found["choices"][0]["message"]["content"]


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_minus_one_is_no_limit_but_the_context(server: Server, field: str) -> None:
    body = {"messages": HELLO, "temperature": 0, "grammar": 'root ::= "moo " [a-z ]{120}'}
    answer = server.post(CHAT, {**body, field: -1})
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] > 16
    assert server.http.post(CHAT, json={**body, field: -2}).status_code == 400


def test_a_completion_may_have_no_limit(server: Server) -> None:
    body = {"prompt": "The", "temperature": 0, "grammar": 'root ::= "moo " [a-z ]{120}'}
    answer = server.post("/v1/completions", {**body, "max_tokens": -1})
    assert answer["usage"]["completion_tokens"] > 16


def test_a_grammar_is_kept_to(server: Server) -> None:
    body = {"messages": HELLO, "grammar": 'root ::= "moo"', "max_tokens": 8}
    assert server.post(CHAT, body)["choices"][0]["message"]["content"] == "moo"


@pytest.mark.parametrize(
    "grammar", ["nonsense", "root ::= root", "\0", "", "(" * 5000, "x" * 99999]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_is_none_is_refused(server: Server, grammar: str, stream: bool) -> None:
    body = {"messages": HELLO, "grammar": grammar, "stream": stream}
    error_of(server.http.post(CHAT, json=body))


@pytest.mark.parametrize("token", ["-1", "1000000", "x"])
def test_a_bias_for_no_token_is_refused(server: Server, token: str) -> None:
    error_of(server.http.post(CHAT, json={"messages": HELLO, "logit_bias": {token: 1}}))


def test_the_adapter_that_is_served_answers_and_stays(tmp_path: Path) -> None:
    adapter = tmp_path / "parrot.gguf"
    tune(MODEL, TRAIN, adapter, train=TrainConfig(steps=2, batch_size=2), held_out=2)
    name = f"{MODEL.stem}:parrot"
    with Server(tmp_path / "state", "--adapter", adapter) as server:
        body = {"messages": HELLO, "max_tokens": 8, "temperature": 0}
        assert server.post(CHAT, body)["model"] == name
        assert [m["id"] for m in server.get("/v1/models")["data"]] == [MODEL.stem, name]
        error_of(server.http.delete(f"/v1/models/{name}"))
        [kept] = server.get("/v1/adapters")["data"]
        error_of(server.http.delete(f"/v1/adapters/{kept['id']}"))
        assert server.content(kept["id"]) == adapter.read_bytes()


def test_a_folder_belongs_to_one_model(tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    shutil.copy(MODEL, other)
    with Server(tmp_path / "state"):
        pass
    refused = pytest.raises(RuntimeError, match=f"belongs to the model {MODEL.stem}")
    with refused, Server(tmp_path / "state", model=other):
        pass


def test_a_stop_breaks_answers_off(tmp_path: Path) -> None:
    with Server(tmp_path / "state") as server:
        with server.http.stream("POST", CHAT, json=LONG) as answer:
            next(answer.iter_lines())
            server.process.terminate()
            assert server.process.wait(15) == 0
        assert "Traceback" not in server.output


def test_what_a_job_needs_no_more_is_deleted(server: Server) -> None:
    id = server.create_job({"steps": 2, "batch_size": 2})
    server.await_status(id, "succeeded")
    [folder] = (server.state / "jobs").iterdir()
    deadline = time.monotonic() + 30
    while (left := sorted(path.name for path in folder.iterdir())) != ["run"]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
    assert not (folder / "run" / "checkpoints").exists()
    assert (folder / "run" / "metrics.jsonl").is_file()
    assert server.http.delete(f"/v1/fine_tuning/jobs/{id}").status_code == 200


def test_models_do_not_share_keys_and_values(tmp_path: Path) -> None:
    """What one model has read must not be taken for what another would have."""
    adapter = tmp_path / "parrot.gguf"
    config = TrainConfig(steps=8, batch_size=2, learning_rate=0.05)
    tune(MODEL, TRAIN, adapter, train=config, held_out=2)
    with Server(tmp_path / "state", "--adapter", adapter) as server:

        def ask(model: str) -> str:
            body = {"model": model, "prompt": "A cow is an animal", "max_tokens": 16}
            found = server.post("/v1/completions", {**body, "temperature": 0})
            return str(found["choices"][0]["text"])

        base, tuned = MODEL.stem, f"{MODEL.stem}:parrot"
        one_way = [ask(base), ask(tuned)]
        assert server.stop() == 0
        server.start()
        assert [ask(tuned), ask(base)] == one_way[::-1]
        assert one_way[0] != one_way[1]


def test_a_job_that_has_ended_can_be_forgotten(server: Server) -> None:
    before = set(server.state.glob("jobs/*"))
    id = server.create_job({"steps": 2, "batch_size": 2})
    error_of(server.http.delete(f"/v1/fine_tuning/jobs/{id}"))
    model = server.await_status(id, "succeeded")["fine_tuned_model"]
    assert server.http.delete(f"/v1/fine_tuning/jobs/{id}").status_code == 200
    assert server.http.get(f"/v1/fine_tuning/jobs/{id}").status_code == 404
    assert set(server.state.glob("jobs/*")) == before
    assert server.post(CHAT, {"model": model, "messages": HELLO, "max_tokens": 1})
