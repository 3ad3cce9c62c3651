"""A round of very many reports, taken by several processes with a ledger each.

Reports are random but valid, encoded as on the wire, of clients in a random order; no model is
used. Root and shards do what they do in a run; what comes from elsewhere, the reports, is made
before the clock starts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.bench.protocol import make_adapter
from fwdllm.bench.worker import Worker
from fwdllm.engine.errors import ConfigError
from fwdllm.federation.shards import folder_of
from fwdllm.kernels import cpu
from fwdllm.protocol import wire
from fwdllm.protocol.federation import MAX_CLIENTS, FederationConfig
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.records import Meta
from fwdllm.protocol.report import Report
from fwdllm.protocol.server import Server
from fwdllm.protocol.shards.messages import MAX_SHARDS
from fwdllm.protocol.shards.shard import Shard
from fwdllm.resources import peak_rss_bytes

# Reports that a process finds waiting each time it looks.
_BATCH = 4096
# Reports made at a time, so that memory is theirs and little more.
_PIECE = 1 << 16
_ORDER = "order"


def measure_shards(reports: int, processes: int, perturbations: int, rounds: int) -> dict[str, Any]:
    """Measure rounds of so many reports with ``perturbations`` scalars each; medians over rounds.

    Errors: ConfigError.
    """
    if min(reports, perturbations, rounds) < 1 or reports > MAX_CLIENTS:
        raise ConfigError(
            f"reports must be 1 to {MAX_CLIENTS}, perturbations and rounds at least 1"
        )
    if not 1 <= processes <= min(reports, MAX_SHARDS):
        raise ConfigError(f"processes must be 1 to {MAX_SHARDS}, and no more than reports")
    config = FederationConfig(
        rounds=rounds + 1,
        per_round=reports,
        perturbations=perturbations,
        seeds="shared",
        optimizer="sgd",
        snapshot_every=rounds + 2,
    )
    with tempfile.TemporaryDirectory(prefix="fwdllm-") as name:
        folders = [folder_of(Path(name), i) for i in range(processes)]
        meta = Meta.of(config, make_adapter(config), config.seed, {}, 0, processes)
        for folder in folders:
            folder.mkdir()
            Ledger.create(folder / NAME, meta).close()
        with Ledger.create(Path(name) / NAME, meta) as ledger, ExitStack() as stack:
            workers = [stack.enter_context(_worker(folder)) for folder in folders]
            found = [_round(Server(ledger), folders, workers) for _ in range(rounds)]
            peaks = [worker.run().peak_rss_bytes for worker in workers]
        medians = {key: statistics.median(one[key] for one in found) for key in found[0]}
        return {
            "command": "protocol",
            "settings": {
                "reports": reports,
                "processes": processes,
                "perturbations": perturbations,
                "rounds": rounds,
                "isa": cpu.isa,
                "threads": cpu.num_threads(),
            },
            **medians,
            "reports_per_s": reports / medians["take_seconds"],
            "report_bytes": wire.report_size(((1, perturbations), (1, 0), 0)),
            "ledger_bytes": _size(Path(name)) / rounds,
            "shards_bytes": sum(map(_size, folders)) / rounds,
            "peak_rss_bytes": peak_rss_bytes(),
            "shard_peak_rss_bytes": max(peaks),
        }


class Taker:
    """The side of a process that takes reports. folder: of its ledger, and of its orders."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)
        self._shard = Shard(Ledger(self._folder / NAME, writable=True))
        self._clients: list[int] = []
        self._reports = memoryview(b"")
        self.facts: dict[str, Any] = {}

    def open(self) -> None:
        self._shard.open((self._folder / _ORDER).read_bytes(), 0.0)

    def prepare(self) -> None:
        """Make the reports that will come, and their order."""
        assert self._shard.part is not None
        random = np.random.default_rng(self._shard.part[0])
        self._clients = random.permutation(self._shard.outstanding()).tolist()
        first = self._shard.assignment(*self._shard.part, self._clients[0])
        assert first is not None
        self._reports = _synthetic(wire.decode_assignment(first).seeds.shape, self._shard, random)

    def take(self) -> float:
        """Seconds of a core that it took."""
        clock = time.process_time()
        n, width = len(self._clients), len(self._reports) // len(self._clients)
        for at in range(0, n, _BATCH):
            end = min(at + _BATCH, n)
            messages = [bytes(self._reports[i * width : (i + 1) * width]) for i in range(at, end)]
            assert not self._shard.receive(self._clients[at:end], messages, 0.0)
        return time.process_time() - clock

    def close(self) -> str:
        return self._shard.close(0.0).hex()

    def run(self) -> None:
        """Nothing: its answer has the memory."""


def _size(folder: Path) -> int:
    """Bytes of the ledger in a folder."""
    return sum(path.stat().st_size for path in folder.glob(f"{NAME}*"))


def _worker(folder: Path) -> Worker:
    return Worker("fwdllm.bench.shards:Taker", {"folder": str(folder)})


def _round(server: Server, folders: Sequence[Path], workers: Sequence[Worker]) -> dict[str, float]:
    with ThreadPoolExecutor(len(workers)) as pool:

        def all_of(method: str) -> list[Any]:
            return list(pool.map(lambda worker: worker.call(method), workers))

        clock = time.perf_counter()
        for i, order in server.open_shards(range(server.config.per_round), 0.0):
            (folders[i] / _ORDER).write_bytes(order)
        all_of("open")
        planning = time.perf_counter() - clock
        all_of("prepare")
        clock = time.perf_counter()
        cores = sum(all_of("take"))
        taking = time.perf_counter() - clock
        clock = time.perf_counter()
        for i, told in enumerate(all_of("close")):
            assert server.receive_shard(i, bytes.fromhex(told), 0.0) is None
        closed = server.close_part(0.0)
        closing = time.perf_counter() - clock
    assert closed is not None and closed.n_accepted == server.config.per_round
    return {
        "plan_seconds": planning,
        "take_seconds": taking,
        "take_core_seconds": cores,
        "close_seconds": closing,
        "round_seconds": planning + taking + closing,
    }


def _synthetic(shape: tuple[int, ...], shard: Shard, random: np.random.Generator) -> memoryview:
    """Encoded reports, one after another, of all that the shard waits for."""
    round, part = shard.part or (0, 0)
    zeros = np.zeros(shape, np.float32)
    one = wire.encode_report(Report(round, part, 8, 1000, 1.0, 2.0, zeros, zeros[:, :0]))
    dtype = wire.report_dtype(shape[1])
    found = np.repeat(np.frombuffer(one, dtype), len(shard.outstanding()))
    for at in range(0, len(found), _PIECE):
        piece = found["scalars"][at : at + _PIECE]
        piece[:] = random.standard_normal(piece.shape, np.float32) * 1e-3
    return found.view(np.uint8).data
