"""(x - mean) / sqrt(variance + eps) * weight + bias along rows, and its derivative."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import cast, cdiv, check_rows, constant, pow2, require, tensor

# Elements that a program has in registers, 32 in a thread of 4 warps; a longer row is one program.
_TILE = 4096


@triton.jit
def _centred(x, at, mask, d):
    """Rows without their mean, zero outside the mask."""
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(values, axis=1)[:, None] / d
    return tl.where(mask, values - mean, 0.0)


@triton.jit
def _layer_norm(x, weight, bias, y, rows, d, eps, tangents, BM: tl.constexpr, D: tl.constexpr):
    i = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    k = tl.arange(0, D)[None, :]
    mask = (i < rows) & (k < d)
    at = i * d + k
    values = _centred(x, at, mask, d)
    gain = tl.load(weight + k, mask=k < d, other=0.0)
    shift = tl.load(bias + k, mask=k < d, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / d + eps)[:, None]
    tl.store(y + at, cast(values * scale * gain + shift, y.dtype.element_ty), mask=mask)
    for t in range(1, tangents + 1):
        there = (i + t * rows) * d + k
        slope = _centred(x, there, mask, d)
        shrink = scale * scale * (tl.sum(values * slope, axis=1) / d)[:, None]
        slope = (slope - values * shrink) * scale * gain
        tl.store(y + there, cast(slope, y.dtype.element_ty), mask=mask)


def layer_norm(
    x: Array,
    weight: Array,
    bias: Array,
    eps: float,
    tangents: int = 0,
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias along rows; [rows, d] of the type of x."""
    x = tensor(x)
    d = x.shape[1]
    require(tuple(weight.shape) == (d,) and tuple(bias.shape) == (d,), f"a gain for rows of {d}")
    rows = check_rows(len(x), 1 + tangents, f"a primal and {tangents} tangents")
    y = torch.empty_like(x)
    wide = pow2(d)
    block = max(1, _TILE // wide)
    if rows:
        _layer_norm[(cdiv(rows, block),)](
            x, constant(weight), constant(bias), y, rows, d, eps, tangents, BM=block, D=wide
        )
    return y
