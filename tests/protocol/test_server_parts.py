"""Parts of a round: who is asked, and what becomes of a round in which not all answer."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger_runs import N_CLIENTS, RUNS, contribution, create, follow, make, message, path

from fwdllm.kernels import cpu
from fwdllm.protocol import wire
from fwdllm.protocol.plan import choose
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture


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


def test_a_private_round_for_which_nobody_is_there_can_be_followed(tmp_path: Path) -> None:
    with create(tmp_path / "ledger", **RUNS["private"], max_parts=1) as ledger:
        server = Server(ledger)
        client = Replica(server.config, ledger.meta.empty_adapter())
        while not server.done:
            server.open_part(range(N_CLIENTS if server.round % 2 else 0), 0.0)
            assert server.close_part(0.0) is not None
            follow(client, wire.encode_many([ledger.rounds()[-1].message or b""]))
            assert client.theta.tobytes() == server.replica.theta.tobytes()
