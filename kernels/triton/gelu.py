"""GELU in its tanh approximation, element by element, its derivative and its cotangent."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import cast, cdiv, check_rows, require, tensor

_BLOCK = 1024


@triton.jit
def gelu_and_slope(v):
    """gelu(v) and gelu'(v)."""
    # 2 sqrt(2 / pi) (v + 0.044715 v^3): 0.5 (1 + tanh(t)) is sigmoid(2 t).
    twice = 1.5957691216057308 * (v + 0.044715 * v * v * v)
    sigmoid = 1.0 / (1.0 + tl.exp(-twice))
    steep = 1.5957691216057308 * (1.0 + 0.134145 * v * v)
    return v * sigmoid, sigmoid + v * sigmoid * (1.0 - sigmoid) * steep


@triton.jit
def _gelu(x, y, n, tangents, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    value, slope = gelu_and_slope(v)
    tl.store(y + i, cast(value, y.dtype.element_ty), mask=mask)
    for _ in range(tangents):
        i += n
        dv = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + i, cast(slope * dv, y.dtype.element_ty), mask=mask)


def gelu(x: Array, tangents: int = 0) -> torch.Tensor:
    """x sigmoid(2 t), t = sqrt(2 / pi) (x + 0.044715 x^3); [rows, d] of the type of x."""
    x = tensor(x)
    n = check_rows(len(x), 1 + tangents, f"a primal and {tangents} tangents") * x.shape[1]
    y = torch.empty_like(x)
    if n:
        _gelu[(cdiv(n, _BLOCK),)](x, y, n, tangents, BLOCK=_BLOCK)
    return y


@triton.jit
def _gelu_vjp(x, dy, dx, n, BLOCK: tl.constexpr):
    """dx = gelu'(x) dy."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    _, slope = gelu_and_slope(tl.load(x + i, mask=mask, other=0.0).to(tl.float32))
    tl.store(dx + i, slope * tl.load(dy + i, mask=mask, other=0.0).to(tl.float32), mask=mask)


def gelu_vjp(x: Array, dy: Array) -> torch.Tensor:
    """The cotangent of x: float32 [rows, d]."""
    x, dy = tensor(x), tensor(dy)
    require(x.shape == dy.shape, f"{tuple(dy.shape)} cotangents of {tuple(x.shape)}")
    dx = torch.empty_like(x, dtype=torch.float32)
    n = x.numel()
    if n:
        _gelu_vjp[(cdiv(n, _BLOCK),)](x, dy, dx, n, BLOCK=_BLOCK)
    return dx
