"""Seconds and bytes a round with Flower's own nodes and with nodes that stay warm, in turn.

    python tests/warm_nodes.py MODEL.gguf DATA.jsonl [--nodes 3] [--rounds 6] [--repeats 2]
        [--database]

SuperLink, ServerApp and nodes over TLS on loopback, 4 examples of at most 128 tokens and one
direction of forward-ad. Says whether the adapters have the same bits. With --database SuperLink
keeps its state on disk, which costs time at every request; without, as is its default, in memory.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "support"))
from counting_proxy import CountingProxy
from flower_network import HOST, FlowerNetwork

from fwdllm.federation.app_directory import init
from fwdllm.protocol.ledger import NAME, Ledger


def measure(folder: Path, given: argparse.Namespace, warm: bool) -> tuple[list[float], bytes]:
    """Seconds of the rounds after the first, and the adapter's hash at the end.

    Prints the bytes between a node and SuperLink, TLS included; the app's files are in them once.
    """
    changes = {"per_round": given.nodes, "batch_size": 4, "perturbations": 1, "max_tokens": 128}
    app = init(
        folder / "app",
        given.model,
        given.data,
        "mezo",
        rounds=given.rounds,
        min_nodes=given.nodes,
        changes={**changes, "method": "forward-ad"},
    )
    network = FlowerNetwork(
        folder / "flower",
        given.nodes,
        node_config=lambda _: {"data": str(given.data)},
        warm=warm,
        in_memory=not given.database,
    )
    proxy = CountingProxy(HOST, network.port)
    network.node_port = proxy.port
    with network:
        before = proxy.up, proxy.down, proxy.connections
        run = network.run(app)
        status = network.wait(run, 3600)
        assert status == "finished:completed", network.server_log(run)
        n_answers = given.nodes * given.rounds
        up, down = ((proxy.up - before[0]) / n_answers, (proxy.down - before[1]) / n_answers)
        opened = (proxy.connections - before[2]) / n_answers
    print(f"an answer: {up:.0f} B up, {down:.0f} B down, {opened:.1f} connections", flush=True)
    with Ledger(app / "run" / NAME) as ledger:
        rounds = ledger.rounds()
    closed = [r.closed for r in rounds]
    return [b - a for a, b in itertools.pairwise(closed)], rounds[-1].theta


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    for name, default in (("nodes", 3), ("rounds", 6), ("repeats", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--database", action="store_true")
    given = parser.parse_args()
    given.model, given.data = given.model.resolve(), given.data.resolve()
    seconds: dict[bool, list[float]] = {False: [], True: []}
    hashes = set()
    for _ in range(given.repeats):
        for warm, found in seconds.items():
            with tempfile.TemporaryDirectory(prefix="fwdllm-") as folder:
                times, theta = measure(Path(folder), given, warm)
            found += times
            hashes.add(theta)
            print("warm" if warm else "Flower's", [round(t, 2) for t in times], flush=True)
    usual, warm = (statistics.median(found) for found in seconds.values())
    print(f"a round: {usual:.2f} s and, warm, {warm:.2f} s: {usual / warm:.2f} times")
    print("the adapters have the same bits" if len(hashes) == 1 else "THE ADAPTERS DIFFER")


if __name__ == "__main__":
    main()
