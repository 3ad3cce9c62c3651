"""Runs of a root and its shards, whose clients are those of ``ledger_runs``.

Run as a script it is one shard that obeys stdin and may kill itself:
``python shard_runs.py LEDGER MOMENT``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ledger_runs import HEAD_OF_2, SHAPES, contribution, fast, make

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.shards import folder_of
from fwdllm.kernels import cpu
from fwdllm.protocol import wire
from fwdllm.protocol.ledger import NAME, Ledger, open_run
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.records import Meta
from fwdllm.protocol.report import Report
from fwdllm.protocol.server import Closed, Server
from fwdllm.protocol.shards.shard import Shard

N_CLIENTS = 40
SHARED: dict[str, Any] = {"seeds": "shared", "per_round": 30, "snapshot_every": 2}
PACED = {**SHARED, "pacing": True, "variance_threshold": 1e-3, "max_parts": 3}


def meta_of(n_shards: int, **changes: Any) -> Meta:
    lora = LoRAConfig(rank=2, targets=("attn_q",))
    adapter = Adapter.create("llama", SHAPES, lora, 1, cpu, HEAD_OF_2)
    return Meta.of(make(**{**SHARED, **changes}), adapter, 1, {"model": "toy"}, 77, n_shards)


class Run:
    """A root and its shards, in one process."""

    def __init__(self, folder: Path, n_shards: int, **changes: Any) -> None:
        meta = meta_of(n_shards, **changes)
        self.paths = [folder_of(folder, i) / NAME for i in range(n_shards)]
        self.ledger, *ledgers = (
            fast(open_run(path, meta, resume=False))
            for path in (folder, *(path.parent for path in self.paths))
        )
        self.server, self.shards = Server(self.ledger), [Shard(ledger) for ledger in ledgers]

    def reopen(self, i: int) -> None:
        """A shard anew, from its ledger."""
        self.shards[i].ledger.close()
        self.shards[i] = Shard(fast(Ledger(self.paths[i], writable=True)))

    def open(self) -> list[int]:
        """Open a part; the shards that have an order."""
        orders = self.server.open_shards(range(N_CLIENTS), 0.0)
        for i, order in orders:
            self.shards[i].open(order, 0.0)
        return [i for i, _ in orders]

    def report(self, i: int, client: int) -> Report:
        shard = self.shards[i]
        assert shard.part is not None
        message = shard.assignment(*shard.part, client)
        assert message is not None
        assignment = wire.decode_assignment(message, client)
        return report_of(self.server, assignment)

    def message(self, i: int, client: int) -> bytes:
        return wire.encode_report(self.report(i, client))

    def take(self, i: int, clients: Sequence[int]) -> None:
        messages = [self.message(i, client) for client in clients]
        assert self.shards[i].receive(clients, messages, 1.0) == {}

    def close(self) -> Closed | None:
        for i, _ in self.server.open_shards(range(N_CLIENTS), 0.0):
            assert self.server.receive_shard(i, self.shards[i].close(2.0), 2.0) is None
        return self.server.close_part(2.0)

    def finish(self) -> list[Closed]:
        found = []
        while not self.server.done:
            for i in self.open():
                clients = [int(c) for c in self.shards[i].outstanding() if answers(int(c))]
                # In two batches, of which the second may be empty.
                for batch in (clients[:5], clients[5:]):
                    self.take(i, batch)
            closed = self.close()
            found += [] if closed is None else [closed]
        return found


@contextlib.contextmanager
def running(folder: Path, n_shards: int, **changes: Any) -> Iterator[Run]:
    run = Run(folder, n_shards, **changes)
    try:
        yield run
    finally:
        for ledger in (run.ledger, *(shard.ledger for shard in run.shards)):
            ledger.close()


def answers(client: int) -> bool:
    return client % 7 != 3


def report_of(server: Server, assignment: Assignment) -> Report:
    """An answer whose weight and figures differ from client to client."""
    honest, client = contribution(server.replica, assignment), assignment.client
    return dataclasses.replace(
        honest, n_examples=1 + client % 8, n_tokens=100 + client, seconds=client / 8, loss=0.25
    )


def plain(folder: Path, **changes: Any) -> tuple[np.ndarray, list[Closed]]:
    """The adapter of the same run by the plain server, and its rounds."""
    meta, found = meta_of(0, **changes), []
    with fast(Ledger.create(folder / "plain.sqlite", meta)) as ledger:
        server = Server(ledger)
        while not server.done:
            for a in server.open_part(range(N_CLIENTS), 0.0):
                if answers(a.client):
                    message = wire.encode_report(report_of(server, a))
                    assert server.receive(a.client, message, 1.0) is None
            closed = server.close_part(2.0)
            found += [] if closed is None else [closed]
        return server.replica.theta.copy(), found


class Child:
    """A shard in a process of its own, which dies at a named moment."""

    def __init__(self, path: Path, dies: str = "") -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, path, dies],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, name: str, *arguments: object) -> Any:
        """The answer, or None if the process has died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([name, *arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        return json.loads(line) if line else None

    def end(self) -> int:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        return self._process.wait()


def serve(path: Path, dies: str) -> None:
    """A shard that obeys stdin and dies without a word at the moment's name."""

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    shard = Shard(fast(Ledger(path, writable=True)))
    if dies == "batch":  # within the transaction of the second batch, which has a duplicate
        Ledger.reject = die  # type: ignore[method-assign, assignment]
    n_batches = 0
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        answer: Any = True
        if name == "open":
            shard.open(bytes.fromhex(arguments[0]), 0.0)
        elif name == "receive":
            clients, messages = arguments
            answer = shard.receive(clients, [bytes.fromhex(m) for m in messages], 1.0)
            n_batches += 1
        else:
            answer = shard.close(2.0).hex()
        moment = {"open": "opened", "receive": "accepted", "close": "closed"}[name]
        if dies == moment and (moment != "accepted" or n_batches == 2):
            die()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve(Path(sys.argv[1]), sys.argv[2])
