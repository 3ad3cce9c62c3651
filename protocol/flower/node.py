"""A client's model and data, and its answers to the server's messages; without Flower."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.data.jsonl import Example, check_labels, read_jsonl
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import fingerprint
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.protocol import wire
from fwdllm.protocol.client import answer
from fwdllm.protocol.flower.messages import Saved, Settings, Task
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.report import Report
from fwdllm.protocol.secure import history, sums
from fwdllm.protocol.secure.letters import SecureError, Stage
from fwdllm.protocol.secure.member import Member


@dataclass(frozen=True)
class NodeConfig:
    """What a node's owner says.

    data: path of a JSONL file.  model: path of the GGUF file, None: that of the run's settings.
    memory_budget: the most bytes to use, or None.  secure: take part only where the server sees
    sums of scalars alone.
    """

    data: str
    model: str | None = None
    memory_budget: int | None = None
    secure: bool = False

    @staticmethod
    def of(config: Mapping[str, Any]) -> NodeConfig:
        """From a node's configuration in Flower. Errors: ConfigError."""
        data, model = config.get("data"), config.get("model")
        if not data:
            raise ConfigError("the node's configuration does not name its data")
        budget = config.get("memory-budget")
        return NodeConfig(
            str(data),
            None if model is None else str(model),
            None if budget is None else int(budget),
            bool(config.get("secure", False)),
        )


class Node:
    """Answers messages, and keeps the model and the data from one to the next.

    Both are looked at again for every message, and read again if their files have changed. What a
    message does to the adapter is in the state that is returned with the answer, and nowhere else:
    an answer's bits do not depend on earlier messages.
    """

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._settings: Settings | None = None
        self._engine: Engine | None = None
        self._empty = np.zeros(0, np.float32)
        self._examples: list[Example] = []
        self._version: tuple[int, ...] = ()

    def answer(self, settings: Settings, task: Task, saved: Saved) -> tuple[bytes | None, Saved]:
        """The encoded report or letter on a message, and what to remember after it.

        saved: after an earlier message of the run. None instead of an answer if that state was lost
        which the message's updates build on. Errors: FwdllmError.
        """
        config = settings.federation
        if self._config.secure and not config.secure:
            raise ConfigError("this node answers where its scalars are seen in sums alone (secure)")
        if config.secure != bool(task.letter):
            raise ConfigError(
                "the server asks for an answer in another way than the run's settings"
            )
        if not task.letter:
            report, saved = self._report(settings, task, saved)
            return None if report is None else wire.encode_report(report), saved
        letter, member, vector = (
            wire.decode_letter(task.letter),
            Member.from_bytes(saved.member),
            None,
        )
        if letter.stage == Stage.VECTOR:
            report, saved = self._report(settings, task, saved, member)
            if report is None:
                return None, saved
            vector = sums.encode(config, report, member.n_members, secrets.randbelow)
        answer = wire.encode_letter(
            member.answer(config, letter, secrets.token_bytes, vector, saved.history or b"")
        )
        return answer, dataclasses.replace(saved, member=member.to_bytes())

    def _report(
        self, settings: Settings, task: Task, saved: Saved, member: Member | None = None
    ) -> tuple[Report | None, Saved]:
        began = time.perf_counter()
        engine = self._load(settings, json.loads(task.model))
        assert engine.adapter is not None
        engine.adapter.theta[:] = self._empty
        replica = Replica(settings.federation, engine.adapter)
        assignment = wire.decode_assignment(task.assignment)
        if member is not None:
            member.check(settings.federation, replica.space, assignment)
        told = saved if member is None else _told(settings, engine, task, saved)
        if not synchronize(replica, told.state, task.synchronization, assignment.round):
            return None, saved
        state = wire.encode_state(replica.to_arrays(public=True))
        saved = dataclasses.replace(told, state=state)
        report = answer(engine, replica.space, assignment, self._read(settings, engine))
        return dataclasses.replace(report, seconds=time.perf_counter() - began), saved

    def _load(self, settings: Settings, expected: Mapping[str, object]) -> Engine:
        path = self._config.model or settings.model
        file = GGUFFile.open(path)  # another object if the file is another
        if expected != fingerprint(*file.paths):
            raise ConfigError(f"{path} is not the model of this federation")
        if self._engine is None or self._engine.file is not file or self._settings != settings:
            self._engine, self._version = None, ()  # not both models in memory
            self._engine = settings.engine(path, self._config.memory_budget)
            assert self._engine.adapter is not None
            self._empty = self._engine.adapter.theta.copy()
            self._settings = settings
        return self._engine

    def _read(self, settings: Settings, engine: Engine) -> list[Example]:
        version = _version_of(Path(self._config.data))
        if not version or version != self._version:
            self._version = ()
            examples = read_jsonl(Path(self._config.data))
            if settings.labels:
                check_labels(examples, settings.labels)
            # Tokens are not kept: those of a batch take less than a millisecond.
            self._examples = engine.separate(examples)
            self._version = version
        return self._examples


def _told(settings: Settings, engine: Engine, task: Task, saved: Saved) -> Saved:
    """With the history that a message adds to. Errors: SecureError, WireError.

    A state has no history, so others might have got another one, and a saved one without is of no
    use.
    """
    updates = wire.decode_many(task.synchronization)
    if any(map(wire.is_state, updates)):
        raise SecureError("the server sends a state in place of updates, maybe another to others")
    config, adapter = settings.federation, engine.adapter
    assert adapter is not None
    if saved.state is None or saved.history is None:
        meta = Meta.of(config, adapter, config.seed, json.loads(task.model), 0)
        saved = Saved(None, saved.member, history.beginning(meta))
        known = 0
    else:
        known = int(wire.decode_state(saved.state)["round"])
    new = [update for update in updates if wire.decode_update(update).round >= known]
    assert saved.history is not None
    return dataclasses.replace(saved, history=history.after(saved.history, new))


def _version_of(path: Path) -> tuple[int, ...]:
    """What differs between a file's versions; () if there is no telling."""
    try:
        facts = os.stat(path)
    except (OSError, ValueError):  # the error that says what is wrong is raised when it is read
        return ()
    # With the time of the last change of its attributes: a copy may keep the other's time.
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns


def synchronize(replica: Replica, saved: bytes | None, data: bytes, round: int) -> bool:
    """Bring a replica from its saved state to a round; False if that state was lost.

    data: see ``Server.synchronize``. Errors: WireError, NumericsError.
    """
    messages = wire.decode_many(data)
    states = [m for m in messages if wire.is_state(m)]
    # A state that another version has saved is as good as lost.
    if not states and saved is not None and saved[:1] == data[:1]:
        states = [saved]
    for state in states:
        try:
            replica.load_arrays(wire.decode_state(state))
        except ValueError as error:
            raise wire.WireError(f"a state is not of this run: {error}") from error
    for message in messages:
        if not wire.is_state(message):
            update = wire.decode_update(message)
            if update.round == replica.round:  # earlier updates are in the saved state
                replica.apply(update)
    return replica.round == round
