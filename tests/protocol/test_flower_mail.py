"""Replies from nodes: those in time, those that come later, and those that never come."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("flwr")
from fwdllm.protocol.flower import mail as module
from fwdllm.protocol.flower import polling
from fwdllm.protocol.flower.mail import Mail


class Clock:
    """Time that only sleeping moves on."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeGrid:
    """A grid whose replies are there at set times. due: by message, None: never."""

    def __init__(self, clock: Clock, due: dict[str, float | None]) -> None:
        self.clock, self.due = clock, due
        self.looks: list[list[str]] = []
        self.pushes: list[int] = []

    def get_node_ids(self) -> list[int]:
        return [7]

    def push_messages(self, messages: Sequence[str]) -> list[str | None]:
        self.pushes.append(len(messages))
        return [message if message in self.due else None for message in messages]

    def pull_messages(self, ids: Sequence[str]) -> list[Any]:
        self.looks.append(list(ids))
        found = [id for id in ids if (at := self.due[id]) is not None and at <= self.clock.now]
        for id in found:
            self.due[id] = None  # a reply can be had once
        return [SimpleNamespace(metadata=SimpleNamespace(reply_to_message_id=id)) for id in found]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for there in (module, polling):
        monkeypatch.setattr(there, "time", clock)
    return clock


def replies(found: Iterable[Any]) -> list[str]:
    return [reply.metadata.reply_to_message_id for reply in found]


def test_a_request_ends_with_its_last_reply(clock: Clock) -> None:
    mail = Mail(FakeGrid(clock, {"a": 1.0, "b": 8.0}))
    assert replies(mail.send_and_receive(["a", "b"], timeout=600)) == ["a", "b"]
    assert 8.0 <= clock.now < 8.0 * 1.25 + 0.1
    assert list(mail.get_node_ids()) == [7]


def test_many_messages_are_sent_in_groups(clock: Clock) -> None:
    grid = FakeGrid(clock, {f"{i}": 1.0 for i in range(19)})
    found = replies(Mail(grid).send_and_receive(iter(grid.due), timeout=600))
    assert sorted(found) == sorted(grid.due)
    assert grid.pushes == [8, 8, 3]


def test_late_replies_come_with_the_next_request_and_do_not_prolong_it(clock: Clock) -> None:
    grid = FakeGrid(clock, {"late": 16.0, "later": 100.0, "b": 14.0, "c": 20.0})
    mail = Mail(grid)
    assert replies(mail.send_and_receive(["late", "later"], timeout=10)) == []
    assert 10 <= clock.now < 13
    assert replies(mail.send_and_receive(["b"], timeout=10)) == ["b"]
    assert clock.now < 16
    assert replies(mail.send_and_receive(["c"], timeout=600)) == ["late", "c"]
    clock.now = 101.0
    assert replies(mail.pull()) == ["later"]
    looks = len(grid.looks)
    assert mail.pull() == []
    assert len(grid.looks) == looks  # nothing is open, so nobody is asked


def test_what_never_comes_is_looked_for_an_hour(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    grid = FakeGrid(clock, {"gone": None, "b": 3650.0})
    mail = Mail(grid)
    assert mail.send_and_receive(["gone"], timeout=10) == []
    clock.now = 3590.0
    assert replies(mail.send_and_receive(["b"], timeout=600)) == ["b"]
    assert grid.looks[-1] == ["b"]
    assert ["gone", "b"] in grid.looks


def test_messages_that_cannot_be_sent_are_not_waited_for(clock: Clock) -> None:
    assert Mail(FakeGrid(clock, {})).send_and_receive(["refused"], timeout=600) == []
    assert clock.now == 0
