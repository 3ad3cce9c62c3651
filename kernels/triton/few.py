"""x W^T of few rows: weights are read once, and decoded in the registers they are multiplied in.

W is the left factor, its outputs the rows of a tile of tensor cores: a thread then has only a few
scales, and the tile is as narrow as there are rows of x. Tensor cores multiply quants, which are
exact in bfloat16, of one piece with one scale at a time (``tiles``); the sums are multiplied by the
scale, in float32. That leaves two to four instructions for a weight.

Parts of a sum are of different programs (split-K); the last one of them to be done adds all up, in
order. A count of those that are done is all that is atomic, so results do not depend on it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

from fwdllm.kernels.triton.runtime import DEVICE, DeviceWeight, cast, cdiv, dot, pow2
from fwdllm.kernels.triton.tiles import (
    Q4_1,
    Q4_K,
    Q5_K,
    Q6_K,
    codes,
    high_bits,
    place,
    quants,
    scale,
    scale_words,
    steps,
    words,
)
from fwdllm.kernels.types import QuantType

# Parts of a sum, of at least 512 terms: bits do not depend on the other rows, so neither does their
# number.
_PARTS = 8
# Rows that a program has, at most: their sums are in registers, twice, and those of a step, which
# is read ahead, in shared memory.
_ROWS = 64
# Outputs of a program.
_OUTPUTS = 64
_MANY_PIECES = (QuantType.Q4_K, QuantType.Q5_K, QuantType.Q6_K)


@triton.jit
def _few(
    x,
    halves,
    words,
    parts,
    done,
    y,
    rows,
    n_out,
    n_in,
    row_units,
    TYPE: tl.constexpr,
    STEP: tl.constexpr,
    EACH: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y = x W^T of BM rows and BO outputs, by the last program of PARTS, each of some steps.

    x: bfloat16 [rows, n_in].  parts: float32 [PARTS, rows, n_out].  done: int32, how many programs
    of a tile of y are done: zeros, and zeros again afterwards.
    """
    TILES: tl.constexpr = STEP // EACH // SIZE
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    r = tl.program_id(2) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    e = tl.arange(0, EACH)
    row = tl.minimum(o, n_out - 1).to(tl.int64) * row_units
    x_at = x + r.to(tl.int64)[None, :] * n_in + e[:, None]
    there = r[None, :] < rows
    n_steps = n_in // STEP
    acc = tl.zeros([BO, BM], tl.float32)
    for step in tl.range(part * n_steps // PARTS, (part + 1) * n_steps // PARTS, num_stages=STAGES):
        scales = scale_words(words, row, step, n_in, TYPE)
        for tile in tl.static_range(TILES):
            code = codes(halves, row, step, tile, TILES, EACH)
            high = code
            if TYPE == Q5_K or TYPE == Q6_K:
                high = high_bits(halves, row, step, n_in, tile // 2, TYPE, EACH)
            for s in tl.static_range(SIZE):
                acc = _multiplied(
                    x_at + step * STEP,
                    there,
                    code,
                    high,
                    scales,
                    acc,
                    tile * SIZE + s,
                    TYPE,
                    EACH,
                )
    at = r.to(tl.int64)[None, :] * n_out + o[:, None]
    inside = there & (o[:, None] < n_out)
    if PARTS > 1:
        mine = (part * rows + r).to(tl.int64)[None, :] * n_out + o[:, None]
        tl.store(parts + mine, acc, mask=inside)
        tl.debug_barrier()  # of all threads of the program, whose numbers the others then see
        count = done + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        if tl.atomic_add(count, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
            acc = tl.zeros([BO, BM], tl.float32)
            for other in tl.static_range(PARTS):
                theirs = (other * rows + r).to(tl.int64)[None, :] * n_out + o[:, None]
                # Not from this processor's own cache, which does not know what others write.
                acc += tl.load(parts + theirs, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(y + at, cast(acc, y.dtype.element_ty), mask=inside)
            tl.store(count, 0)
    else:
        tl.store(y + at, cast(acc, y.dtype.element_ty), mask=inside)


@triton.jit
def _multiplied(
    x_at, there, code, high, scales, acc, J: tl.constexpr, TYPE: tl.constexpr, EACH: tl.constexpr
):
    """acc + the products of piece J."""
    own = tl.load(x_at + place(J, TYPE, EACH), mask=there, other=0.0)
    nothing = tl.zeros(acc.shape, tl.float32)
    a, b = scale(scales, J, TYPE)
    acc += a[:, None] * dot(quants(code, high, J, TYPE), own, nothing, "ieee")
    if TYPE == Q4_1 or TYPE == Q4_K or TYPE == Q5_K:
        ones = tl.full(code.shape, 1.0, tl.bfloat16)
        acc -= (b + 128.0 * a)[:, None] * dot(ones, own, nothing, "ieee")
    return acc


def few(x: torch.Tensor, weight: DeviceWeight, dtype: torch.dtype) -> torch.Tensor:
    """x W^T as [rows, n_out] of ``dtype``; x is bfloat16 [rows, n_in].

    weight: one that has ``tiles.steps``.
    """
    how, rows = steps(weight), len(x)
    assert how is not None
    block = min(_ROWS, pow2(rows, 8))
    n_parts = max(1, min(_PARTS, weight.n_in // 512))
    # The fastest on an H200 (bench/studies/gpu_shapes.py). With 2 warps, operands of tensor cores
    # come from registers on any card: the instructions of an H100 for whole groups of 4 warps take
    # longer to begin. Large programs of types with many pieces spill less with 4.
    many = weight.type in _MANY_PIECES
    warps = 4 if many and block == 64 else 2
    stages = 2 if block >= (16 if many else 64) else 3
    halves, wide, units = words(weight)
    grid = (cdiv(weight.n_out, _OUTPUTS), n_parts, cdiv(rows, block))
    y = torch.empty(rows, weight.n_out, dtype=dtype, device=DEVICE)
    parts = torch.empty(n_parts, *y.shape, device=DEVICE)
    _few[grid](
        x,
        halves,
        wide,
        parts,
        _counts(pow2(grid[0] * grid[2])),
        y,
        rows,
        weight.n_out,
        weight.n_in,
        units,
        TYPE=int(weight.type),
        STEP=how.step,
        EACH=how.each,
        SIZE=how.size,
        BM=block,
        BO=_OUTPUTS,
        PARTS=n_parts,
        STAGES=stages,
        num_warps=warps,
    )
    return y


@cache
def _counts(size: int) -> torch.Tensor:
    """Zeros, which launches leave as zeros; launches are on one stream, one after another."""
    return torch.zeros(size, dtype=torch.int32, device=DEVICE)
