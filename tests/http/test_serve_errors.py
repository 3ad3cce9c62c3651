"""What the server refuses: always an error of the request, in OpenAI's shape, that says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from serving import (
    FINISHED,
    LONG,
    NAME,
    PURPOSE,
    SETTINGS,
    TRAIN_ROWS,
    Server,
    error_of,
    lines,
    succeeded,
)

from fwdllm.http import limits

JOBS = "/v1/fine_tuning/jobs"
CHAT = "/v1/chat/completions"
EVALUATE = "/v1/perturbations/evaluate"
HELLO = [{"role": "user", "content": "Hello"}]
INPUT: dict[str, Any] = {CHAT: {"messages": HELLO}, "/v1/completions": {"prompt": "x"}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("errors") / "state") as running:
        yield running


@pytest.fixture
def server(running: Server) -> Iterator[Server]:
    """The same one for all, and no request ends it."""
    yield running
    if running.process.poll() is not None:
        running.start()  # so that the other tests tell of themselves
        pytest.fail("the server is dead")


@pytest.fixture(scope="module")
def adapter(running: Server) -> str:
    return str(running.post("/v1/adapters", {"rank": 1})["id"])


@pytest.fixture(scope="module")
def file(running: Server) -> str:
    return running.upload(TRAIN_ROWS)


def refused(answer: httpx.Response, status: int) -> Any:
    error = error_of(answer)
    assert answer.status_code == status, answer.text
    return error


def raw(server: Server, path: str, body: str | bytes) -> httpx.Response:
    headers = {"content-type": "application/json"}
    return server.http.post(path, content=body, headers=headers)


# Files


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{not json}\n", "data.jsonl:1"),
        (b'{"text": "good"}\n{"text": \n', "data.jsonl:2"),
        (b'{"question": "?", "answer": "!"}\n', "none of the fields"),
        (b'{"prompt": "p"}\n', "completion"),
        (b'{"text": 5}\n', "text"),
        (b'{"text": ""}\n', "empty"),
        (b'{"messages": []}\n', "assistant"),
        (b'{"messages": [{"role": "pirate", "content": "x"}]}\n', "role"),
        (b'{"messages": [{"role": "user", "content": "x"}]}\n', "assistant"),
        (b"[1, 2]\n", "object"),
        (b"", "no examples"),
        (b"\n \n", "no examples"),
        (lines({"text": "a"}, {"text": "b", "label": "c"}), "data.jsonl:2"),
        (bytes(range(256)) * 8, "data.jsonl:1"),
        (b"\xff\xfe\x00\x01", "UTF-8"),
        (b'{"text": ' + b"[" * 100_000 + b"\n", "data.jsonl:1"),
        (b'{"text": "x", "label": ' + b"9" * 5000 + b"}\n", "data.jsonl:1"),
    ],
)
def test_a_file_that_holds_no_examples_is_refused(
    server: Server, content: bytes, said: str
) -> None:
    files = {"file": ("data.jsonl", content)}
    error = refused(server.http.post("/v1/files", files=files, data=PURPOSE), 400)
    assert said in error["message"]
    assert server.get("/v1/files", params={"purpose": "none"})["data"] == []


def test_a_file_for_another_purpose_is_refused(server: Server) -> None:
    files = {"file": ("data.jsonl", TRAIN_ROWS)}
    answer = server.http.post("/v1/files", files=files, data={"purpose": "assistants"})
    assert refused(answer, 400)["param"] == "purpose"
    error = refused(server.http.post("/v1/files", files=files), 400)
    assert error["param"] == "purpose"
    assert refused(server.http.post("/v1/files", data=PURPOSE), 400)["param"] == "file"


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_that_is_too_large_is_refused(server: Server, chunked: bool) -> None:
    before = server.get("/v1/files")["data"]
    row = lines({"text": "word " * 20_000})
    content = row * (limits.MAX_UPLOAD_BYTES // len(row) + 2)
    request = server.http.build_request(
        "POST", "/v1/files", files={"file": ("big.jsonl", content)}, data=PURPOSE
    )
    if chunked:
        request = as_chunks(server, request)
    error = refused(server.http.send(request), 413)
    assert "bytes" in error["message"] or "large" in error["message"]
    assert server.get("/v1/files")["data"] == before


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", EVALUATE, JOBS, "/v1/no/such/path"])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(server: Server, path: str, chunked: bool) -> None:
    """Even without a Content-Length that says so."""
    body = {"model": NAME, "prompt": "x" * (limits.MAX_BODY_BYTES + 1)}
    request = server.http.build_request("POST", path, json=body)
    if chunked:
        request = as_chunks(server, request)
    # Of a path that does not exist nothing is read.
    allowed = (413, 404) if chunked and "such" in path else (413,)
    answer = server.http.send(request)
    error_of(answer)
    assert answer.status_code in allowed


def as_chunks(server: Server, request: httpx.Request) -> httpx.Request:
    """The same without a length."""
    content = request.read()
    kind = {"content-type": request.headers["content-type"]}
    parts = (content[i : i + 2**20] for i in range(0, len(content), 2**20))
    return server.http.build_request(request.method, request.url, content=parts, headers=kind)


def test_a_file_that_a_job_needs_stays(server: Server) -> None:
    first = server.create_job(LONG)
    file = server.upload(TRAIN_ROWS)
    second = server.create_job(LONG, training_file=file)
    error = refused(server.http.delete(f"/v1/files/{file}"), 409)
    assert "job" in error["message"]
    for id in (second, first):
        server.post(f"{JOBS}/{id}/cancel")
    succeeded(server.http.delete(f"/v1/files/{file}"))
    refused(server.http.delete(f"/v1/files/{file}"), 404)


# What does not exist


@pytest.mark.parametrize("id", ["nope", "file-0", "../files", "'; DROP TABLE file; --", "x" * 5000])
@pytest.mark.parametrize(
    ("method", "path", "code"),
    [
        ("GET", "/v1/models/{}", "model_not_found"),
        ("DELETE", "/v1/models/{}", "model_not_found"),
        ("GET", "/v1/files/{}", "file_not_found"),
        ("DELETE", "/v1/files/{}", "file_not_found"),
        ("GET", "/v1/files/{}/content", "file_not_found"),
        ("GET", JOBS + "/{}", "job_not_found"),
        ("GET", JOBS + "/{}/events", "job_not_found"),
        ("GET", JOBS + "/{}/checkpoints", "job_not_found"),
        ("POST", JOBS + "/{}/cancel", "job_not_found"),
        ("POST", JOBS + "/{}/pause", "job_not_found"),
        ("POST", JOBS + "/{}/resume", "job_not_found"),
        ("GET", "/v1/adapters/{}", "adapter_not_found"),
        ("DELETE", "/v1/adapters/{}", "adapter_not_found"),
        ("GET", "/v1/adapters/{}/content", "adapter_not_found"),
    ],
)
def test_what_is_unknown_is_not_found(
    server: Server, method: str, path: str, code: str, id: str
) -> None:
    name = str(httpx.QueryParams({"x": id}))[2:].replace("+", "%20")
    error = refused(server.http.request(method, path.format(name)), 404)
    assert error["code"] == code or "%2F" in name


@pytest.mark.parametrize("name", ["nope", "", NAME.upper(), "gpt-4o", "\ud800", "a\0b", "x" * 9999])
def test_an_unknown_model_is_not_found(server: Server, name: str) -> None:
    for path, rest in (
        (CHAT, {"messages": HELLO}),
        (CHAT, {"messages": HELLO, "stream": True}),
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/embeddings", {"input": "x"}),
    ):
        # json, as httpx would not send what cannot be written as UTF-8
        answer = raw(server, path, json.dumps({"model": name, **rest}))
        error_of(answer)
        assert answer.status_code == 404 or name == "\ud800"


def test_events_after_one_that_cannot_be_are_refused(server: Server, file: str) -> None:
    id = server.create_job({**SETTINGS, "steps": 1, "warmup": 0}, training_file=file)
    for after in ("nope", "ftevent-", "ftevent--1", "ftevent-1e3", "ftevent-" + "9" * 40):
        answer = server.http.get(f"{JOBS}/{id}/events", params={"after": after})
        assert refused(answer, 400)["param"] == "after"
    for limit in ("0", "-1", "x", "1e9", "99999999999999999999999"):
        for path in (f"{JOBS}/{id}/events", JOBS, "/v1/files", f"{JOBS}/{id}/checkpoints"):
            answer = server.http.get(path, params={"limit": limit})
            assert refused(answer, 400)["param"] == "limit"
    server.await_status(id, "succeeded")


def test_unknown_paths_and_methods_are_refused(server: Server) -> None:
    for path in ("/v1", "/v2/models", "/v1/models/a/b/c", "/docs", "/redoc", "/assets/nope.js"):
        refused(server.http.get(path), 404)
    for path in (
        "/assets/../index.html",
        "/assets/%2e%2e/%2e%2e/cli.py",
        "/assets/..%2f..%2fcli.py",
    ):
        assert server.http.get(path).status_code == 404
    refused(server.http.put("/v1/models"), 405)
    refused(server.http.get("/v1/completions"), 405)
    refused(server.http.request("OPTIONS", CHAT), 405)


# Generation


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_prompt_longer_than_the_context_is_refused(
    server: Server, path: str, stream: bool
) -> None:
    """With a status of its own, also where the answer would be a stream."""
    text = "hello " * 800
    body = {"messages": [{"role": "user", "content": text}]} if path == CHAT else {"prompt": text}
    error = refused(server.http.post(path, json={**body, "stream": stream}), 400)
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]


def test_a_text_longer_than_the_context_is_not_embedded(server: Server) -> None:
    error = refused(server.http.post("/v1/embeddings", json={"input": ["x", "hello " * 800]}), 400)
    assert "512" in error["message"]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"messages": []}, "messages"),
        ({}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({"messages": [{"role": "pirate", "content": "x"}]}, "messages"),
        ({"messages": HELLO, "n": 2}, "n"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "temperature": -1}, "temperature"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": HELLO, "top_p": 2}, "top_p"),
        ({"messages": HELLO, "max_tokens": -5}, "max_tokens"),
        ({"messages": HELLO, "max_completion_tokens": 0}, "max_completion_tokens"),
        ({"messages": HELLO, "stream": "maybe"}, "stream"),
    ],
)
def test_a_bad_chat_is_refused_with_its_field(server: Server, body: Any, field: str) -> None:
    error = refused(server.http.post(CHAT, json={"model": NAME, **body}), 400)
    assert error["param"].split(".")[0] == field
    assert field in error["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x", "n": 2}),
        ("/v1/completions", {"prompt": "x", "best_of": 3}),
        ("/v1/completions", {"prompt": ["a", "b"]}),
        ("/v1/completions", {"prompt": []}),
        ("/v1/completions", {"prompt": "x", "logit_bias": {"not a token": 1}}),
        ("/v1/completions", {"prompt": "x", "logprobs": 1}),
        ("/v1/completions", {"prompt": "\ud800"}),
        ("/v1/embeddings", {"input": ""}),
        ("/v1/embeddings", {"input": []}),
        ("/v1/embeddings", {"input": ["a", ""]}),
        ("/v1/embeddings", {"input": ["a"] * 2049}),
        ("/v1/embeddings", {"input": "x", "encoding_format": "hex"}),
        ("/v1/embeddings", {"input": "\ud800"}),
        ("/v1/embeddings", {}),
    ],
)
def test_what_cannot_be_answered_is_refused(server: Server, path: str, body: Any) -> None:
    refused(raw(server, path, json.dumps(body)), 400)


@pytest.mark.parametrize("field", ["presence_penalty", "frequency_penalty", "seed", "stop", "user"])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_null_is_a_default(server: Server, path: str, field: str) -> None:
    """OpenAI's API has these as optional, and clients send null."""
    body = {**INPUT[path], "max_tokens": 1, field: None}
    server.post(path, body)


@pytest.mark.parametrize("grammar", ["nonsense", "root ::= ", "root ::= root", "\0", ""])
@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_a_bad_grammar_does_not_end_the_server(server: Server, path: str, grammar: str) -> None:
    body = {**INPUT[path], "max_tokens": 2, "grammar": grammar}
    answer = server.http.post(path, json=body)
    assert answer.status_code < 500, answer.text


# JSON


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/v1/embeddings", JOBS, EVALUATE])
@pytest.mark.parametrize(
    "body", ["{", "", "[]", "null", "{'a': 1}", '{"a": 1}{', "\0", "[" * 100_000, b"\xff\xfe"]
)
def test_a_body_that_is_not_a_json_object_is_refused(
    server: Server, path: str, body: str | bytes
) -> None:
    error = refused(raw(server, path, body), 400)
    assert error["param"] is None or not error["param"].isdigit()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize(
    ("path", "field"),
    [
        (CHAT, "temperature"),
        (CHAT, "top_p"),
        (CHAT, "presence_penalty"),
        (JOBS, "learning_rate"),
        (JOBS, "epsilon"),
        (JOBS, "alpha"),
        (JOBS, "learning_rate_multiplier"),
        ("/v1/adapters", "alpha"),
        (EVALUATE, "epsilon"),
        ("updates", "coefficients"),
        ("updates", "head"),
    ],
)
def test_numbers_that_are_none_are_refused(
    server: Server, adapter: str, file: str, path: str, field: str, number: str
) -> None:
    value = f"[{number}]" if path == "updates" else number
    templates = {
        CHAT: '{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, FIELD}',
        JOBS: f'{{"model": "{NAME}", "training_file": "{file}", "fwdllm": {{FIELD}}}}',
        "/v1/adapters": "{FIELD}",
        EVALUATE: f'{{"adapter": "{adapter}", "examples": [{{"text": "a b"}}], "seeds": [1],'
        " FIELD}",
        "updates": '{"seeds": [1], "coefficients": [0.0], FIELD}',
    }
    template = templates[path]
    if field == "learning_rate_multiplier":
        template = template.replace("fwdllm", "hyperparameters")
        template = template.replace(NAME.replace("fwdllm", "hyperparameters"), NAME)
    if field == "coefficients":
        template = template.replace('"coefficients": [0.0], ', "")
    body = template.replace("FIELD", f'"{field}": {value}')
    where = f"/v1/adapters/{adapter}/updates" if path == "updates" else path
    error = refused(raw(server, where, body), 400)
    assert field in error["message"]


# Jobs


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": "many"}, "steps"),
        ({"steps": 10**12}, "steps"),
        ({"batch_size": 0}, "batch_size"),
        ({"perturbations": -1}, "perturbations"),
        ({"learning_rate": -1.0}, "learning_rate"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"method": "exact"}, "method"),
        ({"method": "backprop", "perturbations": 2}, "perturbations"),
        ({"optimizer": "lion"}, "optimizer"),
        ({"schedule": "cosine"}, "schedule"),
        ({"warmup": 50, "steps": 10}, "warmup"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"rank": 0}, "rank"),
        ({"alpha": -1.0}, "alpha"),
        ({"targets": []}, "target"),
        ({"layers": []}, "layer"),
        ({"directions": "sideways"}, "directions"),
        ({"momentum": 1.5}, "momentum"),
        ({"per_example": "yes"}, "per_example"),
        ({"checkpoint_every": -1}, "checkpoint_every"),
    ],
)
def test_bad_settings_are_refused_with_their_name(
    server: Server, file: str, settings: Any, field: str
) -> None:
    body = {"model": NAME, "training_file": file, "fwdllm": settings}
    assert field in refused(server.http.post(JOBS, json=body), 400)["message"]


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"training_file": "file-nope"}, "training_file"),
        ({"validation_file": "file-nope"}, "validation_file"),
        ({"training_file": None}, "training_file"),
        ({"suffix": "../../etc"}, "suffix"),
        ({"suffix": "x" * 65}, "suffix"),
        ({"suffix": "two\nlines"}, "suffix"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"method": {"type": "dpo"}}, "method.type"),
        ({"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs"),
        ({"hyperparameters": {"batch_size": -1}}, "hyperparameters.batch_size"),
        ({"fwdllm": "all"}, "fwdllm"),
    ],
)
def test_bad_fields_of_a_job_are_refused_with_their_name(
    server: Server, file: str, changes: Any, field: str
) -> None:
    body = {"model": NAME, "training_file": file, **changes}
    error = refused(server.http.post(JOBS, json=body), 400)
    assert error["param"].startswith(field)


def test_only_the_base_model_is_tuned(server: Server, adapter: str, file: str) -> None:
    body = {"model": "nope", "training_file": file}
    assert refused(server.http.post(JOBS, json=body), 404)["code"] == "model_not_found"
    body["model"] = server.get(f"/v1/adapters/{adapter}")["model"]
    assert refused(server.http.post(JOBS, json=body), 400)["param"] == "model"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"targets": ["no_such_tensor"]}, "no_such_tensor"),
        ({"layers": [99]}, "99"),
        ({"rank": 257}, "256"),
        ({"rank": 10**400}, "rank"),
    ],
)
def test_settings_that_do_not_fit_the_model_fail_with_a_sentence(
    server: Server, file: str, settings: Any, said: str
) -> None:
    """At once or when the job reads the model."""
    body = {"model": NAME, "training_file": file, "fwdllm": {**settings, "steps": 2}}
    answer = server.http.post(JOBS, json=body)
    if answer.status_code == 200:
        job = server.await_status(answer.json()["id"], "failed")
        assert said in job["error"]["message"]
    else:
        assert said in refused(answer, 400)["message"]


def unfinished(server: Server) -> list[str]:
    jobs = server.get(JOBS, params={"limit": 100})["data"]
    return [job["id"] for job in jobs if job["status"] not in FINISHED]


def test_a_full_queue_says_when_to_try_again(server: Server, file: str) -> None:
    assert unfinished(server) == []
    ids = [server.create_job(LONG, training_file=file) for _ in range(limits.MAX_UNFINISHED_JOBS)]
    answer = server.http.post(JOBS, json={"model": NAME, "training_file": file})
    assert refused(answer, 429)["type"] == "rate_limit_error"
    assert int(answer.headers["retry-after"]) > 0
    for id in reversed(ids):  # so that none of them starts
        server.post(f"{JOBS}/{id}/cancel")
    ended = server.http.post(f"{JOBS}/{ids[0]}/resume")
    assert "cancelled" in refused(ended, 409)["message"]


# Perturbations


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"adapter": "adapter-nope"}, "adapter"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": [2**64]}, "seeds"),
        ({"seeds": [0.5]}, "seeds"),
        ({"seeds": list(range(4097))}, "seeds"),
        ({"examples": []}, "examples"),
        ({"examples": ["text"]}, "examples"),
        ({"examples": [{"prompt": "x"}]}, "examples:1"),
        ({"examples": [{"text": "a"}, {"prompt": "p", "completion": "c"}]}, "examples:2"),
        ({"examples": [{"text": "hello " * 800}]}, "512"),
        ({"method": "activation"}, "method"),
        ({"epsilon": 0}, "epsilon"),
        ({"distribution": "cauchy"}, "distribution"),
        ({"scope": {"layers": [99]}}, "scope"),
        ({"scope": {"targets": ["nope"]}}, "scope"),
        ({"scope": {"heads": [1]}}, "scope"),
        ({"seed": 1}, "seed"),
    ],
)
def test_bad_perturbations_are_refused(
    server: Server, adapter: str, changes: Any, said: str
) -> None:
    body = {"adapter": adapter, "examples": [{"text": "a b c"}], "seeds": [1], **changes}
    answer = server.http.post(EVALUATE, json=body)
    assert said in refused(answer, 404 if "adapter" in changes else 400)["message"]


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"coefficients": [1.0, 2.0]}, 400, "coefficient"),
        ({"coefficients": []}, 400, "coefficients"),
        ({"seeds": []}, 400, "seeds"),
        ({"seeds": [-1]}, 400, "seeds"),
        ({"coefficients": [1e39]}, 400, "coefficients"),
        ({"head": [1.0]}, 400, "head"),
        ({"version": 5}, 409, "version"),
        ({"version": -1}, 400, "version"),
        ({"scope": {"layers": [99]}}, 400, "scope"),
        ({"coefficients": [3e38] * 3, "seeds": [1, 2, 3]}, 400, "finite"),
    ],
)
def test_bad_updates_are_refused_and_change_nothing(
    server: Server, adapter: str, changes: Any, status: int, said: str
) -> None:
    before, content = server.get(f"/v1/adapters/{adapter}"), server.content(adapter)
    body = {"seeds": [1], "coefficients": [0.1], **changes}
    answer = server.http.post(f"/v1/adapters/{adapter}/updates", json=body)
    assert said in refused(answer, status)["message"]
    assert server.get(f"/v1/adapters/{adapter}") == before
    assert server.content(adapter) == content
    evaluate = {"adapter": adapter, "examples": [{"text": "a b c"}], "seeds": [1]}
    assert server.post(EVALUATE, evaluate)["derivatives"][0] is not None


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"rank": 0}, "rank"),
        ({"rank": 257}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"targets": []}, "targets"),
        ({"targets": ["nope"]}, "target"),
        ({"layers": [99]}, "layer"),
        ({"layers": [-1]}, "layer"),
        ({"suffix": "a/b"}, "suffix"),
        ({"seed": 2**32}, "seed"),
        ({"ranks": 4}, "ranks"),
        ({"labels": ["\ud800", "b"]}, "label"),
        ({"targets": ["\ud800"]}, "target"),
    ],
)
def test_bad_adapters_are_refused(server: Server, body: Any, said: str) -> None:
    before = server.get("/v1/adapters")
    assert said in refused(raw(server, "/v1/adapters", json.dumps(body)), 400)["message"].lower()
    assert server.get("/v1/adapters") == before


def test_two_adapters_may_have_one_suffix(server: Server) -> None:
    made = [server.post("/v1/adapters", {"rank": 1, "suffix": "same"})["model"] for _ in range(2)]
    assert len(set(made)) == 2
