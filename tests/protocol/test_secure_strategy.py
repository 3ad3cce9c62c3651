"""Sums of clients by the strategy, over a grid without processes."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("Crypto", reason="PyCryptodome comes with fwdllm[federation]")
pytest.importorskip("flwr")
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity
from ledger_runs import N_CLIENTS, contribution, create, path

from fwdllm.protocol import wire
from fwdllm.protocol.flower import strategy as module
from fwdllm.protocol.flower.messages import Reply, Task
from fwdllm.protocol.flower.strategy import FwdLLMStrategy
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.secure import sums
from fwdllm.protocol.secure.letters import Stage
from fwdllm.protocol.secure.member import Member
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture
RUN = {"seeds": "shared", "per_round": N_CLIENTS, "secure": True, "rounds": 3, "max_parts": 2}


class Grid:
    """Nodes that answer at once, of one of Flower's runs: their memory begins with it.

    parts: round and part of the vectors asked for.
    """

    def __init__(self, server: Server, nodes: Iterable[int]) -> None:
        self.server, self.nodes, self.replies = server, list(nodes), dict[str, Message]()
        self.members = {node: Member() for node in self.nodes}
        self.parts: set[tuple[int, int]] = set()
        self.ids = itertools.count()

    def get_node_ids(self) -> list[int]:
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        return [self.push(message) for message in messages]

    def push(self, message: Message) -> str:
        message.metadata.__dict__["_message_id"] = f"message {next(self.ids)}"
        id = message.metadata.message_id
        reply = Reply(self.answer(message.metadata.dst_node_id, Task.of(message.content)))
        self.replies[id] = Message(reply.content(), reply_to=message)
        return id

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        return [self.replies.pop(id) for id in list(ids) if id in self.replies]

    def answer(self, node: int, task: Task) -> bytes:
        letter, member, vector = wire.decode_letter(task.letter), self.members[node], None
        config = self.server.config
        if letter.stage == Stage.VECTOR:
            self.parts.add((letter.round, letter.part))
            assignment = wire.decode_assignment(task.assignment, member.client)
            member.check(config, self.server.replica.space, assignment)
            report = contribution(self.server.replica, assignment)
            vector = sums.encode(config, report, member.n_members, secrets.randbelow)
        told = self.server.history()
        answer = member.answer(config, letter, secrets.token_bytes, vector, told)
        return wire.encode_letter(answer)


def start(ledger: Ledger, nodes: Iterable[int]) -> Grid:
    strategy = FwdLLMStrategy(ledger, clock=lambda: 0.0)
    grid = Grid(strategy.server, nodes)
    strategy.start(grid, strategy.arrays, num_rounds=strategy.rounds_left, timeout=5.0)  # type: ignore[arg-type]
    return grid


@pytest.fixture(autouse=True)
def task(monkeypatch: pytest.MonkeyPatch) -> None:
    """What messages are made of has the numbers that Flower gives a ServerApp's process."""
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("recorded", [False, True])
def test_no_part_is_added_up_twice_after_a_kill(
    path: Path, monkeypatch: pytest.MonkeyPatch, recorded: bool
) -> None:
    """Nodes remember nothing of the run of before: who stays in both sums would be known."""
    grids: list[Grid] = []
    receive, first = Server.receive_sum, Grid.__init__

    def kill(self: Server, *args: Any) -> None:
        if recorded:
            receive(self, *args)
        raise Killed

    def noted(self: Grid, *args: Any) -> None:
        first(self, *args)
        grids.append(self)

    monkeypatch.setattr(Grid, "__init__", noted)
    with create(path, **RUN) as ledger:
        monkeypatch.setattr(Server, "receive_sum", kill)
        with pytest.raises(Killed):
            start(ledger, range(100, 100 + N_CLIENTS))
        monkeypatch.setattr(Server, "receive_sum", receive)
    with Ledger(path, writable=True) as ledger:
        start(ledger, range(100, 100 + N_CLIENTS - 1))
        assert Server(ledger).done
        assert grids[0].parts == {(0, 0)}
        assert not grids[0].parts & grids[1].parts
        assert len(ledger.contributions(0, 0)) == (N_CLIENTS + 1 if recorded else 0)


def test_rounds_do_not_pass_while_there_are_too_few_for_a_sum(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_POLL", 0.0)
    with create(path, **RUN) as ledger:
        strategy = FwdLLMStrategy(ledger, min_nodes=2, clock=lambda: 0.0)
        grid = Grid(strategy.server, range(3))
        seen = iter([[0], [0, 1], [0, 1]])
        grid.get_node_ids = lambda: next(seen, grid.nodes)  # type: ignore[method-assign]
        strategy.start(grid, strategy.arrays, num_rounds=3, timeout=5.0)  # type: ignore[arg-type]
        assert [ledger.n_accepted(round, 0) for round in range(3)] == [3, 3, 3]
