"""Speed of every Triton kernel on this GPU, beside the card's limits measured in the same run.

Times are medians, measured with CUDA events; the L2 cache is flushed before each call. Needs torch,
triton and NumPy only.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fwdllm.bench.shapes import random_weights
from fwdllm.kernels import triton as ops
from fwdllm.kernels.triton import products
from fwdllm.kernels.triton.decode import decoded
from fwdllm.kernels.triton.runtime import DEVICE, INTERPRETED, DeviceWeight
from fwdllm.kernels.types import Lanes, LoRA, QuantType, Weight

Call = Callable[[], object]

DEFAULT_TYPES = (QuantType.Q4_0, QuantType.Q4_K, QuantType.Q6_K, QuantType.Q8_0)
DEFAULT_ROWS = (1, 16, 64, 128, 256, 1024, 4096)
# Up to so many, reading the weights is most of the work.
_FEW_ROWS = 16

_GIGA = 1e9
# About a millisecond.
_QUEUE_CYCLES = 2_000_000
# More than any card's L2 cache.
_FLUSH_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Sizes:
    """Sizes of the inputs; the defaults are a 7B model's. n_out, n_in: of matmuls."""

    n_out: int = 4096
    n_in: int = 11008
    width: int = 4096
    heads: int = 32
    head_dim: int = 128
    tokens: int = 256
    sequences: int = 8
    tangents: int = 8
    lanes: int = 8
    rank: int = 8
    n_vocab: int = 32000
    numbers: int = 1 << 24
    seeds: int = 16
    square: int = 8192
    copied: int = 1 << 30
    layers: int = 16


@dataclass(frozen=True)
class Case:
    """One kernel on one input; the fields are those of ``kernel_cases.Case``.

    baseline: the call relative to which the overhead is measured.  of: a limit, by its name in
    "peaks", or another implementation to compare with.
    """

    name: str
    unit: str
    work: float
    call: Call
    of: str | Call | None = None
    baseline: Call | None = None


class Clock:
    """Measures how many seconds a call takes on the device."""

    def __init__(self) -> None:
        size = 1 if INTERPRETED else _FLUSH_BYTES
        self._cache = torch.empty(size, dtype=torch.int8, device=DEVICE)

    def seconds(self, call: Call) -> float:
        if INTERPRETED:
            begin = time.perf_counter()
            call()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._cache.zero_()
        # Keeps the device busy while the call is queued, which takes Python 0.1 ms for some.
        torch.cuda._sleep(_QUEUE_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def in_turn(self, calls: Sequence[Call], rounds: int) -> list[list[float]]:
        """Seconds of each call in each round, [call][round]: one warm-up, then calls in turn."""
        for call in calls:
            self.seconds(call)
        rows = [[self.seconds(call) for call in calls] for _ in range(rounds)]
        return [list(column) for column in zip(*rows, strict=True)]


def measure_gpu_kernels(
    types: Sequence[QuantType],
    rows: Sequence[int],
    rounds: int,
    on_case: Callable[[str], None],
    sizes: Sizes | None = None,
) -> dict[str, Any]:
    """Measure all cases; the result has the form of ``bench.kernels.measure_kernels``'s.

    "fraction" is the share of a limit of the card, named by "of"; for matmuls it is the speed
    relative to the vendor's bfloat16 matmul of the same shape.
    """
    sizes, clock = sizes or Sizes(), Clock()
    peaks = _peaks(clock, sizes, rounds)
    found: dict[str, Any] = {}
    for case in _cases(types, rows, sizes):
        found[case.name] = _measure(case, clock, peaks, rounds)
        on_case(case.name)
    settings = {"types": [t.name for t in types], "rows": list(rows), "rounds": rounds, **machine()}
    name = settings["device"]
    return {
        "command": "kernels",
        "settings": settings,
        "peaks": {name: peaks},
        "kernels": {name: found},
    }


def machine() -> dict[str, str]:
    """Names of the card and versions of torch and triton."""
    import triton

    name = "interpreter" if INTERPRETED else torch.cuda.get_device_name()
    return {"device": name, "torch": torch.__version__, "triton": triton.__version__}


def _measure(case: Case, clock: Clock, peaks: dict[str, float], rounds: int) -> dict[str, Any]:
    others = [call for call in (case.of, case.baseline) if callable(call)]
    seconds = clock.in_turn([case.call, *others], rounds)
    rates = [case.work / s for s in seconds[0]]
    entry: dict[str, Any] = {
        "rate": statistics.median(rates),
        "rate_range": [min(rates), max(rates)],
        "unit": case.unit,
    }
    if callable(case.of):
        entry |= {"of": "vendor bf16", "fraction": _ratio(seconds[1], seconds[0])}
    elif case.of in peaks:
        entry |= {"of": case.of, "fraction": entry["rate"] / peaks[case.of]}
    if case.baseline:
        ratios = [a / b - 1 for a, b in zip(seconds[0], seconds[-1], strict=True)]
        entry |= {
            "overhead": statistics.median(ratios),
            "overhead_range": [min(ratios), max(ratios)],
        }
    return entry


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _peaks(clock: Clock, sizes: Sizes, rounds: int) -> dict[str, float]:
    """The card's limits in 10^9 a second: bytes read and written by a copy, bfloat16 operations."""
    a = torch.empty(sizes.copied, dtype=torch.int8, device=DEVICE)
    b = torch.empty_like(a)
    n = sizes.square
    x, y = (_random(n, n).bfloat16() for _ in range(2))
    copy, product = clock.in_turn([lambda: b.copy_(a), lambda: x @ y], rounds)
    return {
        "copy": 2 * sizes.copied / statistics.median(copy) / _GIGA,
        "bf16": 2 * n**3 / statistics.median(product) / _GIGA,
    }


def _cases(types: Sequence[QuantType], rows: Sequence[int], sizes: Sizes) -> Iterator[Case]:
    for type in types:
        yield from _products(type, rows, sizes)
    yield from _lanes(max(rows), sizes)
    yield from _seeded(sizes)
    yield from _layers(sizes)
    yield from _attention(sizes)
    yield from _loss(sizes)


def _products(type: QuantType, rows: Sequence[int], sizes: Sizes) -> Iterator[Case]:
    """Matmuls by both routes and by the route that is chosen, for every number of rows."""
    weight = random_device_weight(type, sizes.n_out, sizes.n_in)
    w = decoded(weight, torch.bfloat16)
    shape = f"{type.name} {sizes.n_out}x{sizes.n_in}"
    moved = (weight.data.numel() + 2 * w.numel()) / _GIGA
    yield Case(f"decode {shape}", "GB/s", moved, partial(decoded, weight, torch.bfloat16), "copy")
    for n in rows:
        x = _random(n, sizes.n_in).bfloat16()
        flops = 2 * n * sizes.n_out * sizes.n_in / _GIGA
        vendor = partial(products.vendor, x, w, torch.bfloat16)
        name = f"matmul {shape}x{n}"
        yield Case(name, "GFLOPS", flops, partial(ops.matmul, x, weight), vendor)
        for route, function in (("fused", products.fused), ("scratch", products.by_scratch)):
            call = partial(function, x, weight, torch.bfloat16)
            yield Case(f"{name}, {route}", "GFLOPS", flops, call, vendor)
        if n <= _FEW_ROWS:
            run, read = _layer_after_layer(x, weight, sizes.layers)
            yield Case(f"{name}, {sizes.layers} weights in a row", "GB/s", read, run, "copy")


def _layer_after_layer(x: torch.Tensor, weight: DeviceWeight, n: int) -> tuple[Call, float]:
    """Matmuls by n weights, recorded, and their 10^9 bytes: more than the L2 cache keeps.

    So they run in a model: a single one has no neighbour to hide the time in which it begins.
    """
    copies = [weight.data.clone() for _ in range(n)]
    each = [replace(weight, data=data, fields=data.view(weight.fields.dtype)) for data in copies]

    def run() -> None:
        for w in each:
            ops.matmul(x, w)

    work = sum(data.numel() for data in copies) / _GIGA
    if INTERPRETED:
        return run, work
    run()  # compiled, and what is made once is there
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return partial(_replay, graph, (x, each)), work


def _replay(graph: torch.cuda.CUDAGraph, reads: object) -> None:
    """Launch a graph. reads: what it reads, which lives as long as this can be called."""
    graph.replay()


def _lanes(rows: int, sizes: Sizes) -> Iterator[Case]:
    """Matmuls with a seeded LoRA in several lanes; overhead over plain matmuls."""
    weight = random_device_weight(QuantType.Q4_0, sizes.n_out, sizes.n_in)
    x = _random(rows, sizes.n_in)
    a, b = _random(sizes.rank, sizes.n_in), _random(sizes.n_out, sizes.rank)
    lora: Any = LoRA(a, b, scale=2.0, offset=0)
    flops = 2 * rows * sizes.n_out * sizes.n_in / _GIGA
    for name, inputs, lanes in (
        ("tangents", x.bfloat16(), tangents(sizes.lanes)),
        ("lanes", x, pairs(sizes.lanes)),
    ):
        plain = partial(ops.matmul, inputs, weight)
        yield Case(
            f"matmul Q4_0 {sizes.n_out}x{sizes.n_in}x{rows}, {sizes.lanes} {name}",
            "GFLOPS",
            flops,
            partial(ops.matmul, inputs, weight, lora=lora, lanes=lanes),
            "bf16",
            plain,
        )


def _seeded(sizes: Sizes) -> Iterator[Case]:
    theta = _random(sizes.numbers)
    seeds = np.arange(sizes.seeds, dtype=np.uint64)
    coefficients = np.full(sizes.seeds, 1e-6, np.float32)
    work = sizes.numbers * sizes.seeds / _GIGA
    axpy = partial(ops.seeded_axpy, theta, seeds, coefficients)
    yield Case(f"seeded_axpy {sizes.seeds} seeds", "G/s", work, axpy)
    dot = partial(ops.seeded_dot, theta, seeds)
    yield Case(f"seeded_dot {sizes.seeds} seeds", "G/s", work, dot)


def _layers(sizes: Sizes) -> Iterator[Case]:
    rows, width, t = sizes.sequences * sizes.tokens, sizes.width, sizes.tangents
    gain = _random(width)
    x = _random(rows * (1 + t), width).bfloat16()
    array = x.numel() * x.element_size() / _GIGA
    table = np.ones((sizes.tokens, sizes.head_dim // 2), np.float32)
    positions = torch.arange(sizes.tokens, dtype=torch.int32, device=DEVICE)
    positions = positions.repeat(sizes.sequences * (1 + t))
    calls: tuple[tuple[str, int, Call], ...] = (
        ("rms_norm", 2, partial(ops.rms_norm, x, gain, 1e-5, t)),
        ("layer_norm", 2, partial(ops.layer_norm, x, gain, gain, 1e-5, t)),
        ("rope", 2, partial(ops.rope, x, positions, table, table, sizes.head_dim, True)),
        ("swiglu", 3, partial(ops.swiglu, x, x, t)),
        ("gelu", 2, partial(ops.gelu, x, t)),
    )
    for name, arrays, call in calls:
        yield Case(f"{name} {rows}x{width}, {t} tangents", "GB/s", arrays * array, call, "copy")


def _attention(sizes: Sizes) -> Iterator[Case]:
    width = sizes.heads * sizes.head_dim
    seen = sizes.sequences * sizes.tokens * (sizes.tokens + 1) // 2
    for t in (0, sizes.tangents):
        sequences = sizes.sequences * (1 + t)
        q, k, v = (_random(sequences * sizes.tokens, width).bfloat16() for _ in range(3))
        starts = np.arange(sequences + 1, dtype=np.int32) * np.int32(sizes.tokens)
        call = partial(
            ops.attention,
            q,
            k,
            v,
            starts,
            head_dim=sizes.head_dim,
            scale=sizes.head_dim**-0.5,
            causal=True,
            tangents=t,
        )
        work = 4 * seen * width * (1 + 2 * t) / _GIGA
        name = f"attention {sizes.sequences}x{sizes.tokens}, {sizes.heads} heads, {t} tangents"
        yield Case(name, "GFLOPS", work, call, "bf16")


def _loss(sizes: Sizes) -> Iterator[Case]:
    weight = random_device_weight(QuantType.Q4_0, sizes.n_vocab, sizes.width)
    rows = sizes.tokens * sizes.lanes
    x = _random(rows, sizes.width).bfloat16()
    labels = torch.arange(rows, dtype=torch.int32, device=DEVICE) % sizes.n_vocab
    call = partial(ops.cross_entropy, x, weight, labels, lanes=tangents(sizes.lanes))
    work = 2 * rows * sizes.n_vocab * sizes.width / _GIGA
    name = f"cross_entropy Q4_0 {sizes.n_vocab}x{sizes.width}x{rows}, {sizes.lanes} tangents"
    yield Case(name, "GFLOPS", work, call, "bf16")


def pairs(n: int) -> Lanes:
    """n lanes: both sides of n / 2 central differences."""
    signs = np.tile(np.array([1e-3, -1e-3], np.float32), n // 2)
    return Lanes(np.repeat(np.arange(n // 2, dtype=np.uint64), 2), signs)


def tangents(n: int) -> Lanes:
    """A primal and n - 1 tangents."""
    coefficients = np.r_[np.float32(0), np.ones(n - 1, np.float32)]
    return Lanes(np.arange(n, dtype=np.uint64), coefficients, tangents=True)


def random_device_weight(type: QuantType, n_out: int, n_in: int) -> DeviceWeight:
    """A weight of random quantized blocks on the device."""
    data = random_weights(np.random.default_rng(0), type, n_out, n_in, 1 / math.sqrt(n_in))
    return ops.weight(Weight(data, type, n_out, n_in))


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE)
