"""Servers that are killed or stopped at any moment: nothing accepted is lost, jobs go on.

FWDLLM_TEST_KILLS says how many kills, if not three.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import (
    LONG,
    NAME,
    SETTINGS,
    TRAIN_ROWS,
    VALID_ROWS,
    Server,
    adapter_of_tune,
)

N_KILLS = int(os.environ.get("FWDLLM_TEST_KILLS", "3"))
# Long enough to be killed more than once, with checkpoints and evaluations on the way.
STEPS = 40
INTERRUPTED = {**SETTINGS, "steps": STEPS, "checkpoint_every": 10, "eval_every": 20}
# From the start of a worker until it has begun to train takes a second or two.
LONGEST_LIFE = 3.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path / "state") as running:
        yield running


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The adapter of a job that is never interrupted."""
    folder = tmp_path_factory.mktemp("expected")
    data, held_out = folder / "data.jsonl", folder / "held-out.jsonl"
    data.write_bytes(TRAIN_ROWS)
    held_out.write_bytes(VALID_ROWS)
    return adapter_of_tune(INTERRUPTED, folder, data=data, eval_data=held_out)


def kept(server: Server) -> dict[str, Any]:
    """What a server has promised to keep, by the ids of its jobs and otherwise."""
    jobs = server.get("/v1/fine_tuning/jobs", params={"limit": 100})["data"]
    found = {job["id"]: server.events(job["id"]) for job in jobs}
    for part in ("files", "adapters"):
        found[part] = server.get(f"/v1/{part}")["data"]
    return found


def assert_nothing_is_lost(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert set(before) <= set(after)
    for name, items in before.items():
        assert all(item in after[name] for item in items)


def assert_steps_are_told_once(server: Server, id: str) -> None:
    told = [event["data"] for event in server.events(id) if event["data"]]
    steps = [data["step"] for data in told if "train_loss" in data]
    assert steps == list(range(1, STEPS + 1))
    assert [data["step"] for data in told if "valid_loss" in data] == [0, 20, 40]


def killed(server: Server) -> None:
    """Kill -9, and what the server had started leaves by itself."""
    _, alive = psutil.wait_procs(server.kill(), timeout=20)
    for process in alive:
        process.kill()
    assert not alive, "workers of a dead server go on"


def test_kills_at_any_moment_cost_nothing(server: Server, expected: bytes) -> None:
    rng = random.Random(time.time_ns())
    jobs, promised = [server.create_job(INTERRUPTED)], []
    for _ in range(N_KILLS):
        if server.job(jobs[-1])["status"] == "succeeded":
            jobs.append(server.create_job(INTERRUPTED))
        time.sleep(rng.uniform(0, LONGEST_LIFE))
        promised.append(kept(server))
        killed(server)
        server.start()
        assert_nothing_is_lost(promised[-1], kept(server))
    for id in jobs:
        assert server.result(id) == expected
        assert server.job(id)["trained_tokens"] > 0
        assert_steps_are_told_once(server, id)
    for before in promised:
        assert_nothing_is_lost(before, kept(server))


def test_a_kill_right_after_an_answer_loses_nothing(server: Server) -> None:
    file = server.upload(TRAIN_ROWS)
    job = server.create_job(LONG, training_file=file)
    adapter = server.post("/v1/adapters", {"rank": 1})
    killed(server)
    server.start()
    assert server.http.get(f"/v1/files/{file}/content").content == TRAIN_ROWS
    assert server.get(f"/v1/adapters/{adapter['id']}") == adapter
    server.await_step(job, 1)
    cancel = server.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    assert cancel["status"] == "cancelled"
    killed(server)
    server.start()
    assert server.job(job) == cancel


def test_a_stopped_server_saves_the_running_job(server: Server, expected: bytes) -> None:
    id = server.create_job(INTERRUPTED)
    server.await_step(id, 13)  # past a checkpoint
    assert server.stop() == 0
    server.start()
    server.await_status(id, "succeeded")
    began = [e["message"] for e in server.events(id) if e["message"].startswith("Going on")]
    assert len(began) == 1
    # Not from the checkpoint of step 10: it was asked to save what it had.
    assert int(began[0].split()[4]) >= 13
    assert server.result(id) == expected
    assert_steps_are_told_once(server, id)


def test_a_killed_worker_fails_its_job_and_the_next_one_runs(server: Server) -> None:
    first, second = server.create_job(LONG), server.create_job({**SETTINGS, "steps": 5})
    server.await_step(first, 1)
    [worker] = server.descendants()
    worker.kill()
    server.await_status(second, "succeeded")
    job = server.job(first)
    assert job["status"] == "failed"
    assert "signal 9" in job["error"]["message"]


def test_paused_jobs_stay_so_over_a_restart(server: Server) -> None:
    id = server.create_job(LONG)
    server.await_step(id, 1)
    server.post(f"/v1/fine_tuning/jobs/{id}/pause")
    killed(server)
    server.start()
    time.sleep(1)
    assert server.job(id)["status"] == "paused"
    assert not server.descendants()
    server.post(f"/v1/fine_tuning/jobs/{id}/resume")
    server.await_status(id, "running")


def test_a_tuned_model_answers_after_a_restart(server: Server) -> None:
    id = server.create_job({**SETTINGS, "steps": 8})
    server.await_status(id, "succeeded")
    body = {"model": server.job(id)["fine_tuned_model"], "prompt": "A cow", "temperature": 0}
    before = server.post("/v1/completions", body)["choices"]
    killed(server)
    server.start()
    assert server.post("/v1/completions", body)["choices"] == before
    assert NAME in [model["id"] for model in server.get("/v1/models")["data"]]


def test_a_store_that_is_none_is_refused(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "server.sqlite").write_bytes(b"this is not a database " * 100)
    with pytest.raises(RuntimeError, match=r"cannot use .*server\.sqlite"):
        Server(state)
    assert (state / "server.sqlite").read_bytes() == b"this is not a database " * 100
