"""A full disk, a damaged store, and a server that is told to stop in the middle of long work."""

from __future__ import annotations

import json
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import (
    LONG,
    SETTINGS,
    TRAIN_ROWS,
    VALID_ROWS,
    Server,
    adapter_of_tune,
    serve_command,
)

STEPS = 24
# Grace, the process's last seconds, and a machine that others keep busy.
STOPPED = 25.0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """The root of a file system of 4 MiB; only the superuser can make one."""
    folder = tmp_path / "state"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no small file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(path: Path) -> None:
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_a_job_that_meets_a_full_disk_is_paused_and_resumes(
    small_disk: Path, tmp_path: Path
) -> None:
    settings = {**SETTINGS, "steps": STEPS, "checkpoint_every": 4}
    filler = small_disk / "filler"
    with Server(small_disk) as server:
        id = server.create_job(settings)
        server.await_step(id, 5)
        fill(filler)
        deadline = time.monotonic() + 60
        while server.descendants():  # its worker
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert server.get("/healthz") == {"status": "ok"}
        assert server.job(id)["status"] != "failed"
        filler.unlink()
        job = server.await_status(id, "paused")
        assert job["error"] is None
        assert [e["level"] for e in server.events(id) if "disk is full" in e["message"]] == ["warn"]
        server.post(f"/v1/fine_tuning/jobs/{id}/resume")
        found = server.result(id)
        assert any("Going on after step" in e["message"] for e in server.events(id))
    data, held_out = tmp_path / "data.jsonl", tmp_path / "held-out.jsonl"
    data.write_bytes(TRAIN_ROWS)
    held_out.write_bytes(VALID_ROWS)
    assert found == adapter_of_tune(settings, tmp_path, data=data, eval_data=held_out)


def started(state: Path) -> subprocess.CompletedProcess[str]:
    """A server that does not start."""
    return subprocess.run(serve_command(state), capture_output=True, text=True, timeout=60)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def removed(path: Path) -> None:
    path.unlink()


def without_tables(path: Path) -> None:
    path.unlink()
    sqlite3.connect(path).execute("VACUUM")


def of_another_program(path: Path) -> None:
    path.unlink()
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE notes (text TEXT)")


def of_another_program_and_our_number(path: Path) -> None:
    of_another_program(path)
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 1")


def no_database(path: Path) -> None:
    path.write_bytes(b"not a database " * 100)


@pytest.fixture(scope="module")
def old_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a server that has had a job."""
    state = tmp_path_factory.mktemp("old") / "state"
    with Server(state) as server:
        server.await_status(server.create_job({**SETTINGS, "steps": 1, "warmup": 0}), "succeeded")
    return state


@pytest.mark.parametrize(
    "damage",
    [
        emptied, removed, without_tables, of_another_program, of_another_program_and_our_number,
        no_database,
    ],
)  # fmt: skip
def test_a_store_that_is_none_is_refused_beside_old_jobs(
    old_state: Path, tmp_path: Path, damage: Any
) -> None:
    state = tmp_path / "state"
    subprocess.run(["cp", "-r", str(old_state), str(state)], check=True)
    damage(state / "server.sqlite")
    before = (state / "jobs" / "1" / "run" / "config.json").read_bytes()
    found = started(state)
    assert found.returncode == 2
    assert found.stdout == "" and "server.sqlite" in found.stderr
    assert "Traceback" not in found.stderr and len(found.stderr.strip().splitlines()) == 1
    assert (state / "jobs" / "1" / "run" / "config.json").read_bytes() == before


def test_a_store_that_was_just_made_and_is_still_empty_is_used(tmp_path: Path) -> None:
    """As after a crash before the first transaction."""
    state = tmp_path / "state"
    state.mkdir()
    emptied(state / "server.sqlite")
    with Server(state) as server:
        assert server.get("/v1/fine_tuning/jobs")["data"] == []


def test_a_server_ends_though_a_thread_does_not(tmp_path: Path) -> None:
    """Its job is saved: the next server goes on with it."""
    state = tmp_path / "state"
    with Server(state) as server:
        id = server.create_job(LONG)
        server.await_step(id, LONG["checkpoint_every"] + 1)
        adapter = server.post("/v1/adapters", {"rank": 1})["id"]
        rows = [json.loads(line) for line in TRAIN_ROWS.splitlines()] * 6
        body = {"adapter": adapter, "examples": rows[:240], "seeds": list(range(1000))}
        asking = threading.Thread(target=ask, args=(server.url, body))
        asking.start()
        time.sleep(2.0)
        step, began = server.step(id), time.monotonic()
        server.process.terminate()
        assert server.process.wait(STOPPED) == 1
        assert time.monotonic() - began < STOPPED
        asking.join()
        assert "a request did not end and was abandoned" in server.output
        server.http.close()
        server.start()
        assert server.step(id) >= step
        server.await_step(id, server.step(id) + 1)
        assert any("Going on after step" in e["message"] for e in server.events(id))


def ask(url: str, body: Any) -> None:
    with suppress(httpx.HTTPError):
        httpx.post(f"{url}/v1/perturbations/evaluate", json=body, timeout=120)
