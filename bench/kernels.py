"""Speed of every kernel under each instruction set, beside this machine's own limits.

The instruction set is chosen when ``fwdllm.kernels.cpu`` is imported, so each instruction set is
measured in its own process.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from fwdllm.bench.kernel_cases import DEFAULT_TYPES, LANES, Call, Case, cases, generator
from fwdllm.bench.shapes import type_named
from fwdllm.bench.worker import Worker
from fwdllm.engine.errors import ConfigError
from fwdllm.kernels import cpu
from fwdllm.kernels.types import QuantType

# A round repeats its call for this long, so that clock resolution and wake-ups do not matter.
ROUND_SECONDS = 0.02


class Kernels:
    """A side of ``bench.worker``: each ``run`` measures the next case; None after the last.

    types: names of tensor types.  rows: of matmuls.  facts: instruction set, threads and limits.
    """

    def __init__(self, types: Sequence[str], rows: Sequence[int], rounds: int) -> None:
        self.cases = cases([QuantType[name] for name in types], rows)
        self.rounds = rounds
        self.peaks = {kind: cpu.peak(kind) / 1e9 for kind in ("int8", "bf16", "fp32", "read")}
        self.peaks["normal"] = self._measure(generator())["rate"]
        self.facts = {"isa": cpu.isa, "threads": cpu.num_threads(), "peaks": self.peaks}

    def run(self) -> dict[str, Any] | None:
        case = next(self.cases, None)
        return None if case is None else {"name": case.name, **self._measure(case)}

    def _measure(self, case: Case) -> dict[str, Any]:
        calls = [case.prepare(), *([case.baseline()] if case.baseline else [])]
        of = self._limit(case.limit)
        limits: list[float] = []
        measure_limit = partial(self._measure_limit, of, limits)
        seconds = time_in_turn(calls, self.rounds, measure_limit)
        rates = [case.work / s for s in seconds[0]]
        found: dict[str, Any] = {
            "rate": statistics.median(rates),
            "rate_range": [min(rates), max(rates)],
            "unit": case.unit,
        }
        if limits:
            shares = [rate / limit for rate, limit in zip(rates, limits, strict=True)]
            found |= {"of": of, "fraction": statistics.median(shares)}
        if case.traffic:
            found["intensity"] = case.work / case.traffic
        if case.baseline:
            ratios = [a / b - 1 for a, b in zip(*seconds, strict=True)]
            found |= {
                "overhead": statistics.median(ratios),
                "overhead_range": [min(ratios), max(ratios)],
            }
        return found

    def _measure_limit(self, kind: str, limits: list[float]) -> None:
        """Append this machine's rate now: if others share its cores, it differs by the minute."""
        if kind in ("int8", "bf16", "fp32"):
            limits.append(cpu.peak(kind) / 1e9)
        elif kind in self.peaks:  # slow to measure, and steadier
            limits.append(self.peaks[kind])

    def _limit(self, kind: str) -> str:
        """The limit that applies to a case of this kind under this instruction set."""
        if kind != "int8":
            return kind
        if cpu.activations == "bf16":
            return "bf16"
        return "int8" if self.peaks["int8"] else "fp32"


def time_in_turn(
    calls: Sequence[Call], rounds: int, before_round: Call = lambda: None
) -> list[list[float]]:
    """Seconds of each call in each round, [call][round]; calls take turns within a round."""
    repeats = []
    for call in calls:
        call()  # warm-up: memory is mapped, threads are started
        repeats.append(max(1, math.ceil(ROUND_SECONDS / _seconds(call, 1))))
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        before_round()
        for call, count, mine in zip(calls, repeats, seconds, strict=True):
            mine.append(_seconds(call, count))
    return seconds


def _seconds(call: Call, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def measure_kernels(
    isas: Sequence[str],
    types: Sequence[str],
    rows: Sequence[int],
    rounds: int,
    on_case: Callable[[str], None],
) -> dict[str, Any]:
    """Measure all cases under each instruction set.

    isas: instruction sets; (): only the best.  types: tensor types; (): ``DEFAULT_TYPES``.
    rows: of matmuls, multiples of ``LANES``.  on_case: called with the name of each finished case.
    The result has "peaks" and "kernels" by instruction set. Rates are in 10^9 a second. "fraction"
    is the share of the limit named by "of", measured in turn; "intensity" is operations
    for a byte read or written at least; "overhead" is the extra time of lanes with a seeded LoRA
    over a plain matmul.
    Errors: ConfigError for an unknown name, or for rounds or rows out of range.
    """
    if rounds < 1 or any(n < LANES or n % LANES for n in rows):
        raise ConfigError(f"--rounds must be at least 1 and --rows a multiple of {LANES}")
    for isa in isas:
        if isa not in cpu.isas:
            raise ConfigError(f"this machine has no {isa!r}; it has: {', '.join(cpu.isas)}")
    names = [type_named(name).name for name in types] or [type.name for type in DEFAULT_TYPES]
    options = {"types": names, "rows": list(rows), "rounds": rounds}
    peaks: dict[str, Any] = {}
    kernels: dict[str, Any] = {}
    threads = 0
    for isa in isas or [cpu.isa]:
        with Worker("fwdllm.bench.kernels:Kernels", options, {"FWDLLM_ISA": isa}) as worker:
            peaks[isa], threads = worker.facts["peaks"], worker.facts["threads"]
            kernels[isa] = {}
            while (found := worker.run().value) is not None:
                name = found.pop("name")
                kernels[isa][name] = found
                on_case(f"{isa}: {name}")
    settings = {**options, "threads": threads}
    return {"command": "kernels", "settings": settings, "peaks": peaks, "kernels": kernels}
