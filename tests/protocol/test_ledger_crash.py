"""Servers killed, out of disk or failing to write: nothing that was accepted is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import ledger_runs
import pytest
from ledger_runs import (
    N_CLIENTS,
    RUNS,
    create,
    final,
    finish,
    message,
    path,
    proceed,
    reopen,
    step,
)

from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture

# kill -9


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_accepted_survives_a_kill(path: Path, tmp_path: Path, count: int) -> None:
    create(path).close()
    command = [sys.executable, ledger_runs.__file__, path, str(count)]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    said = [line.split() for line in done.stdout.decode().splitlines()]
    assert len(said) == count
    with Ledger(path, writable=True) as ledger:
        kept = ledger.contributions(0, 0)
        assert sorted(kept) == sorted((int(c), bytes.fromhex(data)) for c, data in said)
        assert finish(Server(ledger)) == final(tmp_path)
        verify(ledger)


# A full disk


def limit(ledger: Ledger, n_pages: int | None) -> None:
    """Let SQLite find the disk full at so many pages, None for as good as never."""
    ledger._db.execute(f"PRAGMA max_page_count = {n_pages or 2**30}")


def n_pages(ledger: Ledger) -> int:
    return int(ledger._db.execute("PRAGMA page_count").fetchone()[0])


@pytest.mark.parametrize("upload", ["scalars", "weights"])
def test_a_full_disk_loses_nothing_that_was_accepted(
    path: Path, tmp_path: Path, upload: str
) -> None:
    # Messages of more than a page each, so that everything that is written needs room.
    changes = {"perturbations": 1024, "snapshot_every": 1, "upload": upload}
    want = final(tmp_path, **changes)
    create(path, **changes).close()
    failed = set()
    for _ in range(100):
        with reopen(path) as ledger:
            server = Server(ledger)
            if server.done:
                break
            full = failing(server)
        if full is None:
            continue
        failed.add(full)
        with reopen(path) as ledger:
            verify(ledger)
            proceed(Server(ledger))
    assert failed >= ({"open", "receive", "close"} if upload == "scalars" else {"open"})
    with Ledger(path) as ledger:
        assert Server(ledger).replica.theta.tobytes() == want
        assert replay(ledger).theta.tobytes() == want


def failing(server: Server) -> str | None:
    """Take the next step on a disk without room; what failed, if it needed room."""
    name, act = step(server)
    before = contents(server.ledger)
    limit(server.ledger, n_pages(server.ledger))
    try:
        act()
    except LedgerError as error:
        found = str(error)
    else:
        return None
    assert "database or disk is full" in found
    assert contents(server.ledger) == before
    return name


def contents(ledger: Ledger) -> list[list[Any]]:
    tables = ("part", "assignment", "contribution", "rejection", "round", "snapshot")
    return [ledger._db.execute(f"SELECT * FROM {table}").fetchall() for table in tables]


def test_the_same_server_goes_on_when_there_is_room_again(path: Path, tmp_path: Path) -> None:
    changes = {"perturbations": 1024, "snapshot_every": 1, "rounds": 2}
    want = final(tmp_path, **changes)
    failed = set()
    with create(path, **changes) as ledger:
        server = Server(ledger)
        while not server.done:
            full = failing(server)
            limit(ledger, None)
            if full is not None:
                failed.add(full)
                proceed(server)
        assert failed == {"open", "receive", "close"}
        assert server.replica.theta.tobytes() == want
        assert replay(ledger).theta.tobytes() == want


@pytest.mark.parametrize("name", RUNS)
def test_after_an_error_a_server_is_where_a_new_one_would_be(
    name: str, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every round fails to close once, and once again."""
    want = final(tmp_path, **RUNS[name])
    n_failed = 0

    def fail(*_: object) -> None:
        raise LedgerError("the disk is gone")

    def fails_to_close(server: Server) -> bool:
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "close_round", fail)
            try:
                assert server.close_part(0.0) is None
            except LedgerError:
                return True
        return False

    with create(path, **RUNS[name]) as ledger:
        server = Server(ledger)
        while not server.done:
            for a in server.open_part(range(N_CLIENTS), 0.0):
                assert server.receive(a.client, message(server, a), 1.0) is None
            if not fails_to_close(server):
                continue  # the round goes on, for which nothing is written
            assert_as_new(server)
            assert fails_to_close(server)
            assert_as_new(server)
            n_failed += 1
            assert server.close_part(0.0) is not None
        assert n_failed == 4
        assert server.replica.theta.tobytes() == want
        assert replay(ledger).theta.tobytes() == want
        verify(ledger)


def assert_as_new(server: Server) -> None:
    new = Server(server.ledger)
    assert (server.round, server.part, server.done) == (new.round, new.part, new.done)
    assert server.outstanding() == new.outstanding()
    got, want = server.replica.to_arrays(), new.replica.to_arrays()
    assert got.keys() == want.keys()
    assert all(got[k].tobytes() == want[k].tobytes() for k in want)


def test_after_an_error_of_reading_a_server_is_where_a_new_one_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LedgerError("the disk is gone")

    with create(tmp_path / "ledger") as ledger:
        server = Server(ledger)
        for a in server.open_part(range(N_CLIENTS), 0.0):
            server.receive(a.client, message(server, a), 1.0)
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "rounds", fail)
            with pytest.raises(LedgerError):
                server.close_part(0.0)
        assert_as_new(server)
        assert server.close_part(0.0) is not None
