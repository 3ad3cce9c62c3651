"""The quantized matrix product with a seeded LoRA term for each lane."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fwdllm.kernels.api import Matrix
from fwdllm.kernels.reference.decode import dequantize
from fwdllm.kernels.reference.random import direction
from fwdllm.kernels.types import Lanes, LoRA


def matmul(
    x: np.ndarray,
    weight: Matrix,
    *,
    bias: np.ndarray | None = None,
    lora: LoRA | None = None,
    lanes: Lanes | None = None,
    exact: bool = False,
) -> np.ndarray:
    """y_l = x_l W^T + bias + scale (x_l A_l^T) B_l^T for each lane l, float32 [rows, n_out].

    A_l = A + c_l dA(seed_l), and B_l likewise, with the directions ``LoRA`` describes.
    With tangents lane 0 is plain and the others have its derivative, by the product rule
    dx W^T + scale ((dx A^T + c x dA^T) B^T + c x A^T dB^T).

    x: float32 [rows, n_in]; rows of lane l are the l-th of len(lanes) equal slices.
    bias: float32 [n_out].  lanes: None is one plain lane; without lora, lanes change nothing.
    exact: accepted for the common signature; these kernels are always exact: they sum in float64
    and round once. ValueError if the rows are not equal slices.
    """
    lanes = Lanes.plain() if lanes is None else lanes
    if len(lanes) == 0 or len(x) % len(lanes):
        raise ValueError(f"{len(x)} rows are not {len(lanes)} equal lanes")
    y = row_products(x, dequantize(weight))
    if bias is not None:
        y[: len(y) // (1 + lanes.n_tangents)] += bias
    if lora is not None:
        y += _lora(x, lora, lanes)
    return y.astype(np.float32)


def add_lora(y: np.ndarray, x: np.ndarray, lora: LoRA, lanes: Lanes) -> None:
    """y += seeded LoRA term of x, in place: what ``matmul`` adds, for an x W^T computed elsewhere.

    y float32 [rows, n_out], x float32 [rows, n_in].
    """
    y += _lora(x, lora, lanes).astype(np.float32)


def row_products(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """x . w^T in float64: [rows, n_in], [n_out, n_in] -> [rows, n_out].

    One row at a time, so that a row's bits do not depend on how many others there are.
    """
    x, w = x.astype(np.float64), w.astype(np.float64)
    products = [w @ row for row in x]
    return np.array(products).reshape(len(x), len(w))


def _lora(x: np.ndarray, lora: LoRA, lanes: Lanes) -> np.ndarray:
    slices = x.reshape(len(lanes), len(x) // len(lanes), x.shape[1])
    n = slices.shape[1]
    starts = np.array([0, n]) if lanes.starts is None else lanes.starts
    seeds = lanes.seeds.reshape(len(lanes), -1)
    y = np.zeros((*slices.shape[:2], len(lora.b)))
    for lane, rows in enumerate(slices):
        for part, (begin, end) in enumerate(pairwise(starts)):
            at = slice(begin, end)
            da, db = _direction(lora, seeds[lane, part], lanes.distribution)
            da, db = (np.float64(lanes.coefficients[lane]) * d for d in (da, db))
            if lanes.tangents and lane > 0:
                primal = slices[0, at]
                du = row_products(rows[at], lora.a) + row_products(primal, da)
                u = row_products(primal, lora.a)
                y[lane, at] = row_products(du, lora.b) + row_products(u, db)
            else:
                y[lane, at] = row_products(row_products(rows[at], lora.a + da), lora.b + db)
    return lora.scale * y.reshape(len(x), len(lora.b))


def _direction(lora: LoRA, seed: int, distribution: str) -> tuple[np.ndarray, np.ndarray]:
    """The directions of A and B of one seed, in float64."""
    mask_a, mask_b = (1, 1) if lora.mask is None else np.split(lora.mask, [lora.a.size])
    if lora.basis_a is None:
        da = direction(seed, lora.offset, lora.a.size, distribution) * np.float64(mask_a)
    else:
        da = _in_subspace(seed, lora.offset, len(lora.a), lora.basis_a, distribution)
    if lora.basis_b is None:
        db = direction(seed, lora.offset_b, lora.b.size, distribution) * np.float64(mask_b)
    else:
        db = _in_subspace(seed, lora.offset_b, len(lora.a), lora.basis_b, distribution).T
    return da.reshape(lora.a.shape), db.reshape(lora.b.shape)


def _in_subspace(
    seed: int, offset: int, rank: int, basis: np.ndarray, distribution: str
) -> np.ndarray:
    """Z basis, Z [rank, len(basis)] from the stream: float64 [rank, basis.shape[1]]."""
    z = direction(seed, offset, rank * len(basis), distribution).astype(np.float64)
    return z.reshape(rank, len(basis)) @ basis.astype(np.float64)
