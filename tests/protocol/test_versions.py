"""Nodes and servers of different versions of the protocol: both sides are told, the run goes on."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ledger_runs import N_CLIENTS, create, finish, message, path

from fwdllm.protocol import wire
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture

NODES = [101, 102, 103]
SETTINGS = {"federation.preset": "spry", "model": "m.gguf", "run-dir": "run"}


@pytest.fixture
def speaking(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which this program is of another version."""

    @contextmanager
    def speaking(version: int) -> Iterator[None]:
        with monkeypatch.context() as patched:
            patched.setattr(wire, "VERSION", version)
            yield

    return speaking


# A report of another version


@pytest.mark.parametrize("version", [2, 9])
def test_a_report_of_a_newer_version_is_rejected_as_such(
    version: int, path: Path, speaking: Any
) -> None:
    with create(path) as ledger:
        server = Server(ledger)
        for a in server.open_part(range(N_CLIENTS), 0.0):
            with speaking(version):
                data = message(server, a) + bytes(10_000)  # a newer one may be larger
            want = (
                f"version: it speaks version {version} of the protocol, this server 1: update "
                "fwdllm here"
            )
            assert server.receive(a.client, data, 1.0) == want
            assert ledger.rejections()[-1] == (0, 0, a.client, want)
            assert server.receive(a.client, message(server, a), 1.0) is None
        assert finish(server)
        verify(ledger)
        replay(ledger)


def test_an_older_report_is_told_from_nonsense(path: Path, speaking: Any) -> None:
    with create(path) as ledger:
        server = Server(ledger)
        a = server.open_part(range(N_CLIENTS), 0.0)[0]
        data = message(server, a)
        with speaking(3):
            told = server.receive(a.client, data, 1.0)
            assert told is not None
            assert told.endswith(
                "speaks version 1 of the protocol, this server 3: update fwdllm there"
            )
        for nonsense in (b"", b"\2", b"\0" + data[1:], b"\2\1" + data[2:], b"nonsense"):
            told = server.receive(a.client, nonsense, 1.0)
            assert told is not None
            assert told.startswith("malformed")


def test_the_sentence_of_one_version_is_read_by_all_others(speaking: Any) -> None:
    with speaking(2):
        error = f"<class 'VersionError'>:<'{wire.VersionError(1)}'>"
    assert wire.version_spoken(error) == 2
    assert "the message is of version 1: the sender has to update fwdllm" in error
    assert wire.version_spoken("this fwdllm speaks version x of the protocol") is None
    assert wire.version_spoken("no such luck") is None


def test_a_state_that_another_version_has_saved_is_lost(path: Path, speaking: Any) -> None:
    """Flower's own SuperNode keeps a client's state while fwdllm is updated under it."""
    from fwdllm.protocol.flower.node import synchronize

    with create(path, rounds=2) as ledger:
        server = Server(ledger)
        saved = wire.encode_state(server.replica.to_arrays())
        none = wire.encode_many([])
        assert synchronize(server.replica, saved, none, 0)
        with speaking(2):
            none = wire.encode_many([])
            assert synchronize(server.replica, saved, none, 0)
            assert not synchronize(server.replica, saved, none, 1)


# Messages by Flower


class Nodes:
    """A grid whose nodes are connected; nothing travels."""

    def get_node_ids(self) -> list[int]:
        return NODES


@pytest.fixture
def flower(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """This process is a run's, and what Flower logs is caught."""
    pytest.importorskip("flwr")
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    caplog.set_level(logging.INFO)


def strategy_of(ledger: Any) -> Any:
    from fwdllm.protocol.flower.strategy import FwdLLMStrategy

    strategy = FwdLLMStrategy(ledger, min_nodes=3, clock=lambda: 5.0)
    strategy._grid = Nodes()  # type: ignore[assignment]
    return strategy


def answer(sent: Any, config: dict[str, Any]) -> Any:
    """What a warm node sends back; the process that computes is not reached."""
    from fwdllm.protocol.flower.supernode import _Node, _Run

    def ask(*_: object) -> None:
        raise AssertionError("the process that computes was asked")

    node = _Node([None] * 8, SimpleNamespace(pid=None, ask=ask))  # type: ignore[arg-type]
    node._runs[sent.metadata.run_id] = _Run(config)
    return node._reply(sent, sent.metadata.run_id)


@pytest.mark.parametrize(
    ("server_speaks", "node_speaks", "at_the_node", "at_the_server"),
    [
        (2, 1, "update fwdllm here", "update fwdllm there"),
        (1, 2, "the sender has to update fwdllm", "update fwdllm here"),
    ],
    ids=["old node", "new node"],
)
def test_nodes_of_another_version_are_told_and_left_out(
    server_speaks: int,
    node_speaks: int,
    at_the_node: str,
    at_the_server: str,
    path: Path,
    speaking: Any,
    caplog: pytest.LogCaptureFixture,
    flower: None,
) -> None:
    # A setting that the node does not know must not hide what is the matter.
    config = {**SETTINGS, "federation.of_tomorrow": 1}
    with speaking(server_speaks), create(path, rounds=2, per_round=3) as ledger:
        strategy = strategy_of(ledger)
        while not strategy.server.done:
            caplog.clear()
            sent = list(strategy._request())
            lagging = strategy._known[sent[0].metadata.dst_node_id]
            with speaking(node_speaks):
                reply = answer(sent[0], config)
            assert f"speaks version {node_speaks} of the protocol" in caplog.text
            assert caplog.text.strip().endswith(at_the_node + "'>")
            honest = [
                (a.client, message(strategy.server, a))
                for a in strategy.server.open_part([0, 1, 2], 5.0)
                if a.client != lagging
            ]
            for client, data in honest:
                assert strategy.server.receive(client, data, 5.0) is None
            strategy.aggregate_train(1, [reply])
            said = (
                f"version: it speaks version {node_speaks} of the protocol, this server "
                f"{server_speaks}: {at_the_server}"
            )
            assert f"client {lagging} was left out: {said}" in caplog.text
            assert ledger.rejections()[-1] == (strategy.server.round - 1, 0, lagging, said)
        assert np.isfinite(strategy.server.replica.theta).all()
        verify(ledger)


def test_flowers_own_node_raises_the_same(path: Path, speaking: Any, flower: None) -> None:
    from fwdllm.protocol.flower.client_app import train

    with create(path) as ledger:
        strategy = strategy_of(ledger)
        with speaking(2):
            sent = next(iter(strategy._request()))
        context = SimpleNamespace(run_config={}, node_config={}, state={})
        with pytest.raises(wire.VersionError, match="message is of version 2: update fwdllm here"):
            train(sent, context)


def test_other_errors_of_nodes_are_no_matter_of_versions(
    path: Path, caplog: pytest.LogCaptureFixture, flower: None
) -> None:
    from flwr.app import Error, Message

    with create(path) as ledger:
        strategy = strategy_of(ledger)
        sent = next(iter(strategy._request()))
        for reason in ("no such luck", str(wire.VersionError(2))):  # of our own version
            strategy._take([Message(Error(code=0, reason=reason), reply_to=sent)])
            assert f"a node did not answer: {reason}" in caplog.text
        assert ledger.rejections() == []
        assert json.dumps(ledger.meta.model) == strategy._model
