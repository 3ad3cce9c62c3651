"""The seeded LoRA term of every lane, and what else is added to the result of a matmul.

``down`` computes u = x A_l^T, ``rank`` numbers for each row; ``up`` adds scale u B_l^T and the bias
to the product x W^T in one pass over it, or writes them for the product to be added to. Directions
are generated in registers where they are used, never stored. The rows of a lane may have parts with
seeds of their own; a program works on one part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.triton.products import added
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

# Columns of x that a program of ``down`` sums: so few that even with few rows there are enough
# programs to read memory at full speed, so many that there are few partial sums.
_CHUNK = 1024
# Elements that a program of ``round_to_references`` rounds.
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
    """The table of lanes with n rows each."""
    check_distribution(lanes.distribution)
    require(len(lanes.seeds) == len(lanes.coefficients), "a coefficient for each lane")
    n_parts = 1 if lanes.seeds.ndim == 1 else lanes.seeds.shape[1]
    require(lanes.starts is None or len(lanes.starts) == 1 + n_parts, "a seed for each part")
    starts = np.array([0, n], np.int32) if lanes.starts is None else lanes.starts
    put = constant if lanes.coefficients.any() else small  # plain lanes come in new arrays
    return LaneTable(
        put(lanes.seeds).view(len(lanes), -1),
        put(lanes.coefficients),
        small(starts),
        small(lanes.references),
        n,
        int(np.diff(starts).max(initial=0)),
    )


@lru_cache(maxsize=64)
def _plain_arrays(n: int) -> tuple[np.ndarray, ...]:
    table = Lanes.plain()
    return table.seeds[None], table.coefficients, np.array([0, n], np.int32), table.references


def plain_table(n: int) -> LaneTable:
    """The table of one plain lane with n rows: as of ``lane_table``, in a tenth of the time."""
    seeds, coefficients, starts, references = (small(x) for x in _plain_arrays(n))
    return LaneTable(seeds, coefficients, starts, references, n, n)


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
def _rows_of_part(starts, part_blocks, BM: tl.constexpr):
    """The part that program_id(0) works on, its rows' numbers in a lane, and which rows exist.

    Each part has part_blocks programs, enough for the longest one.
    """
    part = tl.program_id(0) // part_blocks
    i = tl.load(starts + part) + (tl.program_id(0) % part_blocks) * BM + tl.arange(0, BM)
    return part, i, i < tl.load(starts + part + 1)


@triton.jit
def _seed_of(seeds, lane, part, part_blocks):
    """The seed of a part of a lane. seeds: [n_lanes, n_parts]."""
    n_parts = tl.num_programs(0) // part_blocks
    return tl.load(seeds + lane * n_parts + part)


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
    chunk,
    part_blocks,
    TANGENTS: tl.constexpr,
    DRAWN: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    RANK: tl.constexpr,
):
    """u_l = x_l (A + c_l z(seed_l))^T; for a tangent u_l = x_l A^T + c_l x_0 z(seed_l)^T.

    A program does that for BM rows of a part of a lane and ``chunk`` columns of x.
    x: [n_lanes, n, n_in].  factor: A, float32 [rank, n_in].  mask: multiplies z, of the shape of A,
    or None.  seeds, coefficients, starts: of a ``LaneTable``.  u: partial sums, float32 [chunks,
    n_lanes, n, RANK]; RANK is rank padded to a power of two.
    z[r, k] is number offset + r * n_in + k of the stream.  DRAWN: the distribution of z, or None to
    leave z out.  WIDE: positions need an int64.  ALIGNED: rows of A begin at multiples of 4, so the
    four numbers of a counter of the stream belong to four adjacent columns.
    """
    BK: tl.constexpr = 64
    lane = tl.program_id(1)
    part, i, i_in = _rows_of_part(starts, part_blocks, BM)
    i_in = i_in[:, None]
    seed = _seed_of(seeds, lane, part, part_blocks)
    coefficient = tl.load(coefficients + lane)
    r = tl.arange(0, RANK)[:, None]
    row = (lane * n + i).to(tl.int64)[:, None] * n_in
    primal_row = i.to(tl.int64)[:, None] * n_in
    acc = tl.zeros([BM, RANK], tl.float32)
    begin = tl.program_id(2) * chunk
    for k0 in range(begin, min(begin + chunk, n_in), BK):
        k = k0 + tl.arange(0, BK)[None, :]
        rows = tl.load(x + row + k, mask=i_in & (k < n_in), other=0.0)
        inside = (r < rank) & (k < n_in)
        a = tl.load(factor + r * n_in + k, mask=inside, other=0.0)
        if DRAWN is not None and coefficient != 0.0:
            if ALIGNED:
                counter = (offset + far(r * n_in + k0, WIDE)) // 4
                counter += tl.arange(0, BK // 4)[None, :]
                z0, z1, z2, z3 = draw4(seed, counter, DRAWN == "normal")
                z = in_turn(z0, z1, z2, z3)
            else:
                z = draw(seed, offset + far(r * n_in + k, WIDE), DRAWN == "normal")
            if mask is not None:
                z *= tl.load(mask + r * n_in + k, mask=inside, other=0.0)
            z = tl.where(inside, coefficient * z, 0.0)
            if TANGENTS:
                primal = tl.load(x + primal_row + k, mask=i_in & (k < n_in), other=0.0)
                acc = dot(primal, tl.trans(cast(z, x.dtype.element_ty)), acc, PRECISION)
            else:
                a += z
        acc = dot(rows, tl.trans(cast(a, x.dtype.element_ty)), acc, PRECISION)
    n_rows = tl.num_programs(1) * n
    to = (tl.program_id(2) * n_rows + lane * n + i).to(tl.int64)[:, None] * RANK
    tl.store(u + to + tl.arange(0, RANK)[None, :], acc, mask=i_in)


def down(
    x: torch.Tensor, lora: LoRA, table: LaneTable, *, tangents: bool, drawn: str | None
) -> torch.Tensor:
    """u = x A_l^T as partial sums over columns of x: float32 [chunks, rows, RANK].

    RANK is the rank or more, padded with zeros. Rows of tangents have the derivative du.
    drawn: the distribution of A's direction; None leaves the direction out, for one in a basis.
    """
    rank, n_in = lora.a.shape
    wide = _padded(rank)
    chunks = cdiv(n_in, _CHUNK)
    u = torch.empty(chunks, len(x), wide, dtype=torch.float32, device=DEVICE)
    # With many ranks tiles are smaller, so that they fit the shared memory of consumer cards.
    narrow = x.dtype == torch.bfloat16 and wide <= 16
    block_rows = min(128 if narrow else 64 if wide <= 32 else 32, pow2(table.longest, 16))
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
        _CHUNK,
        part_blocks,
        TANGENTS=tangents,
        DRAWN=drawn,
        WIDE=is_far(lora.offset + wide * n_in),
        ALIGNED=lora.offset % 4 == 0 and n_in % 4 == 0,
        PRECISION=_precision(x.dtype),
        BM=block_rows,
        RANK=wide,
        num_warps=4,
        num_stages=3 if wide <= 32 else 2,
    )
    return added(u, torch.float32) if chunks > 1 else u[0]


def _padded(rank: int) -> int:
    """How many numbers u has for a row."""
    return pow2(rank, 8)


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
    part_blocks,
    RANK: tl.constexpr,
    RANK_PADDED: tl.constexpr,
    TANGENTS: tl.constexpr,
    DRAWN: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    """y_l = product_l + bias + scale u_l (B + c_l z(seed_l))^T.

    For a tangent y_l = product_l + scale (u_l B^T + c_l u_0 z(seed_l)^T), without bias.
    A program does that for BM rows of a part of a lane and BN outputs.
    product, y: [n_lanes, n, n_out], maybe the same tensor; None for a product that is added later.
    u: float32 [n_lanes, n, RANK_PADDED], or None without LoRA; then RANK is 0.  factor: B, float32
    [n_out, RANK].  mask: multiplies z, of the shape of B, or None.  bias: float32 [n_out] or None.
    seeds, coefficients, starts: of a ``LaneTable``.
    references: of the ``LaneTable`` if rows of the product are differences to rows of a reference
    lane, which are then added here; else None.
    z[o, r] is number offset + o * RANK + r of the stream; DRAWN, WIDE and ALIGNED as in ``_down``,
    but for rows of B.
    """
    lane = tl.program_id(1)
    part, i, i_in = _rows_of_part(starts, part_blocks, BM)
    o = tl.program_id(2) * BN + tl.arange(0, BN)
    o_in = o < n_out
    both = i_in[:, None] & o_in[None, :]
    row = (lane * n + i).to(tl.int64)
    acc = tl.zeros([BM, BN], tl.float32)
    if RANK > 0:
        seed = _seed_of(seeds, lane, part, part_blocks)
        coefficient = tl.load(coefficients + lane)
        r = tl.arange(0, RANK_PADDED)[None, :]
        inside = o_in[:, None] & (r < RANK)
        at = o[:, None] * RANK + r
        b = tl.load(factor + at, mask=inside, other=0.0)
        mine = tl.load(u + row[:, None] * RANK_PADDED + r, mask=i_in[:, None], other=0.0)
        if DRAWN is None:
            z = tl.zeros([BN, RANK_PADDED], tl.float32)
            source = mine
        else:
            if ALIGNED:
                counter = (offset + far(o * RANK, WIDE))[:, None] // 4
                counter += tl.arange(0, RANK_PADDED // 4)[None, :]
                z0, z1, z2, z3 = draw4(seed, counter, DRAWN == "normal")
                z = in_turn(z0, z1, z2, z3)
            else:
                z = draw(seed, offset + far(at, WIDE), DRAWN == "normal")
            if mask is not None:
                z *= tl.load(mask + at, mask=inside, other=0.0)
            z = tl.where(inside, coefficient * z, 0.0)
            source = mine
            if TANGENTS:
                primal_at = i.to(tl.int64)[:, None] * RANK_PADDED + r
                source = tl.load(u + primal_at, mask=i_in[:, None], other=0.0)
        # Both terms in one product: of pairs (u_l, u_l or u_0) with pairs (B, c z).
        left = scale * tl.join(mine, source).reshape(BM, 2 * RANK_PADDED)
        right = tl.join(b, z).reshape(BN, 2 * RANK_PADDED)
        acc = dot(left, tl.trans(right), acc, PRECISION)
    at = row[:, None] * n_out + o[None, :]
    if product is not None:
        acc += tl.load(product + at, mask=both, other=0.0).to(tl.float32)
    if references is not None:
        reference = tl.load(references + lane)
        if reference != lane:
            common = (reference * n + i).to(tl.int64)[:, None] * n_out + o[None, :]
            acc += tl.load(product + common, mask=both, other=0.0).to(tl.float32)
    if bias is not None and ((not TANGENTS) or lane == 0):
        acc += tl.load(bias + o, mask=o_in, other=0.0)[None, :]
    tl.store(y + at, cast(acc, y.dtype.element_ty), mask=both)


def up(
    product: torch.Tensor | None,
    u: torch.Tensor | None,
    lora: LoRA | None,
    bias: torch.Tensor | None,
    table: LaneTable,
    y: torch.Tensor,
    *,
    tangents: bool,
    relative: bool,
    drawn: str | None,
) -> torch.Tensor:
    """y, [rows, n_out], made the product x W^T plus LoRA term, bias and reference rows.

    product: None to leave it out; y itself unless ``relative``.  u: of ``down``.  relative: whether
    rows of a lane are differences to those of its reference.  drawn: the distribution of B's
    direction; None leaves the direction out, for one in a basis.
    """
    n_out = y.shape[1]
    rank = 0 if lora is None else lora.b.shape[1]
    # The direction is drawn again for every block of rows: 3.5 instructions an output with 128.
    # With more ranks, or three TF32 parts of a number, a thread has no registers for so many rows.
    wide = _padded(rank)
    narrow = y.dtype == torch.bfloat16 and wide <= 16
    block_rows = min(128 if narrow else 64, pow2(table.longest, 16))
    block_out = 64 if wide <= 32 else 32
    part_blocks = cdiv(table.longest, block_rows)
    offset = 0 if lora is None else lora.offset_b
    mask = None
    if lora is not None and lora.mask is not None:
        mask = constant(lora.mask)[lora.a.shape[0] * lora.a.shape[1] :]
    _up[(table.n_parts * part_blocks, table.n_lanes, cdiv(n_out, block_out))](
        product,
        u,
        None if lora is None else tensor(lora.b),
        mask,
        bias,
        table.seeds,
        table.coefficients,
        table.starts,
        table.references if relative else None,
        y,
        table.n,
        n_out,
        1.0 if lora is None else float(lora.scale),
        offset,
        part_blocks,
        RANK=rank,
        RANK_PADDED=wide,
        TANGENTS=tangents,
        DRAWN=drawn,
        WIDE=is_far(offset + n_out * rank),
        ALIGNED=offset % 4 == 0 and rank % 4 == 0,
        PRECISION=_precision(y.dtype),
        BM=block_rows,
        BN=block_out,
        num_warps=4,
    )
    return y


def _precision(dtype: torch.dtype) -> str:
    """How tensor cores take float32 operands of the adapter, beside activations of this type.

    TF32 has more bits than bfloat16, and the products of three TF32 parts are as good as float32's.
    """
    return "tf32" if dtype == torch.bfloat16 else "tf32x3"


def coordinates(lora: LoRA, lanes: Lanes, lane: int, part: int, of_b: bool) -> torch.Tensor:
    """The coordinates Z of a direction in a basis, [rank, q], times the lane's coefficient."""
    rank = lora.a.shape[0]
    basis = lora.basis_b if of_b else lora.basis_a
    assert basis is not None
    q = len(basis)
    seed = int(lanes.seeds.reshape(len(lanes), -1)[lane, part])
    offset = lora.offset_b if of_b else lora.offset
    z = elements(seed, offset, rank * q, lanes.distribution).view(rank, q)
    return z * float(lanes.coefficients[lane])
