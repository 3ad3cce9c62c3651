"""Secure aggregation by real Flower processes on loopback, over TLS, one of which is killed."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")
from flower_network import FlowerNetwork

from fwdllm.engine.data.jsonl import read_jsonl
from fwdllm.engine.engine import Engine
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.app_directory import init
from fwdllm.protocol import wire
from fwdllm.protocol.aggregate import terms_of
from fwdllm.protocol.client import answer_all
from fwdllm.protocol.ledger import NAME, Ledger, theta_hash
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.report import Report
from fwdllm.protocol.secure.sums import SCALE

N_NODES, ROUNDS, KILLED_IN = 5, 2, 1
LORA = LoRAConfig(2, 4)
CHANGES = {
    "per_round": N_NODES,
    "perturbations": 3,
    "batch_size": 4,
    "method": "forward-ad",
    "secure": True,
    "max_parts": 2,
    "deadline": 10.0,
}
TIMEOUT = 240.0

# The ServerApp, which also keeps what it receives, and stops before the vectors of a round.
SERVER = """
import time
from pathlib import Path

from fwdllm.protocol import wire
from fwdllm.protocol.flower.mail import Mail
from fwdllm.protocol.flower.messages import Reply, Task
from fwdllm.protocol.flower.server_app import app
from fwdllm.protocol.secure.letters import Stage

__all__ = ["app"]
FOLDER = Path("@FOLDER@")
send = Mail.send_and_receive


def send_and_receive(self, messages, *, timeout=None):
    messages = list(messages)
    letters = [wire.decode_letter(Task.of(m.content).letter) for m in messages]
    at = {(letter.round, letter.stage) for letter in letters}
    if (@ROUND@, Stage.VECTOR) in at and not (FOLDER / "killed").exists():
        (FOLDER / "now").touch()
        while not (FOLDER / "killed").exists():
            time.sleep(0.05)
    replies = send(self, messages, timeout=timeout)
    with open(FOLDER / "received", "ab") as file:
        for reply in replies:
            if reply.has_content():
                file.write(Reply.of(reply.content).report)
    return replies


Mail.send_and_receive = send_and_receive
"""


@pytest.fixture(scope="module")
def data(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = (bundled.parent / "pirate.train.jsonl").read_text(encoding="utf-8").splitlines()
    for i in range(N_NODES):
        own = "\n".join(lines[i::N_NODES][: 20 + i]) + "\n"
        (folder / f"data-{i}.jsonl").write_text(own, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def network(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    def config(i: int) -> dict[str, str]:
        return {"data": str(data / f"data-{i}.jsonl")}

    folder = tmp_path_factory.mktemp("flower")
    with FlowerNetwork(folder, N_NODES, node_config=config, warm=True) as running:
        yield running


def test_the_sum_of_those_who_stay_and_nothing_in_clear(
    network: FlowerNetwork, bundled: Path, data: Path, tmp_path: Path
) -> None:
    app = init(
        tmp_path / "app",
        bundled,
        data / "data-0.jsonl",
        "mezo",
        rounds=ROUNDS,
        lora=LORA,
        min_nodes=3,
        changes=CHANGES,
    )
    text = SERVER.replace("@FOLDER@", str(tmp_path)).replace("@ROUND@", str(KILLED_IN))
    (app / "federation" / "server.py").write_text(text, encoding="utf-8")
    run = network.run(app)
    deadline = time.monotonic() + TIMEOUT
    while not (tmp_path / "now").exists():
        assert time.monotonic() < deadline, network.server_log(run)
        time.sleep(0.05)
    network.kill_node(1)  # all have its shares by now, and its masks are in their vectors
    network.lapse_node(1)
    (tmp_path / "killed").touch()
    assert network.wait(run, TIMEOUT) == "finished:completed", network.server_log(run)

    order = sorted(range(N_NODES), key=lambda i: network.node_ids[i])
    killed = order.index(1)
    everybody, rest = set(range(N_NODES)), set(range(N_NODES)) - {killed}
    received = (tmp_path / "received").read_bytes()
    with Ledger(app / "run" / NAME) as ledger:
        verify(ledger)
        replay(ledger)
        members = [
            {client for client, _ in ledger.contributions(r, 0) if client < N_NODES}
            for r in range(ROUNDS)
        ]
        assert members == [everybody, rest]
        files = [data / f"data-{i}.jsonl" for i in order]
        reports = compare_with_plain(ledger, members, bundled, files)
    assert len(reports) == sum(map(len, members))
    for report in reports:
        assert in_clear(report, wire.encode_report(report)) > 0  # what is looked for can be found
        assert in_clear(report, received) == 0


def compare_with_plain(
    ledger: Ledger, members: list[set[int]], model: Path, files: list[Path]
) -> list[Report]:
    """Compare each round with the plain aggregation of its clients' reports, which are returned.

    Each from the state that the run had: an engine on int8 activations can make much of a last bit.
    """
    config = dataclasses.replace(ledger.meta.config, secure=False)
    engine = Engine.load(model, LORA, seed=config.seed)
    examples = [read_jsonl(file) for file in files]
    engine.adapter = ledger.meta.empty_adapter()
    replica = Replica(config, engine.adapter)
    everything = []
    for closed, clients in zip(ledger.rounds(), members, strict=True):
        rows = [(c, m) for c, m in ledger.assignments(closed.round, 0) if c in clients]
        assignments = [wire.decode_assignment(m, c) for c, m in rows]
        reports = list(answer_all(engine, replica.space, assignments, examples.__getitem__))
        everything += reports
        plain = terms_of(config, list(zip(assignments, reports, strict=True)), 0)
        assert closed.message is not None
        update = wire.decode_update(closed.message)
        assert len(plain) == len(update.terms) > 0
        for mine, theirs in zip(update.terms, plain, strict=True):
            assert (mine.half, mine.weight) == (theirs.half, theirs.weight)
            assert mine.seeds.tolist() == theirs.seeds.tolist()
            np.testing.assert_allclose(
                mine.coefficients, theirs.coefficients, rtol=1e-6, atol=N_NODES / SCALE
            )
        replica.apply(update)
        assert theta_hash(replica.theta) == closed.theta
    return everything


def in_clear(report: Report, data: bytes) -> int:
    """How often a client's scalars and loss are in data: as floats, or as a sum's integers."""
    values = [*report.derivatives.ravel().tolist(), report.loss]
    count = 0
    for value in values:
        units = round(value * report.n_examples * SCALE)
        for form in (
            np.float32(value).tobytes(),
            np.float64(value).tobytes(),
            np.int64(units).tobytes(),
            np.int64(round(value * SCALE)).tobytes(),
        ):
            count += data.count(form)
    return count
