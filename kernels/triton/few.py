"""x W^T of few rows: weights are read once, and decoded in the registers they are multiplied in.

W is the left factor, its outputs the rows of a tile of tensor cores: a thread then has only a few
scales, and the tile is as narrow as there are rows of x. Tensor cores multiply quants, which are
exact in bfloat16, of one piece with one scale at a time (``tiles``); the sums are multiplied by the
scale, in float32. That leaves two to four instructions for a weight, so that memory is the limit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fwdllm.kernels.triton.runtime import DEVICE, DeviceWeight, cdiv, dot, pow2
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


class Shape(NamedTuple):
    """Outputs and warps of a program, and steps that it reads ahead, and one more.

    With 2 warps or fewer, operands of tensor cores come from registers on any card: the
    instructions of an H100 for whole groups of 4 warps take longer to begin.
    """

    outputs: int
    warps: int
    stages: int


# Parts of a sum, of at least 512 terms, that programs add up on their own (split-K): bits do not
# depend on the other rows, so neither does the number of parts.
PARTS = 8
# Rows that a program has, at most, by elements of a step: their sums are in registers, twice, and
# those of a step, which is read ahead, in shared memory.
MOST_ROWS = {128: 64, 256: 32}


@triton.jit
def _few(
    x,
    halves,
    words,
    y,
    rows,
    n_out,
    n_in,
    row_units,
    n_parts,
    TYPE: tl.constexpr,
    STEP: tl.constexpr,
    EACH: tl.constexpr,
    SIZE: tl.constexpr,
    BM: tl.constexpr,
    BO: tl.constexpr,
    STAGES: tl.constexpr,
):
    """y[part] = x W^T of BM rows and BO outputs, summed over one part of the steps.

    x: bfloat16 [rows, n_in].  y: float32 or, of a single part, any type [n_parts, rows, n_out].
    """
    o = tl.program_id(0) * BO + tl.arange(0, BO)
    r = tl.program_id(2) * BM + tl.arange(0, BM)
    part = tl.program_id(1)
    e = tl.arange(0, EACH)
    row = tl.minimum(o, n_out - 1).to(tl.int64) * row_units
    x_at = x + r.to(tl.int64)[None, :] * n_in + e[:, None]
    there = r[None, :] < rows
    n_steps = n_in // STEP
    acc = tl.zeros([BO, BM], tl.float32)
    for step in tl.range(
        part * n_steps // n_parts, (part + 1) * n_steps // n_parts, num_stages=STAGES
    ):
        scales = scale_words(words, row, step, n_in, TYPE)
        for tile in tl.static_range(STEP // EACH // SIZE):
            code = codes(halves, row, step, tile, TYPE, EACH)
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
    at = (part * rows + r).to(tl.int64)[None, :] * n_out + o[:, None]
    tl.store(y + at, acc, mask=there & (o[:, None] < n_out))


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


def few(x: torch.Tensor, weight: DeviceWeight) -> torch.Tensor:
    """Parts of x W^T, float32 [parts, rows, n_out], to be added; x is bfloat16 [rows, n_in].

    weight: one that has ``tiles.steps``.
    """
    how = steps(weight)
    assert how is not None
    block = min(MOST_ROWS[how.step], pow2(len(x), 8))
    return launch(x, weight, block, Shape(64, 2, 4 if block <= 16 else 3), PARTS)


def launch(
    x: torch.Tensor, weight: DeviceWeight, block: int, shape: Shape, most_parts: int
) -> torch.Tensor:
    """As ``few``, by programs of ``block`` rows and of a shape."""
    how = steps(weight)
    assert how is not None
    n_parts = max(1, min(most_parts, weight.n_in // 512))
    parts = torch.empty(n_parts, len(x), weight.n_out, dtype=torch.float32, device=DEVICE)
    halves, wide, units = words(weight)
    grid = (cdiv(weight.n_out, shape.outputs), n_parts, cdiv(len(x), block))
    _few[grid](
        x,
        halves,
        wide,
        parts,
        len(x),
        weight.n_out,
        weight.n_in,
        units,
        n_parts,
        TYPE=int(weight.type),
        STEP=how.step,
        EACH=how.each,
        SIZE=how.size,
        BM=block,
        BO=shape.outputs,
        STAGES=shape.stages,
        num_warps=shape.warps,
    )
    return parts
