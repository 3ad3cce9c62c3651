"""Reports that the server does not take, whatever clients and strangers send."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from ledger_runs import N_CLIENTS, contribution, create, final, message, path

from fwdllm.protocol import wire
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture


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
