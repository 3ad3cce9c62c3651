"""Pools whose seeds are drawn by how large their slopes were, and what a state holds of them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger_runs import N_CLIENTS, RUNS, contribution, create, finish, make, message, path

from fwdllm.protocol import wire
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.plan import Assignment, plan_part
from fwdllm.protocol.pool import WeightedPool, pool_seeds
from fwdllm.protocol.replay import replay
from fwdllm.protocol.server import Server
from fwdllm.protocol.space import Space

__all__ = ["path"]  # a fixture

WEIGHTED: dict[str, Any] = RUNS["weighted pool"]
U64 = np.uint64


def pool_of(*seeds: int) -> WeightedPool:
    n = len(seeds)
    return WeightedPool(np.array(seeds, U64), np.zeros(n), np.zeros(n, np.int64))


def count(pool: WeightedPool, *found: tuple[int, float]) -> None:
    pool.count(np.array([s for s, _ in found], U64), np.array([x for _, x in found], np.float32))


# Probabilities


def test_probabilities_are_the_softmax_of_scaled_mean_amplitudes() -> None:
    pool = pool_of(70, 20, 50, 90)
    count(pool, (50, -3.0), (20, 1.0), (50, 5.0))
    count(pool, (70, 0.5))
    # Means with a first slope of zero: 0.5 / 2, 1 / 2, (3 + 5) / 3, 0 / 1. The largest becomes 1.
    powers = [math.exp(mean * 3 / 8) for mean in (0.25, 0.5, 8 / 3, 0)]
    want = [power / sum(powers) for power in powers]
    np.testing.assert_allclose(pool.probabilities(), want, rtol=1e-9)
    assert pool.draws.tolist() == [1, 1, 2, 0]
    assert pool.probabilities().max() / pool.probabilities().min() == pytest.approx(math.e)


def test_before_the_first_update_and_of_one_seed_all_are_as_likely() -> None:
    assert pool_of(3, 1, 2).probabilities().tolist() == [1 / 3] * 3
    one = pool_of(7)
    count(one, (7, 2.0))
    assert one.probabilities().tolist() == [1.0]


def test_seeds_are_picked_as_often_as_they_are_likely() -> None:
    pool = pool_of(70, 20, 50)
    count(pool, (50, 4.0), (20, 1.0))
    n = 1 << 12
    numbers = np.arange(n, dtype=U64) * U64(2**64 // n)
    picked = pool.pick(numbers).tolist()
    for seed, share in zip((70, 20, 50), pool.probabilities(), strict=True):
        assert abs(picked.count(seed) - share * n) <= 1
    assert pool.pick(np.array([[0], [2**64 - 1]], U64)).tolist() == [[70], [50]]
    half = np.array([2**63 - 2**11, 2**63], U64)
    assert pool_of(70, 20).pick(half).tolist() == [70, 20]


def test_seeds_of_another_pool_are_told() -> None:
    pool = pool_of(70, 20, 50)
    for seed in (0, 21, 71):
        with pytest.raises(ValueError, match="not of the pool"):
            count(pool, (20, 1.0), (seed, 1.0))


def test_a_state_of_another_pool_is_told() -> None:
    pool = pool_of(70, 20)
    for bad in (np.zeros(3), np.zeros(2, np.float32), np.zeros((1, 2))):
        with pytest.raises(ValueError, match="pool of 2 seeds"):
            pool.load(bad, np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="pool of 2 seeds"):
        pool.load(np.zeros(2), np.zeros(2))


# Plans


def plan(space: Space, pool: WeightedPool | None) -> list[Assignment]:
    return plan_part(space.config, space, 3, 0, range(N_CLIENTS), None, {}, 1, pool=pool)


def test_a_plan_is_a_function_of_the_pool_and_leaves_it_as_it_was(path: Path) -> None:
    with create(path, **{**WEIGHTED, "local_steps": 200}) as ledger:
        space = Server(ledger).replica.space
    pool = WeightedPool.of(space.config)
    rare, often = pool.seeds[2], pool.seeds[5]
    even = plan(space, pool)
    count(pool, *((int(seed), 1.0) for seed in pool.seeds), *((int(often), 99.0),) * 5)
    pool.amplitudes[2] = 0.0
    before = pool.amplitudes.tobytes(), pool.draws.tobytes()
    found, again = plan(space, pool), plan(space, replace(pool))
    assert (pool.amplitudes.tobytes(), pool.draws.tobytes()) == before
    assert [a.seeds.tobytes() for a in found] == [a.seeds.tobytes() for a in again]
    assert [a.seeds.tobytes() for a in found] != [a.seeds.tobytes() for a in even]
    assert [a.head_seeds.tobytes() for a in found] == [a.head_seeds.tobytes() for a in even]
    drawn = np.concatenate([a.seeds.ravel() for a in found])
    assert set(drawn.tolist()) <= set(pool_seeds(space.config).tolist())
    shares = [np.mean(drawn == seed) for seed in (rare, often)]
    np.testing.assert_allclose(shares, pool.probabilities()[[2, 5]], atol=0.02)
    assert shares[1] > 2 * shares[0]


# Runs


@pytest.mark.parametrize("changes", [{}, {"per_round": 1, "head_perturbations": 1}], ids=str)
def test_a_server_counts_what_clients_sent(path: Path, changes: dict[str, Any]) -> None:
    """Slopes by the clients' examples and rate, as they are in the updates.

    A single seed of a head goes down as a seed, and is no seed of the pool.
    """
    with create(path, **{**WEIGHTED, **changes}) as ledger:
        server = Server(ledger)
        amplitudes, draws = np.zeros(16), np.zeros(16, int)
        seeds = pool_seeds(server.config).tolist()
        while not server.done:
            for a in server.open_part(range(N_CLIENTS), 0.0):
                report = contribution(server.replica, a)
                weight = report.n_examples * server.config.client_learning_rate
                for seed, slope in zip(a.seeds.ravel(), report.derivatives.ravel(), strict=True):
                    amplitudes[seeds.index(int(seed))] += weight * abs(float(slope))
                    draws[seeds.index(int(seed))] += 1
                assert server.receive(a.client, wire.encode_report(report), 1.0) is None
            server.close_part(0.0)
        assert server.replica.pool is not None
        np.testing.assert_allclose(server.replica.pool.amplitudes, amplitudes, rtol=1e-5)
        assert server.replica.pool.draws.tolist() == draws.tolist()
        # Rounds, clients, steps, perturbations.
        assert draws.sum() == 4 * server.config.per_round * 2 * 4


def test_the_amplitudes_decide_what_is_asked_next(tmp_path: Path) -> None:
    """From the second round on; the first is drawn evenly."""
    asked = []
    for factor in (1.0, 3.0):
        with create(tmp_path / str(factor), **{**WEIGHTED, "local_steps": 50}) as ledger:
            server, found = Server(ledger), []
            for _ in range(2):
                plans = server.open_part(range(N_CLIENTS), 0.0)
                found.append(b"".join(a.seeds.tobytes() for a in plans))
                for a in plans:
                    report = contribution(server.replica, a)
                    some = report.derivatives.copy()
                    some[::2] *= np.float32(factor)
                    data = wire.encode_report(replace(report, derivatives=some))
                    assert server.receive(a.client, data, 1.0) is None
                server.close_part(0.0)
            asked.append(found)
    assert asked[0][0] == asked[1][0]
    assert asked[0][1] != asked[1][1]


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_server_made_again_asks_for_the_same(path: Path, tmp_path: Path, stop: int) -> None:
    """From the snapshot after two rounds, or from updates alone."""
    with create(tmp_path / "other", **WEIGHTED) as ledger:
        want = finish(Server(ledger))
    with create(path, **WEIGHTED) as ledger:
        server = Server(ledger)
        while server.round < stop:
            for a in server.open_part(range(N_CLIENTS), 0.0):
                server.receive(a.client, message(server, a), 1.0)
            server.close_part(float(server.round))
        again = Server(ledger)
        assert again.replica.pool is not None and server.replica.pool is not None
        assert again.replica.pool.amplitudes.tobytes() == server.replica.pool.amplitudes.tobytes()
        assert again.replica.pool.draws.tobytes() == server.replica.pool.draws.tobytes()
        assert finish(again) == want
    with Ledger(path) as ledger:
        found = replay(ledger)
        assert found.theta.tobytes() == want
        assert found.pool is not None
        assert found.pool.amplitudes.tobytes() == again.replica.pool.amplitudes.tobytes()


def test_clients_are_not_sent_what_only_the_server_needs(path: Path) -> None:
    with create(path, **WEIGHTED) as ledger:
        server = Server(ledger)
        finish(server)
        assert {"amplitudes", "draws"} <= server.replica.to_arrays().keys()
        state = wire.decode_state(wire.encode_state(server.replica.to_arrays(public=True)))
        assert not {"amplitudes", "draws", "gradient"} & state.keys()
        client = type(server.replica)(server.config, ledger.meta.empty_adapter())
        client.load_arrays(state)
        assert client.theta.tobytes() == server.replica.theta.tobytes()


def test_other_runs_have_no_pool(path: Path) -> None:
    with create(path, **RUNS["steps"]) as ledger:
        replica = Server(ledger).replica
        assert replica.pool is None
        assert "draws" not in replica.to_arrays()
    assert make().seeds == "own"
