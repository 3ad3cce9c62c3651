"""f(gate) * up, element by element, of f = silu or gelu, its derivative and its cotangents."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.gelu import gelu_and_slope
from fwdllm.kernels.triton.runtime import cast, cdiv, check_rows, require, tensor

_BLOCK = 1024


@triton.jit
def _value_and_slope(g, GELU: tl.constexpr):
    """f(g) and f'(g)."""
    if GELU:
        value, slope = gelu_and_slope(g)
    else:
        sigmoid = 1.0 / (1.0 + tl.exp(-g))
        value, slope = g * sigmoid, sigmoid * (1.0 + g * (1.0 - sigmoid))
    return value, slope


@triton.jit
def _gated(gate, up, y, n, tangents, GELU: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    g = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(g, GELU)
    tl.store(y + i, cast(value * u, y.dtype.element_ty), mask=mask)
    slope *= u
    for _ in range(tangents):
        i += n
        dg = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)
        du = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + i, cast(slope * dg + value * du, y.dtype.element_ty), mask=mask)


def swiglu(gate: Array, up: Array, tangents: int = 0) -> torch.Tensor:
    """silu(gate) * up, silu(g) = g / (1 + exp(-g)); [rows, d] of the type of gate."""
    return _apply(gate, up, tangents, gelu=False)


def geglu(gate: Array, up: Array, tangents: int = 0) -> torch.Tensor:
    """gelu(gate) * up; [rows, d] of the type of gate."""
    return _apply(gate, up, tangents, gelu=True)


def _apply(gate: Array, up: Array, tangents: int, gelu: bool) -> torch.Tensor:
    gate, up = tensor(gate), tensor(up)
    require(gate.shape == up.shape, f"{tuple(gate.shape)} gates {tuple(up.shape)}")
    n = check_rows(len(gate), 1 + tangents, f"a primal and {tangents} tangents") * gate.shape[1]
    y = torch.empty_like(gate)
    if n:
        _gated[(cdiv(n, _BLOCK),)](gate, up, y, n, tangents, GELU=gelu, BLOCK=_BLOCK)
    return y


@triton.jit
def _gated_vjp(gate, up, dy, dgate, dup, n, GELU: tl.constexpr, BLOCK: tl.constexpr):
    """dgate = f'(gate) up dy and dup = f(gate) dy."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    u = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
    d = tl.load(dy + i, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)
    value, slope = _value_and_slope(g, GELU)
    tl.store(dgate + i, slope * u * d, mask=mask)
    tl.store(dup + i, value * d, mask=mask)


def swiglu_vjp(gate: Array, up: Array, dy: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """The cotangents of gate and up: float32 [rows, d] each."""
    return _pull_back(gate, up, dy, gelu=False)


def geglu_vjp(gate: Array, up: Array, dy: Array) -> tuple[torch.Tensor, torch.Tensor]:
    """The cotangents of gate and up: float32 [rows, d] each."""
    return _pull_back(gate, up, dy, gelu=True)


def _pull_back(gate: Array, up: Array, dy: Array, gelu: bool) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up, dy = tensor(gate), tensor(up), tensor(dy)
    fits = gate.shape == up.shape == dy.shape
    require(fits, f"{tuple(dy.shape)} cotangents of {tuple(gate.shape)} gates {tuple(up.shape)}")
    dgate, dup = (torch.empty_like(gate, dtype=torch.float32) for _ in range(2))
    n = gate.numel()
    if n:
        _gated_vjp[(cdiv(n, _BLOCK),)](gate, up, dy, dgate, dup, n, GELU=gelu, BLOCK=_BLOCK)
    return dgate, dup
