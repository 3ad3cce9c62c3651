"""Rotary embedding (RoFormer, section 3.2): linear, so tangents are rows like others."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import cast, cdiv, check_indices, constant, require, tensor

# Pairs that a program rotates.
_BLOCK = 1024


@triton.jit
def _rope(
    x,
    positions,
    cos,
    sin,
    y,
    n,
    width,
    pairs,
    half,
    head_dim,
    INTERLEAVED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < n
    row, pair = index // pairs, index % pairs
    i = pair % half
    head = row * width + (pair // half) * head_dim
    at = tl.load(positions + row, mask=mask, other=0) * half + i
    c = tl.load(cos + at, mask=mask, other=0.0)
    s = tl.load(sin + at, mask=mask, other=0.0)
    if INTERLEAVED:  # both elements of a pair at a time
        both = (head + 2 * i)[:, None] + tl.arange(0, 2)[None, :]
        a, b = tl.split(tl.load(x + both, mask=mask[:, None], other=0.0).to(tl.float32))
        turned = tl.join(a * c - b * s, a * s + b * c)
        tl.store(y + both, cast(turned, y.dtype.element_ty), mask=mask[:, None])
    else:
        first, second = head + i, head + i + half
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
    pairs = x.shape[1] // head_dim * half
    n = len(x) * pairs
    if n:
        _rope[(cdiv(n, _BLOCK),)](
            x,
            constant(positions),
            constant(cos),
            constant(sin),
            y,
            n,
            x.shape[1],
            pairs,
            half,
            head_dim,
            INTERLEAVED=interleaved,
            BLOCK=_BLOCK,
        )
    return y
