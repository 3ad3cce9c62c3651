"""Ledgers that somebody has changed: what was changed is found and its round named."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ledger_runs import N_CLIENTS, change, create, finish, message, path, reopen, some

from fwdllm.protocol import wire
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "ledger.sqlite"
    with create(path, rounds=3, snapshot_every=2) as ledger:
        finish(Server(ledger), some)
    return path


@pytest.fixture
def tampered(finished: Path, path: Path) -> Path:
    shutil.copy(finished, path)
    return path


def assert_found(path: Path, words: str, check: Callable[[Ledger], object] = verify) -> None:
    with Ledger(path) as ledger, pytest.raises(LedgerError, match=words):
        check(ledger)


@pytest.mark.parametrize("table", ["assignment", "contribution", "round"])
def test_a_changed_byte_of_any_message_is_found_and_its_round_named(
    table: str, tampered: Path
) -> None:
    key = "round" if table == "round" else "round, part, client"
    random = np.random.default_rng(1)
    with reopen(tampered) as ledger:
        verify(ledger)
        rows = ledger._db.execute(f"SELECT {key}, message FROM {table}").fetchall()
        where = " AND ".join(f"{name} = ?" for name in key.split(", "))
        assert len(rows) >= 3
        for i, (*keys, data) in enumerate(rows):
            # All bytes of the first message, and some of the others.
            places = range(len(data)) if i == 0 else [0, *random.choice(len(data), 4)]
            for at in places:
                wrong = bytearray(data)
                wrong[at] ^= 1 << int(random.integers(8))
                update = f"UPDATE {table} SET message = ? WHERE {where}"
                ledger._db.execute(update, (bytes(wrong), *keys))
                with pytest.raises(LedgerError, match=f"round {keys[0] + 1} has been changed"):
                    verify(ledger)
                ledger._db.execute(update, (data, *keys))
        verify(ledger)


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("DELETE FROM round WHERE round = 0", "round 1 is missing"),
        ("DELETE FROM contribution WHERE round = 1", "round 2 has been changed"),
        (
            "DELETE FROM contribution WHERE (round, client) ="
            " (SELECT round, client FROM contribution WHERE round = 2 LIMIT 1)",
            "round 3 has been changed",
        ),
        ("DELETE FROM assignment WHERE round = 0", "round 1 has been changed"),
        ("DELETE FROM part WHERE round = 0", "round 1 has been changed"),
        ("UPDATE part SET n_available = 5 WHERE round = 2", "round 3 has been changed"),
        ("UPDATE contribution SET client = client + 50 WHERE round = 1", "round 2 has been"),
        ("UPDATE round SET message = NULL WHERE round = 1", "round 2 has been changed"),
        ("UPDATE round SET theta = zeroblob(32) WHERE round = 1", "round 2 has been changed"),
        ("UPDATE round SET hash = zeroblob(32) WHERE round = 1", "round 2 has been changed"),
        ("UPDATE round SET snapshot = zeroblob(32) WHERE round = 1", "round 2 has been changed"),
        ("UPDATE round SET snapshot = NULL WHERE round = 1", "round 2 has been changed"),
        ("UPDATE round SET snapshot = zeroblob(32) WHERE round = 0", "round 1 has been changed"),
        ("UPDATE meta SET json = replace(json, '0.05', '0.06')", "round 1 has been changed"),
        ("UPDATE meta SET json = replace(json, '\"toy\"', '\"other\"')", "round 1 has been"),
        ("UPDATE meta SET json = replace(json, ': 77}', ': 78}')", "round 1 has been changed"),
    ],
)
def test_what_is_deleted_or_edited_is_found(query: str, words: str, tampered: Path) -> None:
    change(tampered, query)
    assert_found(tampered, words)


def verify_and_open(ledger: Ledger) -> None:
    verify(ledger)
    Server(ledger)


def test_added_contributions_are_found(tampered: Path) -> None:
    change(tampered, "INSERT INTO contribution SELECT round, part, 99, 0.0, message"
                     " FROM contribution WHERE round = 1 LIMIT 1")  # fmt: skip
    assert_found(tampered, "round 2 has been changed")


def test_a_deleted_last_round_is_found(tampered: Path) -> None:
    change(tampered, "DELETE FROM round WHERE round = 2")
    assert_found(tampered, ".", verify_and_open)
    assert_found(tampered, "snapshot of round 3")


@pytest.mark.parametrize("column", ["loss", "first_variance", "variance", "n_perturbations"])
def test_numbers_of_a_round_are_part_of_its_hash(column: str, tampered: Path) -> None:
    change(tampered, f"UPDATE round SET {column} = {column} + 1 WHERE round = 1")
    assert_found(tampered, "round 2 has been changed")
    if column != "n_perturbations":
        change(tampered, f"UPDATE round SET {column} = NULL WHERE round = 1")
        assert_found(tampered, "round 2 has been changed")


def test_times_and_what_was_refused_are_not_part_of_a_rounds_hash(tmp_path: Path) -> None:
    """So runs that took the same steps have the same hashes, however long they waited."""
    hashes = []
    for hours, name in enumerate(("early", "late")):
        with create(tmp_path / name) as ledger:
            server = Server(ledger)
            while not server.done:
                for a in server.open_part(range(N_CLIENTS), 3600.0 * hours):
                    if hours:
                        assert server.receive(a.client, b"nonsense", 3600.0) is not None
                    data = message(server, a)
                    assert server.receive(a.client, data, 3600.0 * hours + 1) is None
                server.close_part(3600.0 * hours + 2)
            verify(ledger)
            hashes.append([closed.hash for closed in ledger.rounds()])
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 4


def test_a_changed_snapshot_is_found(tampered: Path) -> None:
    with Ledger(tampered) as ledger:
        state = wire.decode_state(ledger.snapshot() or b"")
    state["theta"] = state["theta"] + np.float32(1)
    change(tampered, "UPDATE snapshot SET state = ? WHERE round = 3", wire.encode_state(state))
    assert_found(tampered, ".", verify_and_open)
    # By each of the two alone, too.
    for check in (verify, Server, Ledger.snapshot, Ledger.check_snapshots):
        assert_found(tampered, "the snapshot of round 3 has been changed", check)


def test_a_changed_snapshot_that_nobody_loads_is_found(tampered: Path) -> None:
    """There are two of them, after the second round and the last."""
    query = "UPDATE snapshot SET state = (SELECT state FROM snapshot WHERE round = 3)"
    change(tampered, f"{query} WHERE round = 2")
    assert_found(tampered, "the snapshot of round 2 has been changed")
    with Ledger(tampered) as ledger:
        Server(ledger)


def test_a_snapshot_of_no_round_is_found(tampered: Path) -> None:
    change(tampered, "INSERT INTO snapshot SELECT 9, state FROM snapshot WHERE round = 3")
    assert_found(tampered, "the snapshot of round 9", verify)
    assert_found(tampered, "the snapshot of round 9", Server)


def test_without_snapshots_the_state_is_the_same(finished: Path, tampered: Path) -> None:
    change(tampered, "DELETE FROM snapshot")
    with Ledger(finished) as whole, Ledger(tampered) as ledger:
        want, got = (Server(one).replica.to_arrays() for one in (whole, ledger))
        assert got.keys() == want.keys()
        assert all(got[k].tobytes() == want[k].tobytes() for k in want)


def test_a_round_has_the_hash_of_the_state_that_is_kept_after_it(finished: Path) -> None:
    with Ledger(finished) as ledger:
        kept = dict(ledger._db.execute("SELECT round, state FROM snapshot").fetchall())
        want = [None, *(hashlib.sha256(kept[round]).digest() for round in (2, 3))]
        assert [closed.snapshot for closed in ledger.rounds()] == want
        assert ledger.snapshot() == kept[3]


def test_replaying_finds_what_hashes_would_not(tampered: Path) -> None:
    other = "SELECT message FROM round WHERE round = 2"
    change(tampered, f"UPDATE round SET message = ({other}) WHERE round = 1")
    assert_found(tampered, "round 2 has another update than recorded", replay)
    change(tampered, "UPDATE round SET theta = zeroblob(32) WHERE round = 0")
    assert_found(tampered, "round 1 leads to another adapter than recorded", replay)


def test_damaged_files_are_told_of_and_never_crash(finished: Path, path: Path) -> None:
    random = np.random.default_rng(2)
    whole = finished.read_bytes()
    with Ledger(finished) as ledger:
        theta = replay(ledger).theta.tobytes()
    outcomes = set()
    for _ in range(60):
        damaged = bytearray(whole)
        first = int(random.integers(len(whole)))
        damaged[first : first + 16] = random.bytes(min(16, len(whole) - first))
        path.write_bytes(damaged)
        try:
            with Ledger(path) as ledger:
                verify(ledger)
                assert replay(ledger).theta.tobytes() == theta
                outcomes.add("whole")
        except LedgerError:
            outcomes.add("damaged")
    assert "damaged" in outcomes


def test_a_round_that_is_missing_is_named_also_where_a_snapshot_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with create(path, rounds=3, snapshot_every=2) as ledger:
        finish(Server(ledger))
    change(path, "DELETE FROM round WHERE round = 1")
    with Ledger(path) as ledger, pytest.raises(LedgerError, match="round 2 is missing"):
        verify(ledger)
