"""Runs of a federation over a ledger whose clients have losses of their own that need no model.

They are quadratic: the gradient of client c's loss at theta is theta minus c's own optimum. Run as
a script it accepts contributions and kills itself, for the test that looks what is left:
``python ledger_runs.py LEDGER COUNT``.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import cpu
from fwdllm.protocol import wire
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.report import Report
from fwdllm.protocol.server import Server
from fwdllm.protocol.space import HEAD

N_CLIENTS = 6
HEAD_OF_2 = Head(("a", "b"), 3)
SHAPES = {f"blk.{layer}.attn_q": (4, 6) for layer in range(3)}
PROJECTION = {"upload": "projection", "local_steps": 2, "method": "backprop"}
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
    "weighted pool": {
        "upload": "steps",
        "local_steps": 2,
        "seeds": "weighted-pool",
        "pool_size": 16,
        "snapshot_every": 2,
    },
    "projection": {**PROJECTION, "split": True, "snapshot_every": 2},
    "shared projection": {**PROJECTION, "seeds": "shared", "aggregate": "median"},
    # Snapshots between the rounds that choose, when their sums are not complete.
    "sparse": {
        "directions": "sparse",
        "keep": 0.5,
        "reselect": 8,
        "split": True,
        "snapshot_every": 1,
    },
    "spiel": {
        "directions": "spiel",
        "keep": 0.9,
        "reselect": 2,
        "optimizer": "yogi",
        "snapshot_every": 3,
    },
    "weights": {"upload": "weights", "local_steps": 2, "split": True, "snapshot_every": 2},
    "bounded": {"aggregate": "bounded", "split": True},
    "screened": {"aggregate": "screened", "head_perturbations": 8, "snapshot_every": 2},
    "screened, paced": {
        "aggregate": "screened",
        "perturbations": 8,
        "pacing": True,
        "variance_threshold": 0.05,
        "max_parts": 3,
    },
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


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def change(path: Path, query: str, *values: object) -> None:
    with sqlite3.connect(path) as db:
        assert db.execute(query, values).rowcount > 0
    db.close()


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
    projects = config.upload == "projection"
    for step in range(config.local_steps):
        seeds, head_seeds = a.seeds[0 if projects else step], a.head_seeds[0 if projects else step]
        slope = (theta - optimum).astype(np.float32)
        gradient = np.concatenate([directions.project(slope[:n]), slope[n:]])
        slopes.append(space.dot(gradient, a.layers, seeds).astype(np.float32))
        heads.append(space.dot(gradient, HEAD, head_seeds).astype(np.float32))
        estimate = np.zeros(space.size, np.float32)
        if projects:
            estimate = gradient
        else:
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
    if projects:
        moved = (start - theta).astype(np.float32)
        moved = np.concatenate([directions.project(moved[:n]), moved[n:]])
        slopes = [space.dot(moved, a.layers, a.seeds[0]).astype(np.float32)]
        heads = [space.dot(moved, HEAD, a.head_seeds[0]).astype(np.float32)]
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


def eventful(path: Path) -> None:
    """A run with a row in every table: nodes, evaluations, rejections and snapshots, too."""
    changes = {"rounds": 3, "snapshot_every": 2, "per_round": 2, "perturbations": 2}
    with create(path, head_perturbations=1, **changes) as ledger:
        server = Server(ledger)
        ledger.client_of("north")
        ledger.client_of("south")
        ledger.evaluated(0, 1.5, 0.25, 8)
        while not server.done:
            now = 100.0 * server.round
            for a in server.open_part(range(N_CLIENTS), now):
                assert server.receive(a.client, b"nonsense", now + 0.5) is not None
                assert server.receive(a.client, message(server, a), now + 1.25) is None
            server.close_part(now + 2)
            ledger.evaluated(server.round, 1.25, 0.5, 8)


def follow(replica: Replica, sent: bytes) -> None:
    for data in wire.decode_many(sent):
        if wire.is_state(data):
            replica.load_arrays(wire.decode_state(data))
            continue
        update = wire.decode_update(data)
        if update.round >= replica.round:  # it had no answer accepted since
            replica.apply(update)


def accept_and_die(path: Path, count: int) -> None:
    server = Server(Ledger(path, writable=True))
    for assignment in server.open_part(range(N_CLIENTS), 0.0)[:count]:
        data = message(server, assignment)
        print(assignment.client, data.hex(), flush=True)
        assert server.receive(assignment.client, data, 1.0) is None
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    accept_and_die(Path(sys.argv[1]), int(sys.argv[2]))
