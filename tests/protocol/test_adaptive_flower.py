"""Devices that differ behind Flower's strategy: speeds come from reports, nothing is set up."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr")
from flwr.app import Message
from flwr.supercore.task_identity import TaskIdentity

from fwdllm.engine.engine import Engine
from fwdllm.engine.files import fingerprint
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.fleet import Fleet
from fwdllm.federation.simulation import Partition, simulate
from fwdllm.protocol import wire
from fwdllm.protocol.flower.messages import Reply, Saved, Settings, Task
from fwdllm.protocol.flower.node import Node, NodeConfig
from fwdllm.protocol.flower.strategy import FwdLLMStrategy
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.presets import preset
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replay import replay, verify

LORA = LoRAConfig(2, 4)
ROUNDS = 4
CHANGES: dict[str, Any] = {
    "adaptive": True,
    "per_round": 3,
    "perturbations": 4,
    "candidates": 2,
    "pacing": False,
    "batch_size": 2,
    "max_tokens": 24,
    "eval_every": 0,
}
# Seconds of a lane-token, by client.
PACES = (0.01, 0.02, 0.2)


class _Devices(Fleet):
    def seconds(self, seed: int, client: int, n_tokens: int) -> float:
        return n_tokens * PACES[client]


class _Grid:
    """Nodes in this process. Their clocks say what devices of PACES would take."""

    def __init__(self, settings: Settings, data: Sequence[Path]) -> None:
        self._settings = settings
        self._nodes = {100 + i: Node(NodeConfig(str(path))) for i, path in enumerate(data)}
        self._states = dict.fromkeys(self._nodes, Saved())
        self._replies: list[Message] = []

    def get_node_ids(self) -> list[int]:
        return list(self._nodes)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        ids = []
        for message in messages:
            node = message.metadata.dst_node_id
            message.metadata.__dict__["_message_id"] = f"{node} {len(ids)}"
            report, self._states[node] = self._nodes[node].answer(
                self._settings, Task.of(message.content), self._states[node]
            )
            assert report is not None
            found = wire.decode_report(report)
            found = replace(found, seconds=found.n_tokens * PACES[node - 100])
            reply = Reply(wire.encode_report(found)).content()
            self._replies.append(Message(reply, reply_to=message))
            ids.append(message.metadata.message_id)
        return ids

    def pull_messages(self, ids: Iterable[str]) -> list[Message]:
        found, self._replies = self._replies, []
        return found


@pytest.fixture
def identity(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.usefixtures("identity")
def test_nodes_need_not_say_how_fast_they_are(bundled: Path, tmp_path: Path) -> None:
    lines = (bundled.parent / "pirate.train.jsonl").read_text(encoding="utf-8").splitlines()[:30]
    data, merged = [], tmp_path / "all.jsonl"
    for i in range(len(PACES)):
        data.append(tmp_path / f"{i}.jsonl")
        data[i].write_text("\n".join(lines[i::3]) + "\n", encoding="utf-8")
    rows = [json.dumps({**json.loads(line), "node": i % 3}) for i, line in enumerate(lines)]
    merged.write_text("\n".join(rows) + "\n", encoding="utf-8")

    config = preset("fwdllm", rounds=ROUNDS, **CHANGES)
    settings = Settings(config, LORA, (), str(bundled), "", "", 3)
    adapter = Engine.load(bundled, LORA, seed=config.seed).adapter
    assert adapter is not None
    meta = Meta.of(config, adapter, config.seed, fingerprint(bundled), 1)
    with Ledger.create(tmp_path / "ledger.sqlite", meta) as ledger:
        strategy = FwdLLMStrategy(ledger, min_nodes=3)
        strategy.start(
            _Grid(settings, data), strategy.arrays, num_rounds=strategy.rounds_left, timeout=60
        )
        assert ledger.rejections() == []
        verify(ledger)
        theta = replay(ledger).theta.tobytes()
        counts = [
            [wire.decode_assignment(message).seeds.size for _, message in ledger.assignments(r, 0)]
            for r in range(ROUNDS)
        ]
    assert counts == [[4, 4, 4], *[[8, 3, 1]] * (ROUNDS - 1)]

    simulate(
        bundled,
        merged,
        tmp_path / "simulation",
        config,
        lora=LORA,
        partition=Partition(user_field="node"),
        fleet=_Devices(),
        eval_data=data[0],
    )
    with Ledger(tmp_path / "simulation" / NAME) as ledger:
        assert replay(ledger).theta.tobytes() == theta
