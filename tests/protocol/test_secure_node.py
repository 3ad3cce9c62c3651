"""Nodes of a run of sums, with a model, and a server that tells them different things."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("Crypto", reason="PyCryptodome comes with fwdllm[federation]")
from fwdllm.engine.engine import Engine
from fwdllm.engine.files import fingerprint
from fwdllm.engine.settings import LoRAConfig
from fwdllm.protocol import wire
from fwdllm.protocol.flower.messages import Saved, Settings, Task
from fwdllm.protocol.flower.node import Node, NodeConfig
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.presets import preset
from fwdllm.protocol.records import Meta
from fwdllm.protocol.secure import history, sums
from fwdllm.protocol.secure.cohort import Cohort
from fwdllm.protocol.secure.letters import SecureError, Stage
from fwdllm.protocol.server import Server

N = 3
LORA = LoRAConfig(2, 4)
CHANGES = {"per_round": N, "perturbations": 2, "batch_size": 2, "max_tokens": 32, "secure": True}
Tell = Callable[[int, bytes], bytes]


def truth(client: int, synchronization: bytes) -> bytes:
    return synchronization


class Federation:
    """Nodes in this process, and their server."""

    def __init__(self, server: Server, model: Path, data: Path) -> None:
        self.server = server
        settings = Settings(server.config, LORA, (), str(model), "run", "", N)
        self.settings = dict.fromkeys(range(N), settings)
        self.node = Node(NodeConfig(str(data), secure=True))  # it keeps nothing from one to another
        self.saved = dict.fromkeys(range(N), Saved())

    def round(self, tell: Tell = truth) -> str | None:
        """A round of one part; why its sum was refused. tell: what a client is told."""
        server = self.server
        asked = {a.client: a for a in server.open_part(range(N), 0.0)}
        size = sums.size(server.config, asked[0])
        cohort = Cohort(server.config, server.round, 0, range(N), size, server.history())
        while not cohort.done:
            for client, letter in cohort.letters().items():
                task = self.task(asked[client], cohort.stage, wire.encode_letter(letter), tell)
                answer, self.saved[client] = self.node.answer(
                    self.settings[client], task, self.saved[client]
                )
                assert answer is not None
                assert cohort.take(client, wire.decode_letter(answer)) is None
            cohort.close()
        reason = server.receive_sum(cohort.vectors, cohort.total, 1.0)
        server.close_part(2.0)
        return reason

    def task(self, a: Assignment, stage: Stage, letter: bytes, tell: Tell) -> Task:
        model = json.dumps(self.server.ledger.meta.model)
        if stage != Stage.VECTOR:
            return Task(b"", b"", model, letter)
        told = tell(a.client, self.server.synchronize(a.client))
        return Task(wire.encode_assignment(a), told, model, letter)


@pytest.fixture
def federation(bundled: Path, tmp_path: Path) -> Iterator[Federation]:
    config = preset("mezo", rounds=4, **CHANGES)
    lines = (bundled.parent / "pirate.train.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "data.jsonl").write_text("\n".join(lines[:6]) + "\n", encoding="utf-8")
    adapter = Engine.load(bundled, LORA, seed=config.seed).adapter
    assert adapter is not None
    meta = Meta.of(config, adapter, config.seed, fingerprint(bundled), 1)
    with Ledger.create(tmp_path / "ledger.sqlite", meta) as ledger:
        yield Federation(Server(ledger), bundled, tmp_path / "data.jsonl")


def test_sums_of_clients_that_were_told_the_same(federation: Federation) -> None:
    assert [federation.round() for _ in range(2)] == [None, None]
    federation.saved[1] = Saved()  # a restart: the server tells all of it again
    federation.server.forget(1)
    assert federation.round() is None
    assert federation.server.ledger.n_accepted(2, 0) == N


def test_another_state_for_the_others_is_refused(federation: Federation) -> None:
    """From an adapter of zeros all slopes are zero, and the sum would be client 0's."""
    arrays = federation.server.replica.to_arrays(public=True)
    zeros = wire.encode_state({**arrays, "theta": np.zeros_like(arrays["theta"])})
    with pytest.raises(SecureError, match="a state in place of updates"):
        federation.round(lambda client, told: wire.encode_many([zeros]) if client else told)


def test_another_update_for_the_others_leaves_masks_on_the_sum(federation: Federation) -> None:
    assert federation.round() is None

    def tell(client: int, told: bytes) -> bytes:
        (message,) = wire.decode_many(told)
        update = wire.decode_update(message)
        terms = [
            dataclasses.replace(term, coefficients=term.coefficients * np.float32(1e6))
            for term in update.terms
        ]
        lie = wire.encode_update(dataclasses.replace(update, terms=tuple(terms)))
        return wire.encode_many([lie]) if client else told

    assert "examples are not between" in (federation.round(tell) or "")


@pytest.mark.parametrize("what", ["lora", "federation"])
def test_other_settings_for_the_others_leave_masks_on_the_sum(
    federation: Federation, what: str
) -> None:
    told = federation.settings[0]
    changes: dict[str, Any] = {
        "lora": LoRAConfig(2, 5),
        "federation": dataclasses.replace(told.federation, epsilon=2e-3),
    }
    other = dataclasses.replace(told, **{what: changes[what]})
    federation.settings.update({1: other, 2: other})
    assert "examples are not between" in (federation.round() or "")


def test_a_setting_is_the_same_however_it_is_written(federation: Federation) -> None:
    meta = federation.server.ledger.meta
    for value, same in ((1, True), (1.0, True), (1.5, False)):
        config = dataclasses.replace(meta.config, clip=value)
        found = history.beginning(dataclasses.replace(meta, config=config, noise_seed=5))
        assert (found == history.beginning(meta)) is same
    assert history.after(b"", [b"a", b"b"]) != history.after(b"", [b"b", b"a"])
