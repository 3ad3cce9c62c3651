"""Requests made up from the server's own description of itself: none of them breaks it.

FWDLLM_TEST_EXAMPLES says how many for each operation, if not sixteen.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import (
    FINISHED,
    SETTINGS,
    TRAIN_ROWS,
    VALID_ROWS,
    Server,
    error_of,
)

from fwdllm.http.limits import MAX_STREAMS

schemathesis = pytest.importorskip("schemathesis")

N_EXAMPLES = int(os.environ.get("FWDLLM_TEST_EXAMPLES", "16"))
# Every answer takes a moment of a model; one that takes longer would be a bug too.
TIMEOUT = 30
SHORT = {**SETTINGS, "steps": 2, "warmup": 0, "checkpoint_every": 1}

# The stream at /v1/stream has no end.
OPERATIONS = (
    "DELETE /v1/fine_tuning/jobs/{job_id}",
    "GET /v1/models", "GET /v1/models/{model}", "DELETE /v1/models/{model}",
    "POST /v1/completions", "POST /v1/chat/completions", "POST /v1/embeddings",
    "POST /predict",
    "POST /v1/files", "GET /v1/files", "GET /v1/files/{file_id}", "DELETE /v1/files/{file_id}",
    "GET /v1/files/{file_id}/content",
    "POST /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs", "GET /v1/fine_tuning/jobs/{job_id}",
    "POST /v1/fine_tuning/jobs/{job_id}/cancel", "POST /v1/fine_tuning/jobs/{job_id}/pause",
    "POST /v1/fine_tuning/jobs/{job_id}/resume", "GET /v1/fine_tuning/jobs/{job_id}/events",
    "GET /v1/fine_tuning/jobs/{job_id}/checkpoints",
    "POST /v1/adapters", "GET /v1/adapters", "GET /v1/adapters/{adapter_id}",
    "DELETE /v1/adapters/{adapter_id}", "GET /v1/adapters/{adapter_id}/content",
    "POST /v1/adapters/{adapter_id}/updates", "POST /v1/perturbations/evaluate",
    "GET /lora-adapters", "POST /lora-adapters", "POST /v1/load_lora_adapter",
    "POST /v1/unload_lora_adapter",
    "GET /healthz", "GET /v1/server", "GET /v1/runs", "GET /metrics",
)  # fmt: skip

EXAMPLES: list[list[Any]] = [
    [{"text": "a b c"}],
    [{"prompt": "hi", "completion": " there"}],
    [{"text": "x", "label": "a"}],
    [{"text": ""}],
    [{"text": "hello " * 700}],
]
MESSAGES: list[list[Any]] = [
    [{"role": "user", "content": "hi"}],
    [{"role": "assistant", "content": None}],
    [{"role": "tool", "content": "x", "tool_call_id": "1"}],
    [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
    [{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}],
]


LORAS: list[Any] = [None, [{"id": 0, "scale": 0.5}], [{"id": 1, "scale": -100}], []]


class Target:
    """A server with something of everything, whose names requests need to get anywhere."""

    def __init__(self, server: Server) -> None:
        self.server = server
        schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
        found = [result.ok() for result in schema.get_all_operations()]
        self.operations = {operation.label: operation for operation in found}
        self.ids: dict[str, list[str]] = {}

    def replenish(self) -> None:
        """Makes again what requests have deleted, and ends jobs that they have made."""
        if self.server.process.poll() is not None:
            self.server.start()
        for job in self.server.get("/v1/fine_tuning/jobs", params={"limit": 100})["data"]:
            if job["status"] not in FINISHED:
                self.server.http.post(f"/v1/fine_tuning/jobs/{job['id']}/cancel")
        files = [self.server.upload(rows) for rows in (TRAIN_ROWS, VALID_ROWS)]
        adapters = [self.server.post("/v1/adapters", {"rank": 1}) for _ in range(2)]
        job = self.server.create_job(SHORT, training_file=files[0])
        models = [model["id"] for model in self.server.get("/v1/models")["data"]]
        self.ids = {
            "file_id": files,
            "adapter_id": [adapter["id"] for adapter in adapters],
            "job_id": [job],
            "model": models[:3],
        }

    def aim(self, case: Any, data: st.DataObject) -> None:
        """Gives most requests names that exist, and contents that are not nonsense."""
        for name in case.path_parameters or {}:
            if name in self.ids and data.draw(st.integers(0, 3)):
                case.path_parameters[name] = data.draw(st.sampled_from(self.ids[name]))
        if not isinstance(case.body, dict) or case.media_type != "application/json":
            return
        for name, values in self._contents(case.operation.label).items():
            if data.draw(st.integers(0, 4)):
                case.body[name] = data.draw(st.sampled_from(values))

    def _contents(self, label: str) -> dict[str, list[Any]]:
        ids = self.ids
        if label.endswith("chat/completions"):
            return {"model": ids["model"], "messages": MESSAGES, "lora": LORAS}
        if label.endswith(("completions", "embeddings")):
            return {"model": ids["model"], "lora": LORAS}
        if label.endswith("load_lora_adapter"):
            return {"lora_name": ids["model"], "lora_path": ["adapter.gguf", "../x", "\0"]}
        if label.endswith("predict"):
            inputs = ["hello", ["a", "b"], [["a"], ["b c"]], "word " * 700]
            return {"model": ids["model"], "inputs": inputs, "labels": [["yes", "no"], ["no"]]}
        if label.endswith("jobs"):
            return {"model": ids["model"][:1], "training_file": ids["file_id"]}
        if label.endswith("evaluate"):
            seeds = [[1], [1, 2], [2**64 - 1]]
            return {"adapter": ids["adapter_id"], "examples": EXAMPLES, "seeds": seeds}
        if label.endswith("updates"):
            weights = [[0.1, 0.2], [3e38, 3e38], [1.0]]
            return {"seeds": [[1, 2]], "coefficients": weights, "version": [None], "head": [None]}
        return {}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    with Server(tmp_path_factory.mktemp("schema") / "state") as running:
        yield Target(running)


def test_every_operation_is_tried(target: Target) -> None:
    assert set(target.operations) == {*OPERATIONS, "GET /v1/stream"}


@pytest.mark.parametrize("label", OPERATIONS)
def test_no_request_breaks_the_server(target: Target, label: str) -> None:
    target.replenish()
    case = target.operations[label].as_strategy()

    @settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        database=None,
        derandomize="FWDLLM_TEST_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(case, st.data())
    def check(case: Any, data: st.DataObject) -> None:
        target.aim(case, data)
        if target.server.process.poll() is not None:
            target.server.start()  # for hypothesis to find the smallest request that ends it
        try:
            answer = case.call(base_url=target.server.url, timeout=TIMEOUT)
        except OSError as error:
            raise AssertionError(f"no answer: {shown(case)}") from error
        assert answer.status_code < 500, f"{answer.text}: {shown(case)}"
        if answer.status_code >= 400:
            error_of(httpx.Response(answer.status_code, headers=JSON, content=answer.content))

    check()
    assert target.server.get("/healthz") == {"status": "ok"}


JSON = {"content-type": "application/json"}


def shown(case: Any) -> str:
    """A request that can be typed."""
    return f"{case.method} {case.formatted_path} {case.query} {case.body!r}"


def test_the_stream_tells_runs_points_and_the_server(target: Target) -> None:
    id = target.server.create_job(SHORT)
    target.server.await_status(id, "succeeded")
    events: dict[str, Any] = {}
    with target.server.http.stream("GET", "/v1/stream", params={"run": id}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        name = ""
        for line in answer.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            if line.startswith("data: "):
                events.setdefault(name, json.loads(line.removeprefix("data: ")))
            if len(events) == 3:
                break
    assert events["server"]["resident_bytes"] > 0
    assert events["runs"]["data"][0]["id"] == id
    points = events["points"]
    assert (points["run"], points["reset"]) == (id, True)
    assert [p["step"] for p in points["points"] if p["kind"] == "step"] == [1, 2]


def test_pages_beyond_the_limit_are_told_to_wait(target: Target) -> None:
    with httpx.Client(base_url=target.server.url, limits=httpx.Limits()) as client:
        streams = [
            client.send(client.build_request("GET", "/v1/stream"), stream=True)
            for _ in range(MAX_STREAMS)
        ]
        answer = client.get("/v1/stream")
        assert answer.status_code == 429
        error_of(answer)
        for stream in streams:
            stream.close()
