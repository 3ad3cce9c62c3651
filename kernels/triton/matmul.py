"""The quantized matrix product with a seeded LoRA term for each lane, and its cotangents."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array, Matrix
from fwdllm.kernels.triton.lora import (
    LaneTable,
    coordinates,
    down,
    lane_table,
    plain_table,
    round_to_references,
    up,
)
from fwdllm.kernels.triton.products import add_product, added_to, product, product_back
from fwdllm.kernels.triton.runtime import (
    IN_NUMPY,
    cdiv,
    check_rows,
    constant,
    host,
    pow2,
    require,
    tensor,
)
from fwdllm.kernels.triton.runtime import weight as on_device
from fwdllm.kernels.types import Lanes, LoRA

# What a program of ``_add_outer`` has: few columns because it goes through all rows, so that there
# have to be many programs; numbers of the bottleneck for each column; and rows at a time.
_COLUMNS, _RANKS, _ROWS = 32, 16, 32


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
    plain = lanes is None
    lanes = Lanes.plain() if lanes is None else lanes
    require(x.shape[1] == weight.n_in, f"rows of {x.shape[1]} for a weight of {weight.n_in}")
    require(bias is None or tuple(bias.shape) == (weight.n_out,), "a bias for the outputs")
    if lora is not None:
        _check(lora, weight.n_in, weight.n_out)
    n = check_rows(len(x), len(lanes), f"{len(lanes)} equal lanes")
    relative = not exact and x.dtype == torch.float32 and len(lanes) > 1
    relative = relative and bool((lanes.references != np.arange(len(lanes))).any())
    if len(x) == 0:
        return x.new_empty(0, weight.n_out)
    if bias is None and lora is None and not relative:
        return product(x, weight, x.dtype, exact)
    table = plain_table(n) if plain else lane_table(lanes, n)
    u = None if lora is None else _bottleneck(x, lora, lanes, table)
    terms = partial(
        up,
        u=u,
        lora=lora,
        bias=None if bias is None else constant(bias),
        table=table,
        tangents=lanes.n_tangents > 0,
        relative=relative,
        drawn=None if lora is None or lora.basis_b is not None else lanes.distribution,
    )
    if added_to(x, exact) and not relative:
        y = terms(None, y=x.new_empty(len(x), weight.n_out))
        add_product(y, x, weight)
    else:
        found = product(round_to_references(x, table) if relative else x, weight, x.dtype, exact)
        y = terms(found, y=torch.empty_like(found) if relative else found)
    if lora is not None and u is not None and lora.basis_b is not None:
        _add_subspace(y, u, lora, lanes, table)
    return y


def _check(lora: LoRA, n_in: int, n_out: int) -> None:
    rank = len(lora.a)
    fits = tuple(lora.a.shape) == (rank, n_in)
    fits = fits and tuple(lora.b.shape) == (n_out, rank)
    for basis, n in ((lora.basis_a, n_in), (lora.basis_b, n_out)):
        fits = fits and (basis is None or basis.shape[1] == n)
    if lora.mask is not None:
        fits = fits and len(lora.mask) == rank * (n_in + n_out)
    require(fits, f"LoRA factors of rank {rank} for {n_out} x {n_in}")


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
        u[rows, : len(z)] += source @ z.T
    return u


def _add_subspace(
    y: torch.Tensor, u: torch.Tensor, lora: LoRA, lanes: Lanes, table: LaneTable
) -> None:
    """Add to y the term of B's direction, if that has a basis."""
    assert lora.basis_b is not None
    if len(lora.basis_b) == 0:
        return
    basis = constant(lora.basis_b)
    for lane, part, rows, primal in _perturbed_rows(lanes, table):
        z = coordinates(lora, lanes, lane, part, of_b=True)
        source = u[primal if lanes.n_tangents else rows, : len(z)]
        y[rows] += (lora.scale * (source @ z @ basis)).to(y.dtype)


def _perturbed_rows(lanes: Lanes, table: LaneTable) -> list[tuple[int, int, slice, slice]]:
    """(lane, part, the part's rows, the same rows in lane 0) for all perturbed lanes."""
    starts = [0, table.n] if lanes.starts is None else lanes.starts.tolist()
    return [
        (lane, part, slice(lane * table.n + begin, lane * table.n + end), slice(begin, end))
        for lane in np.flatnonzero(lanes.coefficients).tolist()
        for part, (begin, end) in enumerate(pairwise(starts))
    ]


def matmul_vjp(
    dy: Array, weight: Matrix, *, lora: LoRA | None = None, exact: bool = False
) -> torch.Tensor:
    """dx = dy W + scale (dy B) A: [rows, n_out] to float32 [rows, n_in]."""
    dy, weight = tensor(dy), on_device(weight)
    require(dy.shape[1] == weight.n_out, f"cotangents of {dy.shape[1]} for {weight.n_out} outputs")
    if lora is not None:
        _check(lora, weight.n_in, weight.n_out)
    if len(dy) == 0:
        return dy.new_empty(0, weight.n_in, dtype=torch.float32)
    dx = product_back(dy, weight, exact)
    if lora is None:
        return dx
    turned, table = _turned(lora), plain_table(len(dy))
    v = down(dy, turned, table, tangents=False, drawn=None)
    return up(dx, v, turned, None, table, dx, tangents=False, relative=False, drawn=None)


def lora_vjp(x: Array, dy: Array, lora: LoRA, da: Array, db: Array) -> None:
    """da += v^T x, v = scale dy B, and db += dy^T u, u = scale x A^T, in place, row after row.

    x: [rows, n_in].  dy: [rows, n_out].  da, db: float32, contiguous, of the shapes of A and B.
    """
    x, dy = tensor(x), tensor(dy)
    _check(lora, x.shape[1], dy.shape[1])
    require(len(x) == len(dy), f"{len(dy)} rows of cotangents for {len(x)} rows")
    require(tuple(da.shape) == tuple(lora.a.shape), f"a cotangent {tuple(da.shape)} of A")
    require(tuple(db.shape) == tuple(lora.b.shape), f"a cotangent {tuple(db.shape)} of B")
    if len(x):
        _add_outer_products(dy, _turned(lora), x, da, transposed=False)
        _add_outer_products(x, lora, dy, db, transposed=True)


def _turned(lora: LoRA) -> LoRA:
    """The adapter the other way round: its A is the transpose of B, its B that of A."""
    return LoRA(tensor(lora.b).T.contiguous(), tensor(lora.a).T.contiguous(), lora.scale, 0)


@triton.jit
def _add_in_order(a, b, acc, K: tl.constexpr):
    """acc + a b, term after term: a matmul without tensor cores is a chain of multiply-adds.

    So zeros at the end of a and b leave acc as it is.
    """
    if IN_NUMPY:  # which would sum up a b first
        k = tl.arange(0, K)
        for n in range(K):
            column = tl.sum(tl.where(k[None, :] == n, a, 0.0), axis=1)
            row = tl.sum(tl.where(k[:, None] == n, b, 0.0), axis=0)
            acc += column[:, None] * row[None, :]
    else:
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc


@triton.jit
def _add_outer(
    c,
    x,
    out,
    rows,
    width,
    rank,
    c_width,
    of_rank,
    of_column,
    scale,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
):
    """out[r, j] += scale c[i, r] x[i, j] for row after row i, of BN columns j and BR ranks r.

    BK: rows that are in shared memory at a time.
    c: float32 [rows, c_width].  x: [rows, width].  out[r, j] is at r * of_rank + j * of_column.
    """
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    at = r[:, None] * of_rank + j.to(tl.int64)[None, :] * of_column
    inside = (r[:, None] < rank) & (j[None, :] < width)
    acc = tl.load(out + at, mask=inside, other=0.0)
    for i0 in range(0, rows, BK):
        i = i0 + tl.arange(0, BK)
        c_in = (r[:, None] < rank) & (i[None, :] < rows)
        mine = scale * tl.load(c + r[:, None] + i[None, :] * c_width, mask=c_in, other=0.0)
        x_in = (i[:, None] < rows) & (j[None, :] < width)
        x_at = i.to(tl.int64)[:, None] * width + j[None, :]
        block = tl.load(x + x_at, mask=x_in, other=0.0).to(tl.float32)
        acc = _add_in_order(mine, block, acc, BK)
    tl.store(out + at, acc, mask=inside)


def _add_outer_products(
    side: torch.Tensor, lora: LoRA, x: torch.Tensor, to: Array, transposed: bool
) -> None:
    """to += scale (side A^T)^T x in place. transposed: ``to`` is the transpose of that."""
    there = tensor(to)
    rank, width = len(lora.a), x.shape[1]
    table = plain_table(len(x))
    c = down(side, lora, table, tangents=False, drawn=None)
    ranks = min(_RANKS, pow2(rank))
    _add_outer[(cdiv(width, _COLUMNS), cdiv(rank, ranks))](
        c,
        x,
        there,
        len(x),
        width,
        rank,
        c.shape[1],
        1 if transposed else width,
        rank if transposed else 1,
        float(lora.scale),
        BK=_ROWS,
        BR=ranks,
        BN=_COLUMNS,
        num_warps=4,
        num_stages=4,
    )
    if isinstance(to, np.ndarray):
        to[:] = host(there)
