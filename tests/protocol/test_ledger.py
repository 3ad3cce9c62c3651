"""The ledger and the server over it: crashes, tampering, hostile reports, resuming, full disks.

Clients are quadratic: the gradient of client c's loss at theta is theta minus c's own optimum.
Run as a script it accepts contributions and kills itself, for the test that looks what is left:
``python test_ledger.py LEDGER COUNT``.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwdllm.engine.adapters.adapter import Adapter, Head, LoRAConfig
from fwdllm.engine.files import lock
from fwdllm.kernels import cpu
from fwdllm.protocol import wire
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.ledger import Ledger, LedgerError, theta_hash
from fwdllm.protocol.plan import Assignment, choose
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.report import Report
from fwdllm.protocol.server import Server
from fwdllm.protocol.space import HEAD

N_CLIENTS = 6
HEAD_OF_2 = Head(("a", "b"), 3)
SHAPES = {f"blk.{layer}.attn_q": (4, 6) for layer in range(3)}
RUNS: dict[str, dict[str, Any]] = {
    "scalars": {},
    "paced": {
        "pacing": True,
        "variance_threshold": 0.05,
        "max_parts": 3,
        "candidates": 3,
        "optimizer": "yogi",
        "snapshot_every": 2,
    },
    "split": {"split": True, "perturbations": 1, "weighted": False, "optimizer": "momentum"},
    "shared": {"seeds": "shared", "aggregate": "median", "directions": "rademacher"},
    "subspace": {"directions": "lora-fa", "seeds": "shared", "snapshot_every": 3},
    "private": {
        "seeds": "shared",
        "sigma": 0.5,
        "weighted": False,
        "optimizer": "sgd",
        "snapshot_every": 2,
    },
    # One seed of the head, which is less than the head itself.
    "small": {"seeds": "shared", "head_perturbations": 1, "snapshot_every": 2},
    "steps": {"upload": "steps", "local_steps": 2, "seeds": "pool", "pool_size": 64},
    "weights": {"upload": "weights", "local_steps": 2, "split": True, "snapshot_every": 2},
}


def make(**changes: Any) -> FederationConfig:
    defaults: dict[str, Any] = {
        "rounds": 4,
        "per_round": 3,
        "perturbations": 4,
        "head_perturbations": 3,
        "learning_rate": 0.05,
        "client_learning_rate": 0.05,
        "snapshot_every": 100,
        "seed": 3,
    }
    return FederationConfig(**{**defaults, **changes})


def create(
    path: Path, *, head: Head | None = HEAD_OF_2, secret: int = 77, **changes: Any
) -> Ledger:
    lora = LoRAConfig(rank=2, targets=("attn_q",))
    adapter = Adapter.create("llama", SHAPES, lora, 1, cpu, head)
    meta = Meta.of(make(**changes), adapter, 1, {"model": "toy"}, secret)
    return fast(Ledger.create(path, meta))


def reopen(path: Path) -> Ledger:
    return fast(Ledger(path, writable=True))


def fast(ledger: Ledger) -> Ledger:
    """Without waiting for the disk, which only a power cut would find out."""
    ledger._db.execute("PRAGMA synchronous = OFF")
    return ledger


# Clients and a run of them


def contribution(replica: Replica, assignment: Assignment) -> Report:
    """What an honest client answers from the server's state."""
    a, config, space = assignment, replica.config, replica.space
    directions = space.directions(a.layers)
    optimum = np.random.default_rng(a.client).standard_normal(len(replica.theta)) / 2
    theta = replica.theta.astype(np.float64)
    start = theta.copy()
    n = space.adapter.n_lora
    slopes, heads = [], []
    for seeds, head_seeds in zip(a.seeds, a.head_seeds, strict=True):
        slope = (theta - optimum).astype(np.float32)
        gradient = np.concatenate([directions.project(slope[:n]), slope[n:]])
        slopes.append(space.dot(gradient, a.layers, seeds).astype(np.float32))
        heads.append(space.dot(gradient, HEAD, head_seeds).astype(np.float32))
        estimate = np.zeros(space.size, np.float32)
        space.add(estimate, a.layers, seeds, slopes[-1] / np.float32(len(seeds)))
        if len(head_seeds):
            space.add(estimate, HEAD, head_seeds, heads[-1] / np.float32(len(head_seeds)))
        rate = config.client_learning_rate
        theta[:n] -= rate * directions.expand(estimate[: space.n_coordinates])
        theta[n:] -= rate * estimate[space.n_coordinates :]
    common = a.round, a.part, config.batch_size * config.local_steps - a.client, 10, 1.0, 0.5
    if config.upload == "weights":
        none = np.zeros((0, 0), np.float32)
        moved = (start - theta).astype(np.float32)
        return Report(*common, none, none, space.pack(moved, a.layers))
    return Report(*common, np.stack(slopes), np.stack(heads))


def message(server: Server, assignment: Assignment) -> bytes:
    return wire.encode_report(contribution(server.replica, assignment))


Answers = Callable[[Assignment], bool]


def everybody(assignment: Assignment) -> bool:
    return True


def some(assignment: Assignment) -> bool:
    """Client 2 never answers, and client 4 only in odd rounds."""
    return assignment.client != 2 and (assignment.client != 4 or assignment.round % 2 == 1)


def operations(server: Server, answers: Answers = everybody) -> Iterator[None]:
    """A run to its end, with a stop after everything that is written."""
    while not server.done:
        asked = server.open_part(range(N_CLIENTS), float(server.round))
        yield
        for assignment in asked:
            if answers(assignment):
                assert server.receive(assignment.client, message(server, assignment), 1.0) is None
                yield
        server.close_part(float(server.round))
        yield


def step(server: Server, answers: Answers = everybody) -> tuple[str, Callable[[], object]]:
    """What comes next in a run, for a server that may be new."""
    if server.part < 0:
        return "open", lambda: server.open_part(range(N_CLIENTS), 0.0)
    asked = [a for a in server.open_part(range(N_CLIENTS), 0.0) if answers(a)]
    if asked:
        data = message(server, asked[0])
        return "receive", lambda: server.receive(asked[0].client, data, 1.0)
    return "close", lambda: server.close_part(0.0)


def proceed(server: Server, answers: Answers = everybody) -> None:
    name, act = step(server, answers)
    # That a part ended without ending its round is not written down.
    if act() is None and name == "close":
        server.open_part(range(N_CLIENTS), 0.0)


def finish(server: Server, answers: Answers = everybody) -> bytes:
    for _ in operations(server, answers):
        pass
    return server.replica.theta.tobytes()


def final(folder: Path, answers: Answers = everybody, **changes: Any) -> bytes:
    """The adapter of a run that nothing interrupts."""
    with create(folder / "uninterrupted", **changes) as ledger:
        return finish(Server(ledger), answers)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


# Opening


def test_meta_comes_back(path: Path) -> None:
    with create(path, split=True) as ledger:
        meta = ledger.meta
    with Ledger(path) as ledger:
        assert ledger.meta == meta
        assert ledger.meta.config == make(split=True)
        assert ledger.meta.head == Head(("a", "b"), 3)
    assert Meta.from_json(meta.to_json()) == meta


def test_a_second_writer_is_refused(path: Path) -> None:
    with create(path):
        with pytest.raises(LedgerError, match="in use by another process"):
            Ledger(path, writable=True)
        with Ledger(path) as reader:
            assert reader.n_rounds == 0
    with Ledger(path, writable=True) as ledger:
        assert ledger.n_rounds == 0


def test_creating_waits_for_nobody_who_holds_the_lock(path: Path) -> None:
    held = lock(path.with_name(path.name + ".lock"))
    with pytest.raises(LedgerError, match="in use by another process"):
        create(path)
    assert not path.exists()
    held.close()
    create(path).close()


def test_of_many_that_create_at_once_only_one_has_it(path: Path) -> None:
    start = threading.Barrier(8)

    def attempt(_: int) -> Ledger | str:
        start.wait()
        try:
            return create(path)
        except LedgerError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(attempt, range(8)))
    made = [one for one in found if isinstance(one, Ledger)]
    assert len(made) <= 1
    for words in found:
        assert isinstance(words, Ledger) or re.search("in use|already holds", words)
    for ledger in made:
        ledger.close()
    assert [file.name for file in path.parent.glob(".*")] == []
    with Ledger(path) as ledger:
        verify(ledger)


def test_a_reader_cannot_write(path: Path) -> None:
    create(path).close()
    with Ledger(path) as reader, pytest.raises(LedgerError):
        reader.accept(0, 0, 0, 0.0, b"x")


def test_nobody_else_may_read_it(path: Path) -> None:
    with create(path) as ledger:
        finish(Server(ledger))
        for file in path.parent.glob("ledger.sqlite*"):
            if file.stat().st_size and not file.name.endswith(".lock"):
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_what_is_there_is_not_overwritten(path: Path) -> None:
    path.write_bytes(b"something dear")
    with pytest.raises(LedgerError, match="already holds a run"):
        create(path)
    assert path.read_bytes() == b"something dear"


def test_a_ledger_appears_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(LedgerError, match="cannot write"):
            create(path)
    with monkeypatch.context() as patched:
        patched.setattr("fwdllm.protocol.ledger._SCHEMA", "CREATE TABLE nonsense;")
        with pytest.raises(LedgerError, match="cannot write"):
            create(path)
    assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite.lock"]
    create(path).close()


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0" + bytes(200)])
def test_other_files_are_no_ledgers(path: Path, content: bytes) -> None:
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger(path)
    path.write_bytes(content)
    for writable in (False, True):
        with pytest.raises(LedgerError):
            Ledger(path, writable=writable)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format": 1', '"format": 2'),
        ('"layout_version": 1', '"layout_version": 9'),
        ('"rounds": 4', '"rounds": -4'),
        ('"rounds": 4', '"rownds": 4'),
        ('"rank": 2', '"rank": "two"'),
        ('"config": {', '"config": 3, "other": {'),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(path: Path, old: str, new: str) -> None:
    create(path).close()
    change(path, "UPDATE meta SET json = replace(json, ?, ?)", old, new)
    with pytest.raises(LedgerError, match="no ledger this version reads"):
        Ledger(path)


def change(path: Path, query: str, *values: object) -> None:
    with sqlite3.connect(path) as db:
        assert db.execute(query, values).rowcount > 0
    db.close()


# kill -9


@pytest.mark.parametrize("count", [1, 2])
def test_what_was_accepted_survives_a_kill(path: Path, tmp_path: Path, count: int) -> None:
    create(path).close()
    done = subprocess.run([sys.executable, __file__, path, str(count)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    said = [line.split() for line in done.stdout.decode().splitlines()]
    assert len(said) == count
    with Ledger(path, writable=True) as ledger:
        kept = ledger.contributions(0, 0)
        assert sorted(kept) == sorted((int(c), bytes.fromhex(data)) for c, data in said)
        assert finish(Server(ledger)) == final(tmp_path)
        verify(ledger)


def accept_and_die(path: Path, count: int) -> None:
    server = Server(Ledger(path, writable=True))
    for assignment in server.open_part(range(N_CLIENTS), 0.0)[:count]:
        data = message(server, assignment)
        print(assignment.client, data.hex(), flush=True)
        assert server.receive(assignment.client, data, 1.0) is None
    os.kill(os.getpid(), signal.SIGKILL)


# Resuming and replaying


@pytest.mark.parametrize("name", RUNS)
def test_a_run_made_anew_after_every_write_comes_to_the_same_bits(
    name: str, path: Path, tmp_path: Path
) -> None:
    """open_part, receive and close_part are each the last thing that one server does."""
    want = final(tmp_path, some, **RUNS[name])
    create(path, **RUNS[name]).close()
    for _ in range(200):
        with reopen(path) as ledger:
            if Server(ledger).done:
                break
            proceed(Server(ledger), some)
    with Ledger(path) as ledger:
        assert Server(ledger).replica.theta.tobytes() == want
        assert replay(ledger).theta.tobytes() == want
        verify(ledger)


@pytest.mark.parametrize("name", ["paced", "weights", "private"])
def test_a_run_interrupted_anywhere_comes_to_the_same_bits(name: str, tmp_path: Path) -> None:
    changes = {**RUNS[name], "rounds": 2, "snapshot_every": 1}
    want = final(tmp_path, **changes)
    at = 0
    while True:
        path = tmp_path / str(at)
        with create(path, **changes) as ledger:
            for i, _ in enumerate(operations(Server(ledger))):
                if i == at:
                    break
            else:
                break
        with reopen(path) as ledger:
            assert finish(Server(ledger)) == want
            verify(ledger)
        at += 1
    assert at > 5


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("answers", [everybody, some])
def test_replaying_gives_the_servers_adapter_and_its_state(
    name: str, answers: Answers, path: Path
) -> None:
    with create(path, **RUNS[name]) as ledger:
        server = Server(ledger)
        start = server.replica.theta.copy()
        finish(server, answers)
        assert not np.array_equal(server.replica.theta, start)
        seen: list[bytes] = []
        replica = replay(ledger, lambda closed: seen.append(closed.theta))
        assert len(set(seen)) == len(seen) == 4
        assert seen[-1] == theta_hash(server.replica.theta)
        for other in (replica, Server(ledger).replica):
            got, want = other.to_arrays(), server.replica.to_arrays()
            assert got.keys() == want.keys()
            assert all(got[k].tobytes() == want[k].tobytes() for k in want)
        verify(ledger)


def test_a_run_learns(path: Path) -> None:
    with create(path, rounds=60, per_round=6, perturbations=16, schedule="constant") as ledger:
        server = Server(ledger)
        optima = [np.random.default_rng(c).standard_normal(len(server.replica.theta)) / 2
                  for c in range(N_CLIENTS)]  # fmt: skip
        best = np.average(optima, axis=0, weights=[8 - c for c in range(N_CLIENTS)])
        before = np.linalg.norm(server.replica.theta - best)
        finish(server)
        assert np.linalg.norm(server.replica.theta - best) < before / 3


# Tampering


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


# What is not taken


def refused(server: Server, client: int, data: bytes, reason: str) -> None:
    before = [server.ledger.contributions(server.round, part) for part in range(3)]
    found = server.receive(client, data, 2.0)
    assert found is not None
    assert re.search(reason, found), found
    assert [server.ledger.contributions(server.round, part) for part in range(3)] == before
    rejections = server.ledger.rejections()
    assert (client, found) in [rejection[2:] for rejection in rejections]
    assert server.receive(client, data, 2.0) == found
    assert server.ledger.rejections() == rejections  # many of the same are one


def test_bad_reports_are_refused_with_a_reason_and_the_run_goes_on_as_without(
    path: Path, tmp_path: Path
) -> None:
    with create(path) as ledger:
        server = Server(ledger)
        old: dict[int, bytes] = {}
        while not server.done:
            asked = server.open_part(range(N_CLIENTS), 0.0)
            stranger = next(c for c in range(N_CLIENTS) if c not in {a.client for a in asked})
            for a in asked:
                attack(server, a, stranger, old.get(a.client))
                assert server.receive(a.client, message(server, a), 1.0) is None
                refused(server, a.client, message(server, a), "^duplicate$")
                old[a.client] = message(server, a)
            server.close_part(0.0)
        assert server.replica.theta.tobytes() == final(tmp_path)
        verify(ledger)
        replay(ledger)


def attack(server: Server, a: Assignment, stranger: int, old: bytes | None) -> None:
    """Whatever a client and a stranger may send before the client's honest report."""
    honest = contribution(server.replica, a)

    def send(reason: str, client: int = a.client, **changes: Any) -> None:
        refused(server, client, wire.encode_report(replace(honest, **changes)), reason)

    def with_one(name: str, value: float) -> dict[str, np.ndarray]:
        values = getattr(honest, name).copy()
        values[0, -1] = value
        return {name: values}

    for value, words in [(np.nan, "not finite"), (np.inf, "not finite"), (1e30, "beyond 10000")]:
        send(f"^a derivative.* {words}", **with_one("derivatives", value))
        send(f"^a head derivative.* {words}", **with_one("head_derivatives", value))
    for loss in (np.nan, np.inf, -np.inf, 1e300, 1.1e4, -1.1e4):
        with np.errstate(over="ignore"):
            send(
                f"^a loss of {np.float32(loss):.3g} is beyond 10000$".replace("+", "[+]"), loss=loss
            )
    for seconds in (np.nan, np.inf, -np.inf, 1e300, -1.0):
        send("^-?(nan|inf|1.0) seconds are no time$", seconds=seconds)
    for n in (0, 2**32 - 1):
        send(f"^{n} examples", n_examples=n)
    send("^malformed", derivatives=honest.derivatives[:, 1:])
    send("^malformed", derivatives=np.tile(honest.derivatives, 2))
    send("^malformed", derivatives=honest.derivatives.T, head_derivatives=np.zeros((4, 0)))
    none = np.zeros((0, 0), np.float32)
    send("^malformed", derivatives=none, head_derivatives=none, vector=np.ones(3, np.float32))
    send("^foreign", client=stranger)
    send("^foreign", client=10**9)
    send("^foreign", round=a.round + 1)
    send("^foreign", part=5)
    good = wire.encode_report(honest)
    random = np.random.default_rng(a.client)
    for data in (b"", b"\0", random.bytes(50), good[:-1], wire.encode_assignment(a)):
        refused(server, a.client, data, "^malformed")
    refused(server, a.client, good + b"\0", "^malformed: .* instead of at most")
    if old is not None:
        refused(server, a.client, old, "^replayed$")


def test_a_gigabyte_is_refused_by_its_size(path: Path) -> None:
    with create(path) as ledger:
        server = Server(ledger)
        client = server.open_part(range(N_CLIENTS), 0.0)[0].client
        refused(server, client, bytes(2**30), "^malformed: 1073741824 bytes")


def test_weights_are_refused_alike(path: Path) -> None:
    with create(path, upload="weights") as ledger:
        server = Server(ledger)
        a = server.open_part(range(N_CLIENTS), 0.0)[0]
        honest = contribution(server.replica, a)
        assert honest.vector is not None
        for value, words in [(np.nan, "not finite"), (-np.inf, "not finite"), (1e30, "beyond")]:
            vector = honest.vector.copy()
            vector[3] = value
            data = wire.encode_report(replace(honest, vector=vector))
            refused(server, a.client, data, f"^a weight.* {words}")
        for vector in (honest.vector[1:], honest.vector[:0]):
            data = wire.encode_report(replace(honest, vector=vector))
            refused(server, a.client, data, "^malformed")
        scalars = np.ones((1, 4), np.float32)
        data = wire.encode_report(replace(honest, derivatives=scalars,
                                          head_derivatives=scalars, vector=None))  # fmt: skip
        refused(server, a.client, data, "^malformed")


def test_late_reports_are_refused(path: Path) -> None:
    with create(path, quorum=0.5) as ledger:
        server = Server(ledger)
        *in_time, slow = server.open_part(range(N_CLIENTS), 0.0)
        late = message(server, slow)
        for a in in_time:
            server.receive(a.client, message(server, a), 1.0)
        assert server.close_part(10.0) is not None
        refused(server, slow.client, late, "^late$")
        server.open_part(range(N_CLIENTS), 11.0)
        assert server.receive(slow.client, late, 12.0) == "late"


def test_reports_for_a_part_that_did_not_reach_its_quorum_are_late(path: Path) -> None:
    with create(path, quorum=1.0) as ledger:
        server = Server(ledger)
        first, slow, _ = server.open_part(range(N_CLIENTS), 0.0)
        server.receive(first.client, message(server, first), 1.0)
        late = message(server, slow)
        assert server.close_part(10.0) is None
        refused(server, slow.client, late, "^late$")
        refused(server, first.client, message(server, first), "^(duplicate|replayed)$")
        server.open_part(range(N_CLIENTS), 11.0)
        assert server.receive(slow.client, late, 12.0) == "late"
        assert server.receive(first.client, message(server, first), 12.0) == "replayed"


# Bringing clients up to date


@pytest.mark.parametrize("name", RUNS)
def test_clients_follow_the_server_by_what_it_sends(name: str, path: Path) -> None:
    with create(path, **RUNS[name], rounds=12) as ledger:
        server = Server(ledger)
        replicas: dict[int, Replica] = {}
        kinds = set()
        state = server.replica.to_arrays()
        state.pop("gradient", None)
        most = len(wire.encode_many([wire.encode_state(state)]))
        while not server.done:
            for a in server.open_part(range(N_CLIENTS), 0.0):
                if server.round in (3, 6) and a.client in replicas:
                    del replicas[a.client]
                    server.forget(a.client)
                sent = server.synchronize(a.client)
                assert len(sent) == server.synchronization_size(a.client)
                assert len(sent) <= most
                kinds.add(any(map(wire.is_state, wire.decode_many(sent))))
                replica = replicas.setdefault(
                    a.client, Replica(server.config, ledger.meta.empty_adapter())
                )
                follow(replica, sent)
                assert replica.round == server.round
                assert replica.theta.tobytes() == server.replica.theta.tobytes()
                if some(a):
                    server.receive(a.client, wire.encode_report(contribution(replica, a)), 1.0)
            server.close_part(0.0)
        assert kinds == {True, False}


def follow(replica: Replica, sent: bytes) -> None:
    for data in wire.decode_many(sent):
        if wire.is_state(data):
            replica.load_arrays(wire.decode_state(data))
            continue
        update = wire.decode_update(data)
        if update.round >= replica.round:  # it had no answer accepted since
            replica.apply(update)


@pytest.mark.parametrize(
    ("labels", "head_perturbations", "is_dense"),
    # Three clients with seeds of their own: 9 seeds take as many bytes as 27 parameters.
    [("abc", 3, False), ("abc", 4, True), ("abc", 64, True), ("ab", 3, True), ("abcd", 3, False)],
)
@pytest.mark.parametrize("changes", [{}, {"split": True}, RUNS["paced"]], ids=str)
def test_a_head_travels_in_the_smaller_form_and_all_have_the_same_bits(
    path: Path, labels: str, head_perturbations: int, is_dense: bool, changes: dict[str, Any]
) -> None:
    head, paced = Head(tuple(labels), 8), "pacing" in changes
    settings = {"head_perturbations": head_perturbations, "snapshot_every": 3, **changes}
    with create(path, head=head, **settings) as ledger:
        server = Server(ledger)
        n_head = server.replica.space.adapter.n_head
        client = Replica(server.config, ledger.meta.empty_adapter())
        for _ in operations(server):
            if server.round == client.round:
                continue
            data = ledger.rounds()[-1].message or b""
            update = wire.decode_update(data)
            of_head = [term for term in update.terms if term.layers == HEAD]
            n_parts = len(ledger.parts(update.round))
            n_seeds = 3 * head_perturbations * n_parts
            assert (update.head is not None) == (12 * n_seeds > 4 * n_head)
            if n_parts == 1:
                assert (update.head is not None) == is_dense
            if update.head is None:
                assert sum(len(term.seeds) for term in of_head) == n_seeds
            else:
                assert of_head == []
                assert update.head.shape == (n_head,)
            client.apply(update)
            assert client.gradient is not None
            assert server.replica.gradient is not None
            assert client.gradient.tobytes() == server.replica.gradient.tobytes()
            got, want = client.to_arrays(), server.replica.to_arrays()
            assert got.keys() == want.keys()
            assert all(got[k].tobytes() == want[k].tobytes() for k in want)
        assert client.round == 4
        n_parts_of = [len(ledger.parts(round)) for round in range(4)]
        assert (max(n_parts_of) > 1) == paced
        for other in (replay(ledger), Server(ledger).replica):
            assert other.theta.tobytes() == client.theta.tobytes()
        verify(ledger)


def test_a_run_without_a_head_is_followed(path: Path) -> None:
    with create(path, head=None) as ledger:
        server = Server(ledger)
        client = Replica(server.config, ledger.meta.empty_adapter())
        finish(server)
        follow(client, wire.encode_many([r.message or b"" for r in ledger.rounds()]))
        assert client.theta.tobytes() == server.replica.theta.tobytes()
        assert replay(ledger).theta.tobytes() == server.replica.theta.tobytes()


@pytest.mark.parametrize("name", ["theta", "round"])
def test_a_state_that_lacks_something_is_no_state(path: Path, name: str) -> None:
    with create(path) as ledger:
        replica = Server(ledger).replica
        arrays = replica.to_arrays()
        del arrays[name]
        with pytest.raises(ValueError, match=f"^a state has no {name}$"):
            replica.load_arrays(arrays)


def test_a_client_that_is_up_to_date_is_sent_nothing(path: Path) -> None:
    with create(
        path, rounds=2, per_round=N_CLIENTS, pacing=True, variance_threshold=1e-9
    ) as ledger:
        server = Server(ledger)
        for a in server.open_part(range(N_CLIENTS), 0.0):
            assert wire.decode_many(server.synchronize(a.client)) == []
            server.receive(a.client, message(server, a), 1.0)
        assert server.close_part(0.0) is None
        for a in server.open_part(range(N_CLIENTS), 0.0):
            assert wire.decode_many(server.synchronize(a.client)) == []


def test_what_was_sent_is_what_the_ledger_counts(path: Path) -> None:
    with create(path) as ledger:
        server = Server(ledger)
        down, up = [0] * 4, [0] * 4
        while not server.done:
            round = server.round
            for a in server.open_part(range(N_CLIENTS), 0.0):
                down[round] += len(wire.encode_assignment(a)) + len(server.synchronize(a.client))
                data = message(server, a)
                up[round] += len(data)
                server.receive(a.client, data, 1.0)
            server.close_part(0.0)
        assert ledger.traffic() == [(r, 3, down[r], up[r]) for r in range(4)]


def test_bytes_of_refused_reports_are_counted(path: Path) -> None:
    with create(path, rounds=1) as ledger:
        server = Server(ledger)
        up = dict.fromkeys(range(N_CLIENTS), 0)
        asked = server.open_part(range(N_CLIENTS), 0.0)
        for a in asked[:2]:
            for data in (b"nonsense", b"more nonsense", message(server, a), message(server, a)):
                server.receive(a.client, data, 1.0)
                up[a.client] += len(data)
        server.receive(asked[2].client, b"no", 1.0)
        up[asked[2].client] += 2
        server.close_part(0.0)
        ((_, n_asked, _, found),) = ledger.traffic()
        assert (n_asked, found) == (3, sum(up.values()))
        assert {row[0]: row[4] for row in ledger.traffic_by_client()} == {
            a.client: up[a.client] for a in asked
        }


# Who does not answer


@pytest.mark.parametrize(
    ("quorum", "n_answers", "goes_on"),
    [(0.5, 2, False), (0.5, 1, True), (1.0, 3, False), (1.0, 2, True), (0.01, 1, False),
     (0.01, 0, True)],
)  # fmt: skip
def test_a_part_below_its_quorum_opens_another(
    path: Path, quorum: float, n_answers: int, goes_on: bool
) -> None:
    with create(path, quorum=quorum) as ledger:
        server = Server(ledger)
        asked = server.open_part(range(N_CLIENTS), 0.0)
        for a in asked[:n_answers]:
            server.receive(a.client, message(server, a), 1.0)
        closed = server.close_part(0.0)
        assert (closed is None) == goes_on
        if goes_on:
            assert server.round == 0
            others = server.open_part(range(N_CLIENTS), 1.0)
            assert server.part == 1
            assert not {a.client for a in asked} & {a.client for a in others}


def test_a_quorum_is_a_share_of_exact_numbers(path: Path) -> None:
    with create(path, quorum=0.28, per_round=25) as ledger:
        server = Server(ledger)
        for a in server.open_part(range(25), 0.0)[:7]:
            if a.client < 8:  # of more, the toy would claim no examples
                data = message(server, a)
            else:
                data = wire.encode_report(replace(contribution(server.replica, a), n_examples=1))
            assert server.receive(a.client, data, 1.0) is None
        assert server.close_part(0.0) is not None


def test_a_round_without_any_answer_ends_and_changes_nothing(path: Path) -> None:
    with create(path, max_parts=2, rounds=1) as ledger:
        server = Server(ledger)
        before = server.replica.theta.tobytes()
        for _ in range(2):
            assert len(server.open_part(range(N_CLIENTS), 0.0)) == 3
            closed = server.close_part(0.0)
        assert closed is not None
        assert (closed.round, closed.parts, closed.n_asked, closed.n_accepted) == (1, 2, 6, 0)
        assert (closed.loss, closed.variance, closed.moved) == (None, None, False)
        assert server.done
        assert server.replica.theta.tobytes() == before
        verify(ledger)
        assert replay(ledger).theta.tobytes() == before


@pytest.mark.parametrize("n_there", [N_CLIENTS, 2])
def test_a_private_round_without_any_answer_moves_by_its_noise(path: Path, n_there: int) -> None:
    """And clients, replays and new servers follow, whoever was there."""
    with create(path, **RUNS["private"], max_parts=1) as ledger:
        server = Server(ledger)
        client = Replica(server.config, ledger.meta.empty_adapter())
        while not server.done:
            before = server.replica.theta.copy()
            server.open_part(range(n_there), 0.0)
            closed = server.close_part(0.0)
            assert closed is not None
            assert (closed.n_accepted, closed.moved) == (0, True)
            assert (server.replica.theta != before).all()
            follow(client, wire.encode_many([ledger.rounds()[-1].message or b""]))
            assert client.theta.tobytes() == server.replica.theta.tobytes()
        verify(ledger)
        assert replay(ledger).theta.tobytes() == server.replica.theta.tobytes()
        assert Server(ledger).replica.theta.tobytes() == server.replica.theta.tobytes()


def test_who_takes_part_in_a_private_run_is_drawn_by_the_ledgers_secret(tmp_path: Path) -> None:
    def asked(name: str, **changes: Any) -> list[list[int]]:
        found = []
        with create(tmp_path / name, **RUNS["private"], **changes, max_parts=1) as ledger:
            server = Server(ledger)
            while not server.done:
                found.append([a.client for a in server.open_part(range(40), 0.0)])
                server.close_part(0.0)
            noise = int(ledger.meta.noise_seed)
        assert found == [choose(make(**RUNS["private"]), r, 0, range(40), {}, noise)
                         for r in range(4)]  # fmt: skip
        return found

    first = asked("first", secret=1)
    assert asked("other secret", secret=2) != first
    assert asked("other seed", secret=1, seed=99) == first


def test_parts_ask_the_least_asked_of_those_who_are_there(path: Path) -> None:
    with create(path, quorum=1.0, max_parts=5) as ledger:
        server = Server(ledger)

        def part(*there: int) -> set[int]:
            found = {a.client for a in server.open_part(there, 0.0)}
            assert {a.client for a in Server(ledger).open_part(there, 0.0)} == found
            server.close_part(0.0)
            return found

        assert part(0, 1, 2, 3) < {0, 1, 2, 3}
        fourth = {0, 1, 2, 3} - {client for client, _ in ledger.assignments(0, 0)}
        assert part(*range(N_CLIENTS)) == {*fourth, 4, 5}
        assert part(0, 1) == {0, 1}
        # 0 and 1 have been asked twice now, or once if one of them was the fourth.
        times = Counter(c for p in range(3) for c, _ in ledger.assignments(0, p))
        found = part(*range(N_CLIENTS))
        left = set(range(N_CLIENTS)) - found
        assert max(times[c] for c in found) <= min(times[c] for c in left)
        assert server.part == 3


def test_parts_are_opened_and_closed_in_turn(path: Path) -> None:
    with create(path, rounds=1, quorum=1.0, max_parts=2) as ledger:
        server = Server(ledger)
        with pytest.raises(ValueError, match="no open part"):
            server.close_part(0.0)
        server.open_part(range(N_CLIENTS), 0.0)
        assert server.close_part(0.0) is None
        with pytest.raises(ValueError, match="no open part"):
            server.close_part(0.0)
        server.open_part(range(N_CLIENTS), 0.0)
        assert server.part == 1
        assert server.close_part(0.0) is not None
        assert server.done
        for one in (server, Server(ledger)):
            with pytest.raises(ValueError, match="all rounds are done"):
                one.open_part(range(N_CLIENTS), 0.0)
            with pytest.raises(ValueError, match="no open part"):
                one.close_part(0.0)
        assert ledger.parts(1) == []


def test_a_vanished_client_costs_only_its_share(path: Path) -> None:
    """The step is the mean over those who answered, as if nobody else had been asked."""
    with create(path, rounds=1, optimizer="sgd", weighted=False, learning_rate=1.0) as ledger:
        server = Server(ledger)
        before = server.replica.theta.astype(np.float64)
        asked = server.open_part(range(N_CLIENTS), 0.0)
        n = server.replica.space.adapter.n_lora
        want = np.zeros(len(before))
        for a in asked[:2]:
            report = contribution(server.replica, a)
            server.receive(a.client, wire.encode_report(report), 1.0)
            for seed, slope in zip(a.seeds[0], report.derivatives[0], strict=True):
                want[:n] += slope * cpu.normal(int(seed), 0, n) / 4 / 2
            for seed, slope in zip(a.head_seeds[0], report.head_derivatives[0], strict=True):
                want[n:] += slope * cpu.normal(int(seed), n, len(want) - n) / 3 / 2
        closed = server.close_part(0.0)
        assert closed is not None
        assert (closed.n_asked, closed.n_accepted, closed.n_perturbations) == (3, 2, 8)
        np.testing.assert_allclose(server.replica.theta, before - want, rtol=1e-5, atol=1e-5)


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


if __name__ == "__main__":
    accept_and_die(Path(sys.argv[1]), int(sys.argv[2]))


def test_a_round_that_is_missing_is_named_also_where_a_snapshot_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with create(path, rounds=3, snapshot_every=2) as ledger:
        finish(Server(ledger))
    change(path, "DELETE FROM round WHERE round = 1")
    with Ledger(path) as ledger, pytest.raises(LedgerError, match="round 2 is missing"):
        verify(ledger)


def test_a_ledger_cannot_be_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot"):
        create(tmp_path / "no folder" / "ledger")


def test_a_private_round_for_which_nobody_is_there_can_be_followed(tmp_path: Path) -> None:
    with create(tmp_path / "ledger", **RUNS["private"], max_parts=1) as ledger:
        server = Server(ledger)
        client = Replica(server.config, ledger.meta.empty_adapter())
        while not server.done:
            server.open_part(range(N_CLIENTS if server.round % 2 else 0), 0.0)
            assert server.close_part(0.0) is not None
            follow(client, wire.encode_many([ledger.rounds()[-1].message or b""]))
            assert client.theta.tobytes() == server.replica.theta.tobytes()


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
