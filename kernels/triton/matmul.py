"""The quantized matrix product with a seeded LoRA term for each lane."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch

from fwdllm.kernels.api import Array, Matrix
from fwdllm.kernels.triton.lora import (
    LaneTable,
    coordinates,
    down,
    lane_table,
    round_to_references,
    up,
)
from fwdllm.kernels.triton.products import product
from fwdllm.kernels.triton.runtime import DeviceWeight, check_rows, constant, require, tensor
from fwdllm.kernels.triton.runtime import weight as on_device
from fwdllm.kernels.types import Lanes, LoRA


def matmul(
    x: Array,
    weight: Matrix,
    *,
    bias: Array | None = None,
    lora: LoRA | None = None,
    lanes: Lanes | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """x W^T + bias + seeded LoRA as [rows, n_out] of the type of x, bfloat16 or float32.

    Matmuls are in bfloat16 with sums in float32. If x is float32, rows of a lane are rounded to
    bfloat16 as their difference to its reference (``Lanes.references``), so that the rounding of
    what lanes have in common cancels in finite differences. exact: matmuls in float32.
    """
    x, weight = tensor(x), on_device(weight)
    lanes = Lanes.plain() if lanes is None else lanes
    require(x.shape[1] == weight.n_in, f"rows of {x.shape[1]} for a weight of {weight.n_in}")
    require(bias is None or tuple(bias.shape) == (weight.n_out,), "a bias for the outputs")
    if lora is not None:
        _check(lora, weight)
    table = lane_table(lanes, check_rows(len(x), len(lanes), f"{len(lanes)} equal lanes"))
    own = np.arange(len(lanes))
    relative = bool(not exact and x.dtype == torch.float32 and (lanes.references != own).any())
    if len(x) == 0:
        return x.new_empty(0, weight.n_out)
    rows = round_to_references(x, table) if relative else x
    y = product(rows, weight, x.dtype, exact)
    if bias is None and lora is None and not relative:
        return y
    u = None
    if lora is not None:
        u = _bottleneck(x, lora, lanes, table)
    y = up(
        y,
        u,
        lora,
        None if bias is None else constant(bias),
        table,
        tangents=lanes.n_tangents > 0,
        relative=relative,
        drawn=None if lora is None or lora.basis_b is not None else lanes.distribution,
    )
    if lora is not None and u is not None and lora.basis_b is not None:
        _add_subspace(y, u, lora, lanes, table)
    return y


def _check(lora: LoRA, weight: DeviceWeight) -> None:
    rank = len(lora.a)
    fits = tuple(lora.a.shape) == (rank, weight.n_in)
    fits = fits and tuple(lora.b.shape) == (weight.n_out, rank)
    for basis, n in ((lora.basis_a, weight.n_in), (lora.basis_b, weight.n_out)):
        fits = fits and (basis is None or basis.shape[1] == n)
    if lora.mask is not None:
        fits = fits and len(lora.mask) == rank * (weight.n_in + weight.n_out)
    require(fits, f"LoRA factors of rank {rank} for {weight.n_out} x {weight.n_in}")


def _bottleneck(x: torch.Tensor, lora: LoRA, lanes: Lanes, table: LaneTable) -> torch.Tensor:
    """u as of ``down``, with the direction of A, also if that has a basis."""
    tangents = lanes.n_tangents > 0
    drawn = lanes.distribution if lora.basis_a is None else None
    u = down(x, lora, table, tangents=tangents, drawn=drawn)
    if lora.basis_a is None or len(lora.basis_a) == 0:
        return u
    inside = x.float() @ constant(lora.basis_a).T
    for lane, part, rows, primal in _perturbed_rows(lanes, table):
        z = coordinates(lora, lanes, lane, part, of_b=False)
        source = inside[primal if tangents else rows]
        u[0, rows, : len(z)] += source @ z.T
    return u


def _add_subspace(
    y: torch.Tensor, u: torch.Tensor, lora: LoRA, lanes: Lanes, table: LaneTable
) -> None:
    """Add to y the term of B's direction, if that has a basis."""
    assert lora.basis_b is not None
    if len(lora.basis_b) == 0:
        return
    total = u.sum(dim=0)
    basis = constant(lora.basis_b)
    for lane, part, rows, primal in _perturbed_rows(lanes, table):
        z = coordinates(lora, lanes, lane, part, of_b=True)
        source = total[primal if lanes.n_tangents else rows, : len(z)]
        y[rows] += (lora.scale * (source @ z @ basis)).to(y.dtype)


def _perturbed_rows(lanes: Lanes, table: LaneTable) -> list[tuple[int, int, slice, slice]]:
    """(lane, part, the part's rows, the same rows in lane 0) for all perturbed lanes."""
    starts = [0, table.n] if lanes.starts is None else lanes.starts.tolist()
    return [
        (lane, part, slice(lane * table.n + begin, lane * table.n + end), slice(begin, end))
        for lane in np.flatnonzero(lanes.coefficients).tolist()
        for part, (begin, end) in enumerate(pairwise(starts))
    ]
