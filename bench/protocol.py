"""What a server does with contributions: its time beside that of generating their directions.

The adapter is LLaMA-7B's of rank 8 on q and v, 4.2 million parameters. Clients are made up: what
they send is random, but of the right form, and goes the whole way through the ledger.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.adapter import Adapter, LoRAConfig
from fwdllm.engine.errors import ConfigError
from fwdllm.kernels import cpu
from fwdllm.kernels.cpu import _native
from fwdllm.protocol import wire
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.ledger import NAME, Ledger, Meta
from fwdllm.protocol.report import Report
from fwdllm.protocol.server import Server

LAYERS, WIDTH = 32, 4096

# Elements of a direction at a time: enough for all threads, and they stay in the caches.
_BUFFER = 1 << 17


def measure_protocol(contributions: int, perturbations: int, rounds: int) -> dict[str, Any]:
    """Aggregate a round's contributions, in turn with generating as many normal numbers.

    contributions: clients of the round, each with ``perturbations`` scalars.  "ratio" is the time
    of closing a round (decoding, both halves' sums, their variance, the step, hash, snapshot) over
    that of the normal numbers; medians over rounds.  Errors: ConfigError.
    """
    if min(contributions, perturbations, rounds) < 1:
        raise ConfigError("contributions, perturbations and rounds must be at least 1")
    config = FederationConfig(
        rounds=rounds + 1,
        per_round=contributions,
        perturbations=perturbations,
        optimizer="sgd",
        pacing=True,
        max_parts=1,
        snapshot_every=rounds + 2,
    )
    with tempfile.TemporaryDirectory(prefix="fwdllm-") as folder:
        adapter = _adapter(config)
        meta = Meta.of(config, adapter, config.seed, {}, 0)
        with Ledger.create(Path(folder) / NAME, meta) as ledger:
            return _measure(Server(ledger), contributions, perturbations, rounds)


def _measure(server: Server, contributions: int, perturbations: int, rounds: int) -> dict[str, Any]:
    n = server.replica.space.size
    closing, generating, receiving, planning, sizes, downs = [], [], [], [], [], []
    for _ in range(rounds):
        clock = time.perf_counter()
        assignments = server.open_part(range(contributions), 0.0)
        planning.append(time.perf_counter() - clock)
        messages = [(a.client, _message(a.round, a.seeds.shape, a.client)) for a in assignments]
        sizes.append(len(messages[0][1]))
        clock = time.perf_counter()
        with server.ledger.batch():
            for client, message in messages:
                assert server.receive(client, message, 0.0) is None
        receiving.append((time.perf_counter() - clock) / contributions)
        clock = time.perf_counter()
        server.close_part(0.0)
        closing.append(time.perf_counter() - clock)
        generating.append(_generate(n * contributions * perturbations))
        downs.append(len(server.ledger.rounds(server.round - 1)[0].message or b""))
    ratios = [a / b for a, b in zip(closing, generating, strict=True)]
    return {
        "command": "protocol",
        "settings": {
            "parameters": n,
            "contributions": contributions,
            "perturbations": perturbations,
            "rounds": rounds,
            "isa": cpu.isa,
            "threads": cpu.num_threads(),
        },
        "close_seconds": statistics.median(closing),
        "normals_seconds": statistics.median(generating),
        "ratio": statistics.median(ratios),
        "ratio_range": [min(ratios), max(ratios)],
        "plan_seconds": statistics.median(planning),
        "receive_seconds": statistics.median(receiving),
        "report_bytes": sizes[0],
        "update_bytes": int(statistics.median(downs)),
        "state_bytes": 4 * n,
    }


def _adapter(config: FederationConfig) -> Adapter:
    shapes = {
        f"blk.{layer}.{name}": (WIDTH, WIDTH)
        for layer in range(LAYERS)
        for name in ("attn_q", "attn_v")
    }
    return Adapter.create("llama", shapes, LoRAConfig(8, 16), config.seed, cpu)


def _message(round: int, shape: tuple[int, ...], client: int) -> bytes:
    slopes = np.random.default_rng(client).normal(size=shape).astype(np.float32) * 1e-3
    none = np.zeros((len(slopes), 0), np.float32)
    return wire.encode_report(Report(round, 0, 8, 1000, 1.0, 2.0, slopes, none))


def _generate(count: int) -> float:
    """Seconds of generating so many normal numbers, into the same buffer again and again."""
    buffer = np.empty(_BUFFER, np.float32)
    clock = time.perf_counter()
    for i in range(-(-count // _BUFFER)):
        _native.random_values("normal", 1, i * _BUFFER, buffer)
    return time.perf_counter() - clock
