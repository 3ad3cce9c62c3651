"""Rotary embedding (RoFormer, section 3.2): linear, so tangents are rows like others."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import (
    cast,
    cdiv,
    check_indices,
    constant,
    pow2,
    require,
    tensor,
)

# Pairs that a program rotates: some heads of one row, which have the same angles.
_BLOCK = 2048


@triton.jit
def _rope(
    x,
    positions,
    cos,
    sin,
    y,
    width,
    half,
    head_dim,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    row = tl.program_id(0)
    i = tl.arange(0, HALF)
    head = (tl.program_id(1) * HEADS + tl.arange(0, HEADS)) * head_dim
    head_in = head[:, None] < width
    head_at = row.to(tl.int64) * width + head[:, None]
    at = tl.load(positions + row) * half + i
    c = tl.load(cos + at, mask=i < half, other=0.0)[None, :]
    s = tl.load(sin + at, mask=i < half, other=0.0)[None, :]
    if INTERLEAVED:  # rows of heads as they are, whose pairs are split in registers
        k = tl.arange(0, 2 * HALF)[None, :]
        mask = head_in & (k < 2 * half)
        both = tl.load(x + head_at + k, mask=mask, other=0.0).to(tl.float32)
        a, b = tl.split(tl.reshape(both, [HEADS, HALF, 2]))
        turned = tl.reshape(tl.join(a * c - b * s, a * s + b * c), [HEADS, 2 * HALF])
        tl.store(y + head_at + k, cast(turned, y.dtype.element_ty), mask=mask)
    else:
        mask = head_in & (i[None, :] < half)
        first = head_at + i[None, :]
        second = first + half
        a = tl.load(x + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x + second, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + first, cast(a * c - b * s, y.dtype.element_ty), mask=mask)
        tl.store(y + second, cast(a * s + b * c, y.dtype.element_ty), mask=mask)


def rope(
    x: Array,
    positions: Array,
    cos: np.ndarray,
    sin: np.ndarray,
    head_dim: int,
    interleaved: bool,
) -> torch.Tensor:
    """Rotate pair i of every head by the angle at [position, i]; the type of x.

    x: [rows, n_heads * head_dim].  positions: int32 [rows].  cos, sin: float32 [n_positions,
    rot / 2]; dimensions from rot on pass through.  interleaved: pair i is dimensions (2i, 2i + 1),
    else (i, i + rot / 2).
    """
    check_indices(positions, len(cos), "positions")
    x = tensor(x)
    fits = x.shape[1] % head_dim == 0 and 2 * cos.shape[1] <= head_dim and cos.shape == sin.shape
    require(fits, f"{tuple(x.shape)} with angles {cos.shape} is not heads of {head_dim}")
    require(len(positions) == len(x), f"{len(positions)} positions of {len(x)} rows")
    half = cos.shape[1]
    y = torch.empty_like(x) if 2 * half == head_dim else x.clone()
    heads = x.shape[1] // head_dim
    if len(x) and heads and half:
        wide = pow2(half)
        some = min(pow2(heads), max(1, _BLOCK // wide))
        _rope[(len(x), cdiv(heads, some))](
            x,
            constant(positions),
            constant(cos),
            constant(sin),
            y,
            x.shape[1],
            half,
            head_dim,
            INTERLEAVED=interleaved,
            HEADS=some,
            HALF=wide,
        )
    return y
