"""Resuming a run and replaying it from its ledger: the same bits as without a break."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ledger_runs import (
    N_CLIENTS,
    RUNS,
    Answers,
    create,
    everybody,
    final,
    finish,
    operations,
    path,
    proceed,
    reopen,
    some,
)

from fwdllm.protocol.ledger import Ledger, theta_hash
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture


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
