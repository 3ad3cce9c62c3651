"""How many nodes one SuperLink carries: rounds a minute, memory, replies lost, servers killed.

    python tests/many_nodes.py MODEL.gguf DATA.jsonl [--nodes 200] [--rounds 20]
        [--kills 10] [--processes 4] [--in-memory]

Flower's SuperLink and ServerApp, and nodes of ``fwdllm federate node`` over TLS on loopback. Nodes
of a process are threads with a connection, a key and a state of their own each, and share the
process that computes. With kills the ServerApp is killed at random moments and started again.
SuperLink keeps its state in a database or, with --in-memory, as is its default, in memory.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import random
import sqlite3
import statistics
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent / "support"))
from flower_network import HOST, FlowerNetwork

from fwdllm.federation.app_directory import init
from fwdllm.protocol.figures import traffic_by_client
from fwdllm.protocol.flower.node import NodeConfig
from fwdllm.protocol.flower.supernode import Link, serve
from fwdllm.protocol.flower.worker import Worker
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.replay import replay, verify

_DEADLINE = 120.0


def host(link: Link, data: Path, n_nodes: int) -> None:
    """So many nodes in this process, until it is killed."""
    worker = Worker(NodeConfig(str(data)))
    threads = [threading.Thread(target=serve, args=(link, worker)) for _ in range(n_nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def await_online(network: FlowerNetwork, n_nodes: int) -> None:
    """Wait until SuperLink knows so many nodes."""
    while len(network.flwr("supernode", "list", "test")["nodes"]) < n_nodes:
        time.sleep(5)


def drive(network: FlowerNetwork, app: Path, kills: int) -> None:
    """Run the app to its end, and kill its server at so many random moments on the way."""
    rng, kept = random.Random(0), 0
    run = network.run(app)
    for _ in range(kills):
        time.sleep(rng.uniform(3, 15))
        if network.finished(run):
            break
        network.kill_server_app()
        now = n_contributions(app)
        assert now >= kept, f"{kept - now} contributions are lost"
        kept = now
        print(f"killed with {kept} contributions", flush=True)
        run = network.run(app)
    status = network.wait(run, 3600)
    assert status == "finished:completed", network.server_log(run)


def n_contributions(app: Path) -> int:
    path = app / "run" / NAME
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path, timeout=10)) as database:
        return int(database.execute("SELECT count(*) FROM contribution").fetchone()[0])


class Memory(threading.Thread):
    """The most that processes have had resident at once, in bytes: SuperLink's, and the hosts'."""

    def __init__(self, network: FlowerNetwork, hosts: list[Any]) -> None:
        super().__init__(daemon=True)
        self._superlink, self._hosts = network.superlink_pid, hosts
        self.superlink = self.nodes = 0

    def run(self) -> None:
        while True:
            self.superlink = max(self.superlink, resident(self._superlink))
            self.nodes = max(self.nodes, sum(resident(host.pid) for host in self._hosts))
            time.sleep(1)


def resident(pid: int) -> int:
    """Of a process and all that it has started."""
    total = 0
    try:
        top = psutil.Process(pid)
        for process in [top, *top.children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    for name, default in (("nodes", 200), ("rounds", 20), ("kills", 0), ("processes", 4)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--in-memory", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fwdllm-") as name:
        folder = Path(name)
        network = FlowerNetwork(folder / "flower", 0, registered=False, in_memory=given.in_memory)
        changes = {"per_round": given.nodes, "batch_size": 1, "perturbations": 1, "max_tokens": 32}
        app = init(
            folder / "app",
            given.model,
            given.data,
            "mezo",
            rounds=given.rounds,
            min_nodes=given.nodes,
            changes={**changes, "deadline": _DEADLINE, "method": "forward-ad"},
        )
        link = Link(f"{HOST}:{network.port}", network.certificates.authority)
        shares = [given.nodes // given.processes] * given.processes
        shares[0] += given.nodes % given.processes
        context = multiprocessing.get_context("spawn")
        hosts = [context.Process(target=host, args=(link, given.data, n)) for n in shares]
        with network:
            for process in hosts:
                process.start()
            try:
                await_online(network, given.nodes)
                memory = Memory(network, hosts)
                memory.start()
                began = time.monotonic()
                drive(network, app, given.kills)
                seconds = time.monotonic() - began
            finally:
                for process in hosts:
                    process.kill()
        report(app / "run", seconds, memory)


def report(run_dir: Path, seconds: float, memory: Memory) -> None:
    with Ledger(run_dir / NAME) as ledger:
        verify(ledger)
        replay(ledger)
        closed = [r.closed for r in ledger.rounds()]
        traffic = traffic_by_client(ledger)
        rejected = len(ledger.rejections())
    between = [b - a for a, b in itertools.pairwise(closed)]
    print(
        f"{len(closed)} rounds in {seconds:.0f} s; a round after the first "
        f"{statistics.median(between):.1f} s ({min(between):.1f} to {max(between):.1f})"
    )
    asked, accepted = sum(row[1] for row in traffic), sum(row[2] for row in traffic)
    print(f"{len(traffic)} clients asked {asked} times, {accepted} answers, {rejected} rejected")
    print(f"resident: SuperLink and ServerApp {memory.superlink / 1e6:.0f} MB, nodes ", end="")
    print(f"{memory.nodes / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
