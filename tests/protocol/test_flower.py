"""Federations of real Flower processes on loopback, over TLS and with authenticated nodes."""

from __future__ import annotations

import json
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("flwr")
from flower_network import REFUSED, FlowerNetwork, write_key_pair

from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.app_directory import init
from fwdllm.federation.simulation import Partition, simulate
from fwdllm.protocol.figures import traffic_by_client
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.presets import preset
from fwdllm.protocol.replay import replay, verify

N_NODES = 3
LORA = LoRAConfig(2, 4)
# Yogi has a state to keep in step; candidates make the server choose seeds.
CHANGES = {
    "per_round": N_NODES,
    "perturbations": 3,
    "candidates": 3,
    "optimizer": "yogi",
    "learning_rate": 1e-2,
    "eps": 1e-3,
    "pacing": False,
    "batch_size": 4,
    "snapshot_every": 2,
}
TIMEOUT = 240.0


@pytest.fixture(scope="module")
def pirate(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with each node's data, all of it with its node's number, and what to evaluate on."""
    folder = tmp_path_factory.mktemp("data")
    lines = (bundled.parent / "pirate.train.jsonl").read_text(encoding="utf-8").splitlines()
    merged = []
    for i in range(N_NODES):
        own = lines[i::N_NODES][:40]
        (folder / f"data-{i}.jsonl").write_text("\n".join(own) + "\n", encoding="utf-8")
        merged += [json.dumps({**json.loads(line), "node": i}) for line in own]
    (folder / "all.jsonl").write_text("\n".join(merged) + "\n", encoding="utf-8")
    shutil.copy(bundled.parent / "pirate.valid.jsonl", folder / "valid.jsonl")
    return folder


@pytest.fixture(scope="module")
def network(pirate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerNetwork]:
    folder = tmp_path_factory.mktemp("flower")
    with FlowerNetwork(
        folder, N_NODES, node_config=lambda i: {"data": str(pirate / f"data-{i}.jsonl")}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def warm_network(pirate: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerNetwork]:
    """Nodes that keep their model."""
    folder = tmp_path_factory.mktemp("warm")
    with FlowerNetwork(
        folder, N_NODES, node_config=lambda i: {"data": str(pirate / f"data-{i}.jsonl")}, warm=True
    ) as running:
        yield running


def write_app(folder: Path, bundled: Path, pirate: Path, rounds: int, **changes: object) -> Path:
    return init(
        folder,
        bundled,
        pirate / "all.jsonl",
        "fwdllm",
        rounds=rounds,
        lora=LORA,
        min_nodes=N_NODES,
        changes={**CHANGES, **changes},
    )


def simulated(
    network: FlowerNetwork, bundled: Path, pirate: Path, folder: Path, rounds: int
) -> bytes:
    """The adapter's hash after the same rounds in one process."""
    # Clients are numbered as their nodes' ids are ordered.
    order = sorted(range(N_NODES), key=lambda i: network.node_ids[i])
    lines = (pirate / "all.jsonl").read_text(encoding="utf-8").splitlines()
    clients = [
        {**json.loads(line), "client": order.index(json.loads(line)["node"])} for line in lines
    ]
    data = folder / "clients.jsonl"
    data.write_text("".join(json.dumps(c) + "\n" for c in clients), encoding="utf-8")
    config = preset("fwdllm", rounds=rounds, **CHANGES)
    simulate(
        bundled,
        data,
        folder / "simulation",
        config,
        lora=LORA,
        partition=Partition(user_field="client"),
        eval_data=pirate / "valid.jsonl",
    )
    return last_hash(folder / "simulation")


def last_hash(run_dir: Path) -> bytes:
    """SHA-256 of the adapter after the last round, of a ledger that verifies and replays."""
    with Ledger(run_dir / NAME) as ledger:
        verify(ledger)
        replay(ledger)
        return ledger.rounds()[-1].theta


def n_contributions(run_dir: Path) -> int:
    path = run_dir / NAME
    if not path.exists():
        return 0
    with sqlite3.connect(path) as database:
        return int(database.execute("SELECT count(*) FROM contribution").fetchone()[0])


def await_contributions(run_dir: Path, count: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while n_contributions(run_dir) < count:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_rounds_give_the_bits_of_a_simulation(
    network: FlowerNetwork, bundled: Path, pirate: Path, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app", bundled, pirate, rounds=3)
    assert network.wait(network.run(app), TIMEOUT) == "finished:completed"
    assert (app / "run" / "adapter.gguf").is_file()
    assert last_hash(app / "run") == simulated(network, bundled, pirate, tmp_path, rounds=3)
    with Ledger(app / "run" / NAME) as ledger:
        assert ledger.n_rounds == 3
        assert ledger.rejections() == []
        for _, asked, accepted, down, up in traffic_by_client(ledger):
            assert (asked, accepted) == (3, 3)
            assert up == 3 * (34 + 4 * CHANGES["perturbations"])
            assert 0 < down < 20_000


def test_killed_server_goes_on_to_the_same_bits(
    network: FlowerNetwork, bundled: Path, pirate: Path, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app", bundled, pirate, rounds=2)
    for contributions in (1, 4):  # within the first round, and within the second
        network.run(app)
        await_contributions(app / "run", contributions)
        network.kill_server_app()
        kept = n_contributions(app / "run")
        assert kept >= contributions
    assert network.wait(network.run(app), TIMEOUT) == "finished:completed"
    assert last_hash(app / "run") == simulated(network, bundled, pirate, tmp_path, rounds=2)
    assert n_contributions(app / "run") == 2 * N_NODES


def test_killed_node_costs_its_share_and_comes_back(
    network: FlowerNetwork, bundled: Path, pirate: Path, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app", bundled, pirate, rounds=3)
    run = network.run(app)
    await_contributions(app / "run", 3)
    network.kill_node(1)
    network.lapse_node(1)
    network.start_node(1)
    assert network.wait(run, TIMEOUT) == "finished:completed"
    last_hash(app / "run")
    with Ledger(app / "run" / NAME) as ledger:
        assert ledger.n_rounds == 3
        accepted = {client: n for client, _, n, _, _ in traffic_by_client(ledger)}
    killed = sorted(network.node_ids).index(network.node_ids[1])
    assert all(n == 3 for client, n in accepted.items() if client != killed)
    assert 1 <= accepted[killed] <= 3


HOSTILE_CLIENT = '''
"""An honest client, but for the node with number 2, which does something bad in every round."""

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fwdllm.protocol import wire
from fwdllm.protocol.flower.client_app import train as honest
from fwdllm.protocol.flower.messages import Reply

from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    reply = honest(message, context)
    if context.node_config["partition-id"] != 2:
        return reply
    report = wire.decode_report(Reply.of(reply.content).report)
    if report.round == 0:
        report.derivatives[...] = 1e30
        return Message(Reply(wire.encode_report(report)).content(), reply_to=message)
    if report.round == 1:
        return Message(Reply(bytes(64_000_000)).content(), reply_to=message)
    if report.round == 2:
        return Message(RecordDict({"fwdllm": ConfigRecord({"report": "text"})}), reply_to=message)
    raise ValueError("no such luck")
'''


def test_bad_records_are_rejected_and_the_round_goes_on(
    network: FlowerNetwork, bundled: Path, pirate: Path, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app", bundled, pirate, rounds=4)
    (app / "federation" / "client.py").write_text(HOSTILE_CLIENT, encoding="utf-8")
    run = network.run(app)
    assert network.wait(run, TIMEOUT) == "finished:completed"
    last_hash(app / "run")
    hostile = sorted(network.node_ids).index(network.node_ids[2])
    with Ledger(app / "run" / NAME) as ledger:
        assert ledger.n_rounds == 4
        found = [(round, client, reason) for round, _, client, reason in ledger.rejections()]
        accepted = {client: n for client, _, n, _, _ in traffic_by_client(ledger)}
    assert [(round, client) for round, client, _ in found] == [(r, hostile) for r in range(3)]
    for (_, _, reason), expected in zip(
        found, ("1e+30", "64000000 bytes", "malformed"), strict=True
    ):
        assert expected in reason
    assert accepted == {client: 0 if client == hostile else 4 for client in range(N_NODES)}
    assert "no such luck" in network.server_log(run)


LATE_CLIENT = '''
"""An honest client, but for the node with number 2, which is slow in the first round."""

import json
import time

from fwdllm.protocol import wire
from fwdllm.protocol.flower.client_app import train as honest
from fwdllm.protocol.flower.messages import Task

from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    if context.node_config["partition-id"] == 2:
        if wire.decode_assignment(Task.of(message.content).assignment).round == 0:
            time.sleep(DEADLINE + 5)
    return honest(message, context)
'''


def test_late_replies_are_recorded(
    network: FlowerNetwork, bundled: Path, pirate: Path, tmp_path: Path
) -> None:
    deadline = 20.0
    app = write_app(tmp_path / "app", bundled, pirate, rounds=2, deadline=deadline)
    late = LATE_CLIENT.replace("DEADLINE", str(deadline))
    (app / "federation" / "client.py").write_text(late, encoding="utf-8")
    assert network.wait(network.run(app), TIMEOUT) == "finished:completed"
    last_hash(app / "run")
    slow = sorted(network.node_ids).index(network.node_ids[2])
    with Ledger(app / "run" / NAME) as ledger:
        assert ledger.n_rounds == 2
        assert ledger.rejections() == [(0, 0, slow, "late")]
        accepted = {client: n for client, _, n, _, _ in traffic_by_client(ledger)}
    assert accepted == {client: 1 if client == slow else 2 for client in range(N_NODES)}


NEWER_SERVER = '''
"""A server of the protocol's next version."""

from fwdllm.protocol import wire

wire.VERSION += 1

from fwdllm.protocol.flower.server_app import app

__all__ = ["app"]
'''

LAGGING_CLIENT = '''
"""Clients that were updated with the server, but for the node with number 2."""

from fwdllm.protocol import wire
from fwdllm.protocol.flower.client_app import train as honest

from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message, context):
    wire.VERSION = 1 if context.node_config["partition-id"] == 2 else 2
    return honest(message, context)
'''


def test_node_of_an_older_version_is_told_and_left_out(
    network: FlowerNetwork, bundled: Path, pirate: Path, tmp_path: Path
) -> None:
    app = write_app(tmp_path / "app", bundled, pirate, rounds=2)
    (app / "federation" / "server.py").write_text(NEWER_SERVER, encoding="utf-8")
    (app / "federation" / "client.py").write_text(LAGGING_CLIENT, encoding="utf-8")
    run = network.run(app)
    assert network.wait(run, TIMEOUT) == "finished:completed"
    lagging = sorted(network.node_ids).index(network.node_ids[2])
    said = "version: it speaks version 1 of the protocol, this server 2: update fwdllm there"
    with Ledger(app / "run" / NAME) as ledger:
        verify(ledger)
        assert ledger.n_rounds == 2
        assert ledger.rejections() == [(round, 0, lagging, said) for round in range(2)]
    assert f"client {lagging} was left out: {said}" in network.server_log(run)
    here = "this fwdllm speaks version 1 of the protocol, and the message is of version 2"
    assert f"{here}: update fwdllm here" in network.logs()["node-2"]


def test_warm_nodes_give_the_bits_of_a_simulation_whatever_dies(
    warm_network: FlowerNetwork, bundled: Path, pirate: Path, tmp_path: Path
) -> None:
    network, rounds = warm_network, 8
    app = write_app(tmp_path / "app", bundled, pirate, rounds=rounds)
    run = network.run(app)
    await_contributions(app / "run", 2 * N_NODES)
    kept = [network.workers(i) for i in range(N_NODES)]
    [stopped], [killed], [left] = kept
    killed.kill()
    stopped.suspend()
    # The others go on to the end of the round, which then waits for the process that was stopped.
    answered = network.logs()["node-2"].count("was answered")
    while network.logs()["node-2"].count("was answered") < answered + 1:
        assert network.status(run) == "running"
    time.sleep(2)
    stopped.kill()
    assert network.wait(run, TIMEOUT) == "finished:completed"
    assert last_hash(app / "run") == simulated(network, bundled, pirate, tmp_path, rounds)
    with Ledger(app / "run" / NAME) as ledger:
        assert ledger.rejections() == []
        traffic = traffic_by_client(ledger)
    assert all((asked, accepted) == (rounds, rounds) for _, asked, accepted, _, _ in traffic)
    with Ledger(tmp_path / "simulation" / NAME) as ledger:
        assert traffic_by_client(ledger) == traffic  # no state was lost and sent again
    assert [network.workers(i) == kept[i] for i in range(N_NODES)] == [False, False, True]
    assert left.is_running()


def test_warm_node_tells_the_server_its_errors_and_its_end(
    warm_network: FlowerNetwork, bundled: Path, pirate: Path, tmp_path: Path
) -> None:
    network, data = warm_network, pirate / "data-2.jsonl"
    aside = data.rename(tmp_path / "aside.jsonl")
    app = write_app(tmp_path / "app", bundled, pirate, rounds=2)
    try:
        run = network.run(app)
        await_contributions(app / "run", N_NODES - 1)
    finally:
        aside.rename(data)
    assert network.wait(run, TIMEOUT) == "finished:completed"
    said = f"<class 'fwdllm.engine.errors.DataError'>:<'{data} does not exist'>"
    assert said in network.server_log(run)
    [worker] = network.workers(2)
    network.stop_node(2)
    assert not worker.is_running()
    began = time.monotonic()
    network.start_node(2)  # at once, as SuperLink knows that it had ended
    assert time.monotonic() - began < 30
    assert REFUSED not in network.logs()["node-2"]


def test_unknown_nodes_do_not_get_in(network: FlowerNetwork, tmp_path: Path) -> None:
    authority = network.certificates.authority
    unknown = network.start_stranger(
        "unknown", key=write_key_pair(tmp_path / "key"), authority=authority
    )
    keyless = network.start_stranger("keyless", authority=authority)
    for stranger in (unknown, keyless):
        assert stranger.process.wait(timeout=60) == 1
    assert REFUSED in unknown.output
    assert "SuperNode authentication is enabled" in keyless.output
    assert "No SuperNode found with the given public key" in network.logs()["superlink"]
    nodes = network.flwr("supernode", "list", "test")["nodes"]
    assert {int(node["node-id"]) for node in nodes} == set(network.node_ids)
