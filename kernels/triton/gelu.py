"""GELU in its tanh approximation, element by element, and its derivative."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import cast, cdiv, check_rows, tensor

_BLOCK = 1024


@triton.jit
def _gelu(x, y, n, tangents, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + i, mask=mask, other=0.0).to(tl.float32)
    # 2 sqrt(2 / pi) (v + 0.044715 v^3): 0.5 (1 + tanh(t)) is sigmoid(2 t).
    twice = 1.5957691216057308 * (v + 0.044715 * v * v * v)
    sigmoid = 1.0 / (1.0 + tl.exp(-twice))
    tl.store(y + i, cast(v * sigmoid, y.dtype.element_ty), mask=mask)
    steep = 1.5957691216057308 * (1.0 + 0.134145 * v * v)
    slope = sigmoid + v * sigmoid * (1.0 - sigmoid) * steep
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
