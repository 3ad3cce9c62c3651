"""silu(gate) * up, element by element, and its derivative."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import cast, cdiv, check_rows, require, tensor

_BLOCK = 1024


@triton.jit
def _swiglu(gate, up, y, n, tangents, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    g = tl.load(gate + i, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    silu = g * sigmoid
    tl.store(y + i, cast(silu * u, y.dtype.element_ty), mask=mask)
    slope = sigmoid * (1.0 + g * (1.0 - sigmoid)) * u
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
