"""Times shapes that programs of the Triton kernels could have on this GPU, a table for each kernel.

    python bench/studies/gpu_shapes.py [--only few,scratch,lora,attention,back,rope,factors]
        [--seconds 40]

Runs from the sources on a machine with torch, triton and NumPy. Candidates are compiled first, in
threads, until the seconds are over; Triton keeps them, so another run has time for the rest. A line
has microseconds with a cold L2 cache, the relative error to a plain computation in float32, and the
shape in the kernel's own names, or why it failed. With TRITON_INTERPRET=1 and --small, some of each
group run on a CPU, for their errors.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gpu import use_sources

use_sources()
from fwdllm.bench import gpu_kernels  # noqa: E402
from fwdllm.bench.gpu_kernels import Sizes, random_device_weight  # noqa: E402
from fwdllm.kernels import triton as ops  # noqa: E402
from fwdllm.kernels.triton import decode, few, lora  # noqa: E402
from fwdllm.kernels.triton.products import added  # noqa: E402
from fwdllm.kernels.triton.random import elements  # noqa: E402
from fwdllm.kernels.triton.runtime import DEVICE, INTERPRETED, cdiv, usable  # noqa: E402
from fwdllm.kernels.types import Lanes, LoRA, QuantType  # noqa: E402

# The package has functions of these names, too.
attention, matmul, rope = (
    import_module(f"fwdllm.kernels.triton.{name}") for name in ("attention", "matmul", "rope")
)
Shapes = Sequence[tuple[int, ...]]
Results = Sequence[Tensor]
Given = dict[str, Any]
Call = Callable[..., Any]
Candidates = dict[str, tuple[Call, Call]]
TILE = ("BM", "BN", "num_warps", "num_stages")
SMALL = Sizes(64, 256, 32, 2, 32, 20, 1, 2, 4, 8)
TYPES = (QuantType.Q4_0, QuantType.Q4_K, QuantType.Q6_K, QuantType.Q8_0)
# By rows of x: rows, outputs, warps, stages and parts.
FEW: dict[int, Shapes] = {
    1: [(8, *s, 8) for s in ((64, 2, 3), (64, 2, 2), (32, 1, 3))] + [(8, 64, 2, 3, 4)],
    16: [(16, *s, 8) for s in ((64, 2, 3), (64, 2, 2), (32, 1, 3))],
    32: [(32, *s, 8) for s in ((64, 2, 3), (64, 2, 2), (64, 4, 3))],
    64: [(64, *s, 8) for s in ((64, 2, 2), (64, 4, 2), (128, 4, 2))],
}
SCRATCH = [(b, w) for b in (32, 64, 128) for w in (4, 8) if 8 <= b // w <= 16]
UP = list(product((32, 64, 128), (64, 128), (4, 8)))
DOWN = [(*s, *w) for *s, w in product((32, 64, 128), (1024, 2048), ((4, 3), (4, 4), (8, 3)))]
# Queries, or on the way back to keys these; others at a time; warps; stages.
NARROW = [(64, 32, 4, 1), (64, 32, 4, 3), (64, 64, 4, 1), (64, 64, 4, 2)]
NARROW += [(128, 32, 8, 2), (128, 64, 8, 1), (128, 64, 8, 2)]
TANGENTS = [(64, 32, 4, 1), (64, 16, 4, 2), (64, 16, 4, 3), (128, 32, 8, 1), (128, 32, 8, 2)]
TANGENTS += [(64, 32, 4, 3), (64, 32, 8, 2), (32, 32, 4, 2)]
WIDE = [(64, 16, 4, 1), (64, 16, 4, 2), (64, 32, 8, 1), (32, 32, 4, 1), (32, 16, 4, 1)]
WIDE += [(128, 32, 8, 1), (32, 64, 8, 1)]
BACK = [(16, 32, 4, 1), (16, 32, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1), (32, 16, 4, 1)]
BACK += [(32, 16, 8, 1), (16, 16, 4, 1), (32, 64, 8, 1), (64, 16, 4, 1), (64, 32, 8, 1)]
ROPE = [(32, 8), (32, 16), (16, 4), (16, 2), (8, 4), (8, 2), (4, 1)]
FACTORS = [(32, 32, 4, 6), (64, 32, 4, 3), (64, 32, 8, 4), (16, 32, 4, 6), (32, 16, 4, 4)]
FACTORS += [(32, 16, 2, 6), (32, 64, 8, 4)]


class Recorder:
    """Stands in for a kernel, and keeps the arguments and options of its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.found = kernel, []  # type: Any, list[Given]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            self.found.append(dict(zip(self.kernel.arg_names, arguments, strict=False)) | options)
            self.kernel[grid](*arguments, **options)

        return launch


def launches(module: Any, name: str, call: Callable[..., object], *inputs: Any) -> list[Given]:
    """What launches of a kernel are given in a call."""
    recorder = Recorder(getattr(module, name))
    with patch.object(module, name, recorder):
        call(*inputs)
    return recorder.found


@dataclass(frozen=True)
class Table:
    """Launches of a kernel that differ in their shapes.

    given: what the kernel is given now.  names: of the numbers of a shape.  grid: of a launch; it
    also sets what else depends on the shape.  wanted: the right results.  outputs: names of what is
    written, over ``blank``.  results: made of these.  check: of a launch, for more than results.
    """

    title: str
    kernel: Any
    given: Given
    names: Sequence[str]
    shapes: Shapes
    grid: Callable[[Given], tuple[int, ...]]
    wanted: Callable[[], Results]
    outputs: Sequence[str]
    results: Callable[..., Results] = lambda *outputs: outputs
    blank: float = float("nan")
    check: Callable[[Call, Given], object] = lambda launch, given: None

    def candidates(self) -> Candidates:
        """By name, a call to time, and one that returns checked results."""
        now = tuple(self.given.get(name, 4) for name in self.names)  # 4 warps if it says nothing
        found: Candidates = {}
        for shape in dict.fromkeys([now, *self.shapes[:: 6 if INTERPRETED else 1]]):
            given = self.given | dict(zip(self.names, shape, strict=True))
            launch = self.kernel[self.grid(given)]
            name = ", ".join(f"{name} {given[name]}" for name in self.names)
            calls = (partial(self.run, launch, given), partial(self.tried, launch, given))
            found[name + " (now)" * (shape == now)] = calls
        return found

    def run(self, launch: Call, given: Given) -> Results:
        launch(**given)
        return self.results(*(given[name] for name in self.outputs))

    def tried(self, launch: Call, given: Given) -> Results:
        for name in self.outputs:
            given[name].fill_(self.blank)
        found = [x.clone() for x in self.run(launch, given)]
        self.check(launch, given)
        return found


def randoms(count: int, *shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(count)]


def sums(parts: Tensor) -> Results:
    return (added(parts, torch.float32),)


def weights(sizes: Sizes) -> Iterator[tuple[str, ops.DeviceWeight, Tensor]]:
    """Weights, and the same decoded by the kernel for any rows, which does not do it in steps."""
    for type in TYPES[1:2] if INTERPRETED else TYPES:
        weight = random_device_weight(type, sizes.n_out, sizes.n_in)
        plain = decode.decoded(weight, torch.float32, torch.arange(sizes.n_out, device=DEVICE))
        yield f"{type.name} {sizes.n_out} x {sizes.n_in}", weight, plain


def of_few(sizes: Sizes) -> Iterator[Table]:
    """x W^T of few rows."""

    def grid(given: Given) -> tuple[int, ...]:
        y, n_parts = given["y"], given["PARTS"]
        tiles = cdiv(sizes.n_out, given["BO"]), cdiv(given["rows"], given["BM"])
        given["parts"] = y.new_empty(n_parts, *y.shape, dtype=torch.float32)
        given["done"] = y.new_zeros(tiles[0] * tiles[1], dtype=torch.int32)
        return tiles[0], n_parts, tiles[1]

    names = ("BM", "BO", "num_warps", "STAGES", "PARTS")
    for name, weight, plain in weights(sizes):
        for rows, shapes in FEW.items():
            [x] = randoms(1, rows, sizes.n_in, dtype=torch.bfloat16)
            [given] = launches(few, "_few", few.few, x, weight, torch.float32)
            title = f"few: {name}, {rows} rows"
            right = partial(lambda x, plain: (x.float() @ plain.T,), x, plain)
            yield Table(title, few._few, given, names, shapes, grid, right, ["y"])


def of_scratch(sizes: Sizes) -> Iterator[Table]:
    """Decoding to bfloat16."""
    names = ("BLOCK", "num_warps")
    for name, weight, plain in weights(sizes):
        [given] = launches(decode, "_steps", decode.decoded, weight, torch.bfloat16)
        right, grid = partial(tuple, [plain]), lambda now: (cdiv(now["size"], now["BLOCK"]),)
        yield Table(f"scratch: {name}", decode._steps, given, names, SCRATCH, grid, right, ["out"])


def adapted(rows: Tensor, factor: Tensor, offset: int, lanes: Lanes) -> Results:
    """rows (factor + c z)^T of each lane, or of tangents the derivative: [lanes, n, columns]."""
    each = rows.float().view(len(lanes), -1, rows.shape[1])
    found = []
    for own, seed, c in zip(each, lanes.seeds, lanes.coefficients, strict=True):
        z = elements(int(seed), offset, factor.numel(), lanes.distribution).view_as(factor)
        found.append(own @ factor.T + float(c) * ((each[0] if lanes.tangents else own) @ z.T))
    return (torch.stack(found),)


def of_lora(sizes: Sizes) -> Iterator[Table]:
    """An adapter's two products, of tangents in bfloat16 and of both sides of differences."""
    weight = random_device_weight(QuantType.Q4_0, sizes.n_out, sizes.n_in)
    [a], [b] = randoms(1, sizes.rank, sizes.n_in), randoms(1, sizes.n_out, sizes.rank)
    adapter, n = LoRA(a, b, scale=2.0, offset=0), 2 * sizes.tokens
    [x] = randoms(1, sizes.lanes * n, sizes.n_in)

    def up(given: Given) -> tuple[int, ...]:
        given["part_blocks"] = cdiv(n, given["BM"])
        return given["part_blocks"], sizes.lanes, cdiv(sizes.n_out, given["BN"])

    def down(given: Given) -> tuple[int, ...]:
        given["part_blocks"], chunks = cdiv(n, given["BM"]), cdiv(sizes.n_in, given["chunk"])
        given["u"] = given["u"].new_empty(chunks, *given["u"].shape[1:])
        return given["part_blocks"], sizes.lanes, chunks

    def wanted_up(given: Given, lanes: Lanes) -> Results:
        [y] = adapted(adapter.scale * given["u"][:, : sizes.rank], b, adapter.offset_b, lanes)
        if given["product"] is not None:
            own = given["product"].float().view_as(y)
            for lane, reference in enumerate(lanes.references):
                y[lane] += own[lane] + (own[reference] if reference != lane else 0.0)
        return (y,)

    kinds = {"tangents": (x.bfloat16(), gpu_kernels.tangents(sizes.lanes))}
    kinds["differences"] = (x, gpu_kernels.pairs(sizes.lanes))
    for kind, (rows, lanes) in kinds.items():
        call = partial(ops.matmul, rows, weight, lora=adapter, lanes=lanes)
        [given] = launches(lora, "_up", call)
        title, right = f"{sizes.lanes} lanes of {n} rows, {kind}", partial(wanted_up, given, lanes)
        yield Table(f"lora: up, {title}", lora._up, given, TILE[:3], UP, up, right, ["y"])
        [given] = launches(lora, "_down", call)
        title, right = f"down with adding, {title}", partial(adapted, rows, a, 0, lanes)
        names = ("BM", "chunk", *TILE[2:])
        yield Table(f"lora: {title}", lora._down, given, names, DOWN, down, right, ["u"], sums)


def attended(sizes: Sizes, *qkv: Tensor) -> Tensor:
    """Causal attention by its formula."""
    heads = (-1, sizes.tokens, sizes.heads, sizes.head_dim)
    q, k, v = (x.float().view(heads).transpose(1, 2) for x in qkv)
    later = torch.ones(sizes.tokens, sizes.tokens, device=DEVICE).triu(1).bool()
    scores = (q @ k.mT * sizes.head_dim**-0.5).masked_fill(later, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).reshape(qkv[0].shape)


def attention_inputs(
    sizes: Sizes, n: int, dtype: torch.dtype
) -> tuple[list[Tensor], np.ndarray, Given]:
    """q, k, v and cotangents of n sequences, where these start, and options of attention."""
    arrays = randoms(4, n * sizes.tokens, sizes.heads * sizes.head_dim, dtype=dtype)
    starts = np.arange(n + 1, dtype=np.int32) * np.int32(sizes.tokens)
    options = {"head_dim": sizes.head_dim, "scale": sizes.head_dim**-0.5, "causal": True}
    return arrays, starts, options


def attention_grid(sizes: Sizes, tangents: tuple[int, ...], given: Given) -> tuple[int, ...]:
    given["blocks"] = cdiv(sizes.tokens, given["BM"])
    return given["rows"] // sizes.tokens * given["blocks"], *tangents, sizes.heads


def of_attention(sizes: Sizes) -> Iterator[Table]:
    """Of bfloat16, of all lanes' float32, and of tangents in bfloat16."""
    n, many, t = sizes.sequences, sizes.sequences * sizes.lanes, sizes.tangents
    rows, f = n * sizes.tokens, partial(attended, sizes)
    grid = partial(attention_grid, sizes, ())
    for sequences, dtype, shapes in ((n, torch.bfloat16, NARROW), (many, torch.float32, WIDE)):
        (*qkv, _), starts, options = attention_inputs(sizes, sequences, dtype)
        [given] = launches(attention, "_attention", partial(ops.attention, **options), *qkv, starts)
        title = f"attention: {dtype}, {sequences} sequences of {sizes.tokens}"
        right = partial(lambda qkv: (f(*qkv),), qkv)
        yield Table(title, attention._attention, given, TILE, shapes, grid, right, ["y"])

    def along() -> Results:
        first, *others = zip(*(x.float().split(rows) for x in qkv), strict=True)
        return (torch.cat([torch.func.jvp(f, first, other)[1] for other in others]),)

    (*qkv, _), starts, options = attention_inputs(sizes, n * (1 + t), torch.bfloat16)
    call = partial(ops.attention, *qkv, starts, **options, tangents=t)
    [given] = launches(attention, "_tangents", call)
    title, kernel = f"attention: {t} tangents of {n} sequences", attention._tangents
    grid, results = partial(attention_grid, sizes, (t,)), lambda y: (y[rows:],)
    yield Table(title, kernel, given, TILE, TANGENTS, grid, along, ["y"], results)


def of_back(sizes: Sizes) -> Iterator[Table]:
    """The way back through attention, in float32."""
    (*qkv, dy), starts, options = attention_inputs(sizes, sizes.sequences, torch.float32)
    call, grid = partial(ops.attention_vjp, **options), partial(attention_grid, sizes, ())

    def wanted(which: slice) -> Results:
        leaves = [x.clone().requires_grad_() for x in qkv]
        return torch.autograd.grad(attended(sizes, *leaves), leaves, dy)[which]

    queries, keys = ("_queries_vjp", ["dq"], slice(1)), ("_keys_vjp", ["dk", "dv"], slice(1, 3))
    for name, outputs, which in (queries, keys):
        [given] = launches(attention, name, call, *qkv, starts, dy)
        title, kernel = f"back: {sizes.sequences} sequences, {outputs}", getattr(attention, name)
        yield Table(title, kernel, given, TILE, BACK, grid, partial(wanted, which), outputs)


def of_rope(sizes: Sizes) -> Iterator[Table]:
    """RoPE of adjacent dimensions, and of halves."""
    rows, half = sizes.sequences * sizes.tokens * (1 + sizes.tangents), sizes.head_dim // 2
    [x] = randoms(1, rows, sizes.heads * sizes.head_dim, dtype=torch.bfloat16)
    positions = torch.arange(rows, dtype=torch.int32, device=DEVICE) % sizes.tokens
    angles = np.random.default_rng(0).random((sizes.tokens, half), dtype=np.float32)
    cos, sin = np.cos(angles), np.sin(angles)

    def grid(given: Given) -> tuple[int, ...]:
        return rows, cdiv(sizes.heads, given["HEADS"])

    def turned(adjacent: bool) -> Results:
        form, pair = ((half, 2), 3) if adjacent else ((2, half), 2)
        a, b = x.float().view(rows, sizes.heads, *form).unbind(pair)
        c, s = (torch.from_numpy(of)[:, None].to(DEVICE)[positions.long()] for of in (cos, sin))
        return (torch.stack([a * c - b * s, a * s + b * c], pair).view_as(x),)

    names = ("HEADS", "num_warps")
    for adjacent in (True, False):
        inputs = (x, positions, cos, sin, sizes.head_dim, adjacent)
        [given] = launches(rope, "_rope", ops.rope, *inputs)
        title = f"rope: {rows} rows, {'adjacent dimensions' if adjacent else 'halves'}"
        right = partial(turned, adjacent)
        yield Table(title, rope._rope, given, names, ROPE, grid, right, ["y"])


def same_in_parts(launch: Call, given: Given) -> None:
    """Fails unless rows in several launches, one after another, give the same bits as in one."""
    c, x, out, rows = (given[name] for name in ("c", "x", "out", "rows"))
    found = []
    for ends in ([0, rows], [0, 1, 18, 51, rows - 9, rows]):
        out.zero_()
        for i, j in pairwise(ends):
            launch(**given | {"c": c[i:j], "x": x[i:j], "rows": j - i})
        found.append(out.clone())
    assert torch.equal(*found), "other bits in parts"


def of_factors(sizes: Sizes) -> Iterator[Table]:
    """Gradients of an adapter's factors, whose bits do not depend on how rows are launched."""
    rows, width = max(70, sizes.sequences * sizes.tokens), sizes.width
    x, dy, [a], [b] = *randoms(2, rows, width), randoms(1, 8, width), randoms(1, width, 8)

    def grid(given: Given) -> tuple[int, ...]:
        return cdiv(width, given["BN"]), cdiv(given["rank"], given["BR"])

    def wanted(given: Given) -> Results:
        found = given["scale"] * (given["c"][:, : given["rank"]].T @ given["x"])
        return (found if given["of_column"] == 1 else found.T,)

    inputs = (x, dy, LoRA(a, b, 2.0, 0), torch.zeros_like(a), torch.zeros_like(b))
    found = launches(matmul, "_add_outer", ops.lora_vjp, *inputs)
    for name, given in zip("AB", found, strict=True):
        title, right = f"factors: {name}, {rows} rows of {width}", partial(wanted, given)
        names, options = ("BK", *TILE[1:]), (["out"], lambda out: (out,), 0.0, same_in_parts)
        yield Table(title, matmul._add_outer, given, names, FACTORS, grid, right, *options)


GROUPS = {
    group.__name__.removeprefix("of_"): group
    for group in (of_few, of_scratch, of_lora, of_attention, of_back, of_rope, of_factors)
}


def attempt(call: Call) -> Any:
    """The result of a call, or what it failed with, in a line."""
    try:
        return call()
    except Exception as error:
        return " ".join(f"{type(error).__name__}: {error}".split())[:100]


def compile_until(until: float, calls: Sequence[Call]) -> list[bool]:
    """Run calls in threads; returns which of them began in time. What fails will do so again."""

    def run(call: Call) -> None:
        attempt(call)  # and keeps no result

    pool = ThreadPoolExecutor(16)
    futures = [pool.submit(run, call) for call in calls]
    wait(futures, max(0.0, until - time.perf_counter()))
    pool.shutdown(cancel_futures=True)  # and no thread is left that could disturb the timing
    torch.cuda.synchronize()
    return [not future.cancelled() for future in futures]


def error(call: Call, wanted: Results) -> float:
    """Of the results of a call, relative; the largest of several."""
    pairs = [(x.float().view_as(y), y.float()) for x, y in zip(call(), wanted, strict=True)]
    return max(float((x - y).norm() / y.norm()) for x, y in pairs)


def show(table: Table, candidates: Candidates, clock: gpu_kernels.Clock) -> None:
    """Print a table, the fastest first and what failed last."""
    print(f"\n{table.title}\n{'us':>10}  {'error':>8}")
    wanted = table.wanted()
    errors = {n: attempt(partial(error, call, wanted)) for n, (_, call) in candidates.items()}
    good = [name for name, found in errors.items() if isinstance(found, float)]
    calls = [candidates[name][0] for name in good]
    rounds = clock.in_turn(calls, 9) if calls and not INTERPRETED else [[0.0]] * len(good)
    times = {name: statistics.median(s) for name, s in zip(good, rounds, strict=True)}
    for name in sorted(good, key=times.__getitem__):
        print(f"{times[name] * 1e6:10.1f}  {errors[name]:8.1e}  {name}")
    for name in errors:
        if name not in times:
            print(f"{'failed':>20}  {name}: {errors[name]}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(GROUPS), help="groups of kernels")
    parser.add_argument("--seconds", type=float, default=40.0, help="until no more is compiled")
    parser.add_argument("--small", action="store_true", help="tiny inputs, to try this script")
    options = parser.parse_args()
    begin, names = time.perf_counter(), options.only.split(",")
    for name in names:
        if name not in GROUPS:
            parser.error(f"there is no group {name!r}; these are: {', '.join(GROUPS)}")
    if not usable():
        parser.error("this needs an NVIDIA GPU that PyTorch can use: there is none")
    sizes, clock = SMALL if options.small else Sizes(), gpu_kernels.Clock()
    print(*gpu_kernels.machine().values())
    for at, name in enumerate(names):
        found = [(table, table.candidates()) for table in GROUPS[name](sizes)]
        calls = [each[1] for _, candidates in found for each in candidates.values()]
        now = time.perf_counter()
        until = now + (begin + options.seconds - now) / (len(names) - at)
        there = iter([True] * len(calls) if INTERPRETED else compile_until(until, calls))
        for table, candidates in found:
            some = {n: calls for n, calls in candidates.items() if next(there)}
            show(table, some, clock)
            if missing := len(candidates) - len(some):
                print(f"{missing} more were not compiled in time")
    print(f"\n{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
