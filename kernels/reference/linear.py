"""The quantized matrix product with a seeded LoRA term for each lane (DESIGN section 4)."""

from __future__ import annotations

import numpy as np

from fwdllm.kernels.reference.decode import dequantize
from fwdllm.kernels.reference.random import direction
from fwdllm.kernels.types import Lanes, LoRA, Weight


def matmul(
    x: np.ndarray,
    weight: Weight,
    *,
    bias: np.ndarray | None = None,
    lora: LoRA | None = None,
    lanes: Lanes | None = None,
    exact: bool = False,
) -> np.ndarray:
    """y_l = x_l W^T + bias + scale (x_l A_l^T) B_l^T for each lane l, float32 [rows, n_out].

    A_l = A + c_l v(seed_l)[offset : offset + rank n_in], and B_l likewise with the elements
    that follow.

    x: float32 [rows, n_in]; rows of lane l are the l-th of len(lanes) equal slices.
    bias: float32 [n_out].  lanes: None is one plain lane; without lora, lanes change nothing.
    exact: accepted for the common signature; this backend always is, summing in float64 and
    rounding once. ValueError if the rows are not equal slices.
    """
    y = row_products(x, dequantize(weight))
    if bias is not None:
        y += bias
    if lora is not None:
        y += _lora(x, lora, Lanes.plain() if lanes is None else lanes)
    return y.astype(np.float32)


def row_products(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x . w^T in float64: [rows, n_in], [n_out, n_in] -> [rows, n_out].

    One row at a time, so that a row's bits do not depend on how many others there are.
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    products = [w @ row for row in x]
    return np.array(products).reshape(len(x), len(w))


def _lora(x: np.ndarray, lora: LoRA, lanes: Lanes) -> np.ndarray:
    if len(lanes) == 0 or len(x) % len(lanes):
        raise ValueError(f"{len(x)} rows are not {len(lanes)} equal lanes")
    y = []
    for lane, rows in enumerate(np.split(x, len(lanes))):
        a, b = _perturbed(lora, lanes, lane)
        y.append(lora.scale * row_products(row_products(rows, a), b))
    return np.concatenate(y)


def _perturbed(lora: LoRA, lanes: Lanes, lane: int) -> tuple[np.ndarray, np.ndarray]:
    """A_l and B_l of one lane, in float64."""
    n_a, n_b = lora.a.size, lora.b.size
    v = direction(lanes.seeds[lane], lora.offset, n_a + n_b, lanes.distribution)
    step = np.float64(lanes.coefficients[lane]) * v
    return lora.a + step[:n_a].reshape(lora.a.shape), lora.b + step[n_a:].reshape(lora.b.shape)
