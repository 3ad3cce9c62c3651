"""silu(gate) * up, element by element, its derivative and its cotangents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import cast, cdiv, check_rows, require, tensor

_BLOCK = 1024


@triton.jit
def _silu_and_slope(g):
    """silu(g) and silu'(g)."""
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    return g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid))


@triton.jit
def _swiglu(gate, up, y, n, tangents, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    g = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
    silu, slope = _silu_and_slope(g)
    tl.store(y + i, cast(silu * u, y.dtype.element_ty), mask=mask)
    slope *= u
    for _ in range(tangents):
        i += n
        dg = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)
        du = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + i, cast(slope * dg + silu * du, y.dtype.element_ty), mask=mask)


def swiglu(gate: Array, up: Array, tangents: int = 0) -> torch.Tensor:
    """silu(gate) * up, silu(g) = g / (1 + exp(-g)); [rows, d] of the type of gate."""
    gate, up = tensor(gate), tensor(up)
    require(gate.shape == up.shape, f"{tuple(gate.shape)} gates {tuple(up.shape)}")
    n = check_rows(len(gate), 1 + tangents, f"a primal and {tangents} tangents") * gate.shape[1]
    y = torch.empty_like(gate)
    if n:
        _swiglu[(cdiv(n, _BLOCK),)](gate, up, y, n, tangents, BLOCK=_BLOCK)
    return y


@triton.jit
def _swiglu_vjp(gate, up, dy, dgate, dup, n, BLOCK: tl.constexpr):
    """dgate = silu'(gate) up dy and dup = silu(gate) dy."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    u = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=mask, other=0.0).to(tl.float32)
    silu, slope = _silu_and_slope(tl.load(gate + i, mask=mask, other=0.0).to(tl.float32))
    tl.store(dgate + i, slope * u * d, mask=mask)
    tl.store(dup + i, silu * d, mask=mask)


def swiglu_vjp(gate: Array, up: Array, dy: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """The cotangents of gate and up: float32 [rows, d] each."""
    gate, up, dy = tensor(gate), tensor(up), tensor(dy)
    fits = gate.shape == up.shape == dy.shape
    require(fits, f"{tuple(dy.shape)} cotangents of {tuple(gate.shape)} gates {tuple(up.shape)}")
    dgate, dup = (torch.empty_like(gate, dtype=torch.float32) for _ in range(2))
    n = gate.numel()
    if n:
        _swiglu_vjp[(cdiv(n, _BLOCK),)](gate, up, dy, dgate, dup, n, BLOCK=_BLOCK)
    return dgate, dup
