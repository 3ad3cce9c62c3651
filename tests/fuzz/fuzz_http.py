"""Changed requests to every route of the server, in this process, with a small model behind it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import sources
from changes import change_bytes, change_json, dumped
from target import OK, REFUSED, Row, Target

from fwdllm.demo import asset

MODEL = "fwdllm-tiny"
# So few that no answer is long.
CONTEXT = 64
_CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
_EXAMPLES = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
# Routes whose bodies are JSON, each with sound ones; IDs are put in when a request is sent.
BODIES: list[tuple[str, Any]] = [
    ("/v1/completions", {"prompt": "Once", "max_tokens": 2, "temperature": 0.5, "stop": ["x"]}),
    ("/v1/completions", {"prompt": [5, 6], "max_tokens": 2, "logit_bias": {"5": 1}, "echo": True}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2, "stream": True, "seed": 1,
     "stream_options": {"include_usage": True}, "min_tokens": 1, "top_p": 0.9, "top_k": 5}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 3, "grammar": "root ::= [a-z]+",
     "lora": [{"id": 0, "scale": 0.5}], "presence_penalty": 0.1, "mirostat_mode": 2}),
    ("/v1/chat/completions", {**_CHAT, "stream": True}),
    ("/v1/chat/completions", {**_CHAT, "tools": [_TOOL], "tool_choice": "required"}),
    ("/v1/chat/completions", {**_CHAT, "response_format": {"type": "json_schema",
     "json_schema": {"name": "x", "schema": _SCHEMA}}}),
    ("/v1/chat/completions", {"max_tokens": 2, "messages": [
        {"role": "system", "content": "a"}, {"role": "user", "content": [
            {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"}, {"role": "user", "content": "d"}]}),
    ("/v1/embeddings", {"input": ["a", "b c"], "encoding_format": "base64", "dimensions": 8}),
    ("/predict", {"inputs": ["a", "b"], "labels": ["good", "bad"], "truncate": True}),
    ("/v1/fine_tuning/jobs", {"model": MODEL, "training_file": "FILE_ID", "seed": 1,
     "hyperparameters": {"n_epochs": 1, "batch_size": 1}, "suffix": "x",
     "fwdllm": {"rank": 1, "steps": 1, "method": "backprop", "targets": ["attn_q"]}}),
    ("/v1/adapters", {"rank": 1, "alpha": 2.0, "suffix": "y", "seed": 3}),
    ("/v1/adapters/ADAPTER_ID/updates", {"seeds": [1, 2], "coefficients": [0.1, 0.2]}),
    ("/v1/perturbations/evaluate", {"adapter": "ADAPTER_ID", "examples": _EXAMPLES, "seeds": [1],
     "epsilon": 0.001}),
    ("/lora-adapters", [{"id": 0, "scale": 1.0}]),
    ("/v1/load_lora_adapter", {"lora_name": "z", "lora_path": "adapter.gguf"}),
    ("/v1/unload_lora_adapter", {"lora_name": "z"}),
]  # fmt: skip
# All others but the stream of events, which has no end.
PATHS = [
    "GET /v1/models", "GET /v1/models/{}", "DELETE /v1/models/{}", "GET /v1/files",
    "GET /v1/files/{}", "DELETE /v1/files/{}", "GET /v1/files/{}/content", "GET /v1/adapters",
    "GET /v1/adapters/{}", "DELETE /v1/adapters/{}", "GET /v1/adapters/{}/content",
    "GET /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs/{}", "DELETE /v1/fine_tuning/jobs/{}",
    "POST /v1/fine_tuning/jobs/{}/cancel", "POST /v1/fine_tuning/jobs/{}/pause",
    "POST /v1/fine_tuning/jobs/{}/resume", "GET /v1/fine_tuning/jobs/{}/events",
    "GET /v1/fine_tuning/jobs/{}/checkpoints", "GET /lora-adapters", "GET /healthz",
    "GET /v1/server", "GET /v1/runs", "GET /metrics", "GET /", "GET /openapi.json",
    "GET /assets/{}", "PUT /v1/models", "PATCH /{}", "OPTIONS /v1/models",
]  # fmt: skip
_IDS = ["FILE_ID", "ADAPTER_ID", "JOB_ID", MODEL]
_ODD_IDS = [
    "x",
    "0",
    "-1",
    "1e9",
    "%00",
    "..%2f..",
    "ft:x",
    "file-",
    "job-1",
    "ß",
    "a" * 5000,
    "%ff",
]
_KNOWN = [*_IDS, "user", "assistant", "text", "json_object", "auto", "none", "type", "content",
    "grammar", "lora", "adapter", "method", "central", "steps", "n", "best_of", "user", "stream",
    "messages", "prompt", _SCHEMA, _TOOL, _CALL]  # fmt: skip


def _make(folder: Path) -> None:
    import fwdllm.http.application  # noqa: F401

    adapters = folder / "adapters"
    adapters.mkdir()
    shutil.copy(sources.source(folder, "tiny") / "adapter.gguf", adapters)


def _write(random: Random, folder: Path, case: Path) -> str:
    choice = random.random()
    if choice < 0.7:
        path, body = random.choice(BODIES)
        kind, method = path, "POST"
        content = dumped(change_json(body, random, _KNOWN), random)
    elif choice < 0.8:
        kind, method, path = "upload", "POST", "/v1/files"
        row = b'{"prompt": "a", "completion": "b"}\n' * random.choice([1, 3])
        form = (
            b'--B\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--B\r\n'
            b'Content-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n%b\r\n'
            b"--B--\r\n"
        )
        content = change_bytes(form % row, random, [b"--B", b"\r\n", b"filename", b'"'])
    else:
        method, path = random.choice(PATHS).split(" ")
        kind, content = "no body", b"" if random.random() < 0.8 else random.randbytes(20)
        path = path.format(random.choice(_IDS if random.random() < 0.6 else _ODD_IDS))
        if random.random() < 0.5:
            name = random.choice(["limit", "after", "order", "purpose", "run", "", "x"])
            path += f"?{name}={random.choice([*_IDS, *_ODD_IDS, '', '5', '10001', 'asc'])}"
    headers = {"content-type": random.choice(["application/json"] * 20 + ["text/plain", "", "x/y"])}
    if kind == "upload":
        headers = {"content-type": "multipart/form-data; boundary=B"}
    if random.random() < 0.1:
        name = random.choice(["content-length", "authorization", "origin", "host", "accept",
                              "content-encoding", "transfer-encoding", "x-a"])  # fmt: skip
        headers[name] = random.choice(
            ["0", "-1", "99999999999", "gzip", "http://evil", "", "a" * 9000]
        )
    (case / "request.json").write_text(json.dumps([method, path, headers]))
    (case / "body").write_bytes(content)
    return kind


class _Server:
    """The application and what requests need in it."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.ids = {"FILE_ID": "", "ADAPTER_ID": "", "JOB_ID": ""}

    def replenish(self) -> None:
        """Make again what requests have deleted, and end jobs that they have made."""
        ids, get, post = self.ids, self.client.get, self.client.post
        if get(f"/v1/files/{ids['FILE_ID']}").status_code != 200 or not ids["FILE_ID"]:
            row = b'{"prompt": "a", "completion": "b"}\n' * 4
            sent = post(
                "/v1/files", files={"file": ("a.jsonl", row)}, data={"purpose": "fine-tune"}
            )
            ids["FILE_ID"] = sent.json()["id"]
        if get(f"/v1/adapters/{ids['ADAPTER_ID']}").status_code != 200 or not ids["ADAPTER_ID"]:
            ids["ADAPTER_ID"] = post("/v1/adapters", json={"rank": 1}).json()["id"]
        for job in get("/v1/fine_tuning/jobs?limit=100").json()["data"]:
            ids["JOB_ID"] = job["id"]
            if job["status"] not in ("succeeded", "failed", "cancelled"):
                post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")


@contextmanager
def open_server(folder: Path) -> Iterator[_Server]:
    """The application with a small model, and a client of it in this process."""
    from fastapi.testclient import TestClient

    from fwdllm.http.application import ServerConfig, application

    state = Path(tempfile.mkdtemp(dir=folder))
    config = ServerConfig(
        asset(f"{MODEL}.gguf"), state / "state", 1 << 30, context=CONTEXT,
        adapter_folder=folder / "adapters",
    )  # fmt: skip
    with application(config) as app, TestClient(app, base_url="http://127.0.0.1") as client:
        yield _Server(client)
    shutil.rmtree(state)


def answered(what: str, answer: Any) -> Row:
    """What an answer comes to: one of 500 or more is a bug, as is one without OpenAI's error."""
    text = f"{answer.status_code} {answer.text[:300]}"
    if answer.status_code >= 500:
        return Row(what, "answer of 500", output=text)
    if answer.status_code >= 400:
        try:
            wrong = not answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            wrong = True
        return Row(what, "no error in it" if wrong else REFUSED, output=text if wrong else "")
    return Row(what, OK)


def _check(server: _Server, case: Path) -> list[Row]:
    import traceback

    server.replenish()
    method, path, headers = json.loads((case / "request.json").read_text())
    body = (case / "body").read_bytes()
    for name, id in server.ids.items():
        path, body = path.replace(name, id), body.replace(name.encode(), id.encode())
    try:
        request = server.client.build_request(method, path, headers=headers, content=body or None)
    except Exception:  # not one that can be sent
        return [Row("request", REFUSED)]
    try:
        return [answered("request", server.client.send(request))]
    except Exception:
        return [Row("request", "traceback", output=traceback.format_exc())]


HTTP = Target(_make, _write, _check, open_server, seconds=15)
