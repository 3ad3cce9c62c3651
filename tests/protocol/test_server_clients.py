"""What the server sends to clients so that they follow it, and the bytes of it that are counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ledger_runs import (
    N_CLIENTS,
    RUNS,
    contribution,
    create,
    finish,
    follow,
    message,
    operations,
    path,
    some,
)

from fwdllm.engine.adapters.adapter import Head
from fwdllm.protocol import wire
from fwdllm.protocol.figures import traffic, traffic_by_client
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.server import Server
from fwdllm.protocol.space import HEAD

__all__ = ["path"]  # a fixture


@pytest.mark.parametrize("name", RUNS)
def test_clients_follow_the_server_by_what_it_sends(name: str, path: Path) -> None:
    with create(path, **RUNS[name], rounds=12) as ledger:
        server = Server(ledger)
        replicas: dict[int, Replica] = {}
        kinds = set()
        state = server.replica.to_arrays()
        for name_of_servers in ("gradient", "amplitudes", "draws"):
            state.pop(name_of_servers, None)
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
        assert traffic(ledger) == [(r, 3, down[r], up[r]) for r in range(4)]


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
        ((_, n_asked, _, found),) = traffic(ledger)
        assert (n_asked, found) == (3, sum(up.values()))
        assert {row[0]: row[4] for row in traffic_by_client(ledger)} == {
            a.client: up[a.client] for a in asked
        }
