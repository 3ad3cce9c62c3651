"""The seeded LoRA term of every lane, and what else follows a product, on its way out.

``down`` makes u = x A_l^T, rank numbers a row; ``up`` adds scale u B_l^T to the product in one pass
over it, with the bias. Directions are drawn in registers where they are used, never stored.
Rows of a lane may be parts with seeds of their own; a program works inside one part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.triton.random import draw, draw4, elements, far, in_turn, is_far
from fwdllm.kernels.triton.runtime import (
    DEVICE,
    cast,
    cdiv,
    check_distribution,
    constant,
    dot,
    pow2,
    require,
    small,
    tensor,
)
from fwdllm.kernels.types import Lanes, LoRA

# Columns of x that a program of ``down`` adds up: enough programs to read memory at full speed with
# few rows, sums to add again few.
_CHUNK = 1024
# Elements that a program of ``round_to_references`` has.
_BLOCK = 1024


@dataclass(frozen=True)
class LaneTable:
    """``Lanes`` on the device. seeds: int64 [n_lanes, n_parts].  coefficients: float32 [n_lanes].

    starts: int32 [n_parts + 1].  references: int32 [n_lanes].  n: rows of a lane.  longest: rows of
    the longest part.
    """

    seeds: torch.Tensor
    coefficients: torch.Tensor
    starts: torch.Tensor
    references: torch.Tensor
    n: int
    longest: int

    @property
    def n_lanes(self) -> int:
        return len(self.coefficients)

    @property
    def n_parts(self) -> int:
        return len(self.starts) - 1


def lane_table(lanes: Lanes, n: int) -> LaneTable:
    """The table of lanes of n rows."""
    check_distribution(lanes.distribution)
    require(len(lanes.seeds) == len(lanes.coefficients), "a coefficient for each lane")
    n_parts = 1 if lanes.seeds.ndim == 1 else lanes.seeds.shape[1]
    require(lanes.starts is None or len(lanes.starts) == 1 + n_parts, "a seed for each part")
    starts = np.array([0, n], np.int32) if lanes.starts is None else lanes.starts
    put = constant if lanes.coefficients.any() else small  # those of plain lanes are always new
    return LaneTable(
        put(lanes.seeds).view(len(lanes), -1),
        put(lanes.coefficients),
        small(starts),
        small(lanes.references),
        n,
        int(np.diff(starts).max(initial=0)),
    )


@triton.jit
def _round(x, references, out, size, BLOCK: tl.constexpr):
    lane = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    at = lane.to(tl.int64) * size + i
    values = tl.load(x + at, mask=mask, other=0.0)
    reference = tl.load(references + lane)
    if reference != lane:
        values -= tl.load(x + reference.to(tl.int64) * size + i, mask=mask, other=0.0)
    tl.store(out + at, cast(values, tl.bfloat16), mask=mask)


def round_to_references(x: torch.Tensor, table: LaneTable) -> torch.Tensor:
    """x in bfloat16, rows of a lane as their difference to those of its reference.

    What lanes have in common is then rounded once and cancels in differences of losses.
    """
    out = torch.empty(x.shape, dtype=torch.bfloat16, device=DEVICE)
    size = table.n * x.shape[1]
    _round[(cdiv(size, _BLOCK), table.n_lanes)](x, table.references, out, size, BLOCK=_BLOCK)
    return out


@triton.jit
def _down(
    x,
    factor,
    mask,
    seeds,
    coefficients,
    starts,
    u,
    n,
    n_in,
    rank,
    offset,
    n_parts,
    chunk,
    part_blocks,
    TANGENTS: tl.constexpr,
    PERTURBED: tl.constexpr,
    NORMAL: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    RANK: tl.constexpr,
):
    part, lane = tl.program_id(0) // part_blocks, tl.program_id(1)
    i = tl.load(starts + part) + (tl.program_id(0) % part_blocks) * BM + tl.arange(0, BM)
    i_in = i[:, None] < tl.load(starts + part + 1)
    seed = tl.load(seeds + lane * n_parts + part)
    coefficient = tl.load(coefficients + lane)
    r = tl.arange(0, RANK)[:, None]
    at = (lane * n + i).to(tl.int64)[:, None] * n_in
    acc = tl.zeros([BM, RANK], tl.float32)
    begin = tl.program_id(2) * chunk
    for k0 in range(begin, min(begin + chunk, n_in), BK):
        k = k0 + tl.arange(0, BK)[None, :]
        rows = tl.load(x + at + k, mask=i_in & (k < n_in), other=0.0).to(tl.float32)
        inside = (r < rank) & (k < n_in)
        a = tl.load(factor + r * n_in + k, mask=inside, other=0.0)
        if PERTURBED and coefficient != 0.0:
            if ALIGNED:
                quarter = (offset + far(r * n_in + k0, WIDE)) // 4 + tl.arange(0, BK // 4)[None, :]
                z0, z1, z2, z3 = draw4(seed, quarter, NORMAL)
                z = in_turn(z0, z1, z2, z3)
            else:
                z = draw(seed, offset + far(r * n_in + k, WIDE), NORMAL)
            if MASKED:
                z *= tl.load(mask + r * n_in + k, mask=inside, other=0.0)
            z = tl.where(inside, coefficient * z, 0.0)
            if TANGENTS:
                primal = tl.load(
                    x + i.to(tl.int64)[:, None] * n_in + k, mask=i_in & (k < n_in), other=0.0
                )
                acc = dot(primal.to(tl.float32), tl.trans(z), acc, PRECISION)
            else:
                a += z
        acc = dot(rows, tl.trans(a), acc, PRECISION)
    rows_all = tl.num_programs(1) * n
    to = (tl.program_id(2) * rows_all + lane * n + i).to(tl.int64)[:, None] * RANK
    tl.store(u + to + tl.arange(0, RANK)[None, :], acc, mask=i_in)


def down(
    x: torch.Tensor, lora: LoRA, table: LaneTable, tangents: bool, normal: bool, perturbed: bool
) -> torch.Tensor:
    """u = x A_l^T in parts that are still to be added: float32 [chunks, rows, RANK].

    RANK is the rank or more, zero beyond it. With tangents u of those is du.
    perturbed: whether the direction of A is the stream itself, else it is left out.
    """
    rank, n_in = lora.a.shape
    wide = pow2(rank, 8)
    chunks = cdiv(n_in, _CHUNK)
    u = torch.empty(chunks, len(x), wide, dtype=torch.float32, device=DEVICE)
    # Float32 products are made by threads that have whole operands in registers.
    narrow = x.dtype == torch.bfloat16
    block_rows = min(128 if narrow else 32, pow2(table.longest, 16))
    part_blocks = cdiv(table.longest, block_rows)
    _down[(table.n_parts * part_blocks, table.n_lanes, chunks)](
        x,
        tensor(lora.a),
        None if lora.mask is None else constant(lora.mask),
        table.seeds,
        table.coefficients,
        table.starts,
        u,
        table.n,
        n_in,
        rank,
        lora.offset,
        table.n_parts,
        _CHUNK,
        part_blocks,
        TANGENTS=tangents,
        PERTURBED=perturbed,
        NORMAL=normal,
        WIDE=is_far(lora.offset + wide * n_in),
        ALIGNED=lora.offset % 4 == 0 and n_in % 4 == 0,
        MASKED=lora.mask is not None,
        PRECISION="tf32" if narrow else "ieee",
        BM=block_rows,
        BK=64,
        RANK=wide,
        num_warps=4,
        num_stages=3 if narrow else 2,
    )
    return u


@triton.jit
def _sum(u, at, mask, chunks, stride):
    """The parts of u at these positions, added in order."""
    total = tl.load(u + at, mask=mask, other=0.0)
    for c in range(1, chunks):
        total += tl.load(u + c * stride + at, mask=mask, other=0.0)
    return total


@triton.jit
def _up(
    product,
    u,
    factor,
    mask,
    bias,
    seeds,
    coefficients,
    starts,
    references,
    y,
    n,
    n_out,
    scale,
    offset,
    n_parts,
    chunks,
    u_stride,
    part_blocks,
    RANK: tl.constexpr,
    RANK_WIDE: tl.constexpr,
    TANGENTS: tl.constexpr,
    RELATIVE: tl.constexpr,
    BIASED: tl.constexpr,
    PERTURBED: tl.constexpr,
    NORMAL: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    MASKED: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    part, lane = tl.program_id(0) // part_blocks, tl.program_id(1)
    i = tl.load(starts + part) + (tl.program_id(0) % part_blocks) * BM + tl.arange(0, BM)
    i_in = i < tl.load(starts + part + 1)
    o = tl.program_id(2) * BN + tl.arange(0, BN)
    o_in = o < n_out
    both = i_in[:, None] & o_in[None, :]
    row = (lane * n + i).to(tl.int64)
    acc = tl.load(product + row[:, None] * n_out + o[None, :], mask=both, other=0.0)
    acc = acc.to(tl.float32)
    if RELATIVE:
        reference = tl.load(references + lane)
        if reference != lane:
            common = (reference * n + i).to(tl.int64)[:, None] * n_out + o[None, :]
            acc += tl.load(product + common, mask=both, other=0.0).to(tl.float32)
    if BIASED and ((not TANGENTS) or lane == 0):
        acc += tl.load(bias + o, mask=o_in, other=0.0)[None, :]
    if RANK > 0:
        seed = tl.load(seeds + lane * n_parts + part)
        coefficient = tl.load(coefficients + lane)
        for four in tl.static_range(0, RANK, 4):
            # Elements r = four .. four + 3 of the rows o of B's direction.
            z0 = tl.zeros([BN], tl.float32)
            z1, z2, z3 = z0, z0, z0
            if PERTURBED and coefficient != 0.0:
                index = offset + far(o * RANK + four, WIDE)
                if ALIGNED:
                    z0, z1, z2, z3 = draw4(seed, index // 4, NORMAL)
                else:
                    z0 = draw(seed, index, NORMAL)
                    z1 = draw(seed, index + 1, NORMAL)
                    z2 = draw(seed, index + 2, NORMAL)
                    z3 = draw(seed, index + 3, NORMAL)
            for j in tl.static_range(4):
                r = four + j
                if r < RANK:
                    z = coefficient * (z0 if j == 0 else z1 if j == 1 else z2 if j == 2 else z3)
                    if MASKED:
                        z *= tl.load(mask + o * RANK + r, mask=o_in, other=0.0)
                    b = tl.load(factor + o * RANK + r, mask=o_in, other=0.0)
                    mine = scale * _sum(u, row * RANK_WIDE + r, i_in, chunks, u_stride)
                    if TANGENTS:
                        acc += mine[:, None] * b[None, :]
                        if lane > 0:
                            there = i.to(tl.int64) * RANK_WIDE + r
                            primal = scale * _sum(u, there, i_in, chunks, u_stride)
                            acc += primal[:, None] * z[None, :]
                    else:
                        acc += mine[:, None] * (b + z)[None, :]
    tl.store(y + row[:, None] * n_out + o[None, :], cast(acc, y.dtype.element_ty), mask=both)


def up(
    product: torch.Tensor,
    u: torch.Tensor | None,
    lora: LoRA | None,
    bias: torch.Tensor | None,
    table: LaneTable,
    *,
    tangents: bool,
    relative: bool,
    normal: bool,
    perturbed: bool,
) -> torch.Tensor:
    """The product with everything that is added to it; in place unless it is ``relative``.

    u: of ``down``.  relative: rows of a lane are still differences to those of its reference.
    perturbed: whether the direction of B is the stream itself, else it is left out.
    """
    n_out = product.shape[1]
    y = torch.empty_like(product) if relative else product
    rank = 0 if lora is None else lora.b.shape[1]
    block_rows = min(64, pow2(table.longest, 8))
    part_blocks = cdiv(table.longest, block_rows)
    offset = 0 if lora is None else lora.offset_b
    mask = None
    if lora is not None and lora.mask is not None:
        mask = constant(lora.mask)[lora.a.shape[0] * lora.a.shape[1] :]
    _up[(table.n_parts * part_blocks, table.n_lanes, cdiv(n_out, 64))](
        product,
        u,
        None if lora is None else tensor(lora.b),
        mask,
        bias,
        table.seeds,
        table.coefficients,
        table.starts,
        table.references,
        y,
        table.n,
        n_out,
        1.0 if lora is None else float(lora.scale),
        offset,
        table.n_parts,
        1 if u is None else len(u),
        0 if u is None else u.shape[1] * u.shape[2],
        part_blocks,
        RANK=rank,
        RANK_WIDE=pow2(rank, 8),
        TANGENTS=tangents,
        RELATIVE=relative,
        BIASED=bias is not None,
        PERTURBED=perturbed,
        NORMAL=normal,
        WIDE=is_far(offset + n_out * rank),
        ALIGNED=offset % 4 == 0 and rank % 4 == 0,
        MASKED=mask is not None,
        BM=block_rows,
        BN=64,
        num_warps=4,
    )
    return y


def coordinates(lora: LoRA, lanes: Lanes, lane: int, part: int, of_b: bool) -> torch.Tensor:
    """Numbers Z of the stream for a basis, [rank, q], times the lane's coefficient."""
    rank = lora.a.shape[0]
    basis = lora.basis_b if of_b else lora.basis_a
    assert basis is not None
    q = len(basis)
    seed = int(lanes.seeds.reshape(len(lanes), -1)[lane, part])
    offset = lora.offset_b if of_b else lora.offset
    z = elements(seed, offset, rank * q, lanes.distribution).view(rank, q)
    return z * float(lanes.coefficients[lane])
