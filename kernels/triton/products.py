"""x W^T for a quantized W, and the way back, x W; by one of two routes.

Fused: a kernel decodes a tile of W and multiplies by it. Every block of rows decodes W again, so
this route is for few rows, where reading the weights takes most of the time. That of ``few`` does
it for bfloat16 rows of whole tiles, and ``_fused`` for all else, element by element.
Decoded: W is decoded to a bfloat16 scratch buffer, and the vendor's matmul multiplies by it. W is
decoded once however many rows there are, so this route is for many. The scratch is freed after the
matmul.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl

from fwdllm.kernels.triton.decode import decode, decoded
from fwdllm.kernels.triton.few import few
from fwdllm.kernels.triton.runtime import (
    DEVICE,
    INTERPRETED,
    DeviceWeight,
    cast,
    cdiv,
    dot,
    pow2,
)
from fwdllm.kernels.triton.tiles import steps

# From this many rows on weights are decoded to scratch: more than a program of ``few`` has, which
# reads the weights once for each 64. On an H200 both take as long for 128 rows of Q4_0 and Q8_0,
# and of Q4_K and Q6_K scratch takes 0.7 and 0.6 times as long; for 64 rows of these types, it takes
# 1.7, 1.7, 1.3 and 1.1 times as long.
SCRATCH_ROWS = 65
# Bytes of scratch: 4096 x 11008 weights in bfloat16 fit, an output matrix is decoded in parts.
SCRATCH_BYTES = 128 * 2**20
# Parts of a sum, of at least 256 terms, that the fused kernel adds up in different programs
# (split-K). Otherwise, with few rows, there are only about as many programs as multiprocessors, and
# nothing hides the time that they wait for memory.
_PARTS = 8
# Sums that a program of ``_add`` has, 4 in each thread of 4 warps.
_ADDED = 512


@triton.jit
def _fused(
    x,
    data,
    fields,
    y,
    rows,
    n_out,
    n_in,
    row_bytes,
    chunk,
    BACK: tl.constexpr,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = x W^T, or x W if it goes BACK: BM rows and BN columns of it, by ``chunk`` terms.

    y: [parts, rows, columns].  W: [n_out, n_in]; back it is read a tile of [BK, BN] at a time as
    it lies, and forth one of [BN, BK].
    """
    # Adjacent programs have blocks of rows of the same panel of weights, to share its bytes.
    row_blocks = tl.cdiv(rows, BM)
    m = (tl.program_id(0) % row_blocks) * BM + tl.arange(0, BM)
    o = (tl.program_id(0) // row_blocks) * BN + tl.arange(0, BN)
    width, terms = n_out, n_in
    if BACK:
        width, terms = n_in, n_out
    acc = tl.zeros([BM, BN], tl.float32)
    m_at = m.to(tl.int64)[:, None] * terms
    o_at = o.to(tl.int64)[:, None] * row_bytes
    begin = tl.program_id(1) * chunk
    for k0 in range(begin, tl.minimum(begin + chunk, terms), BK):
        k = k0 + tl.arange(0, BK)
        inside = k[None, :] < terms
        a = tl.load(x + m_at + k[None, :], mask=(m[:, None] < rows) & inside, other=0.0)
        if BACK:
            k_at = k.to(tl.int64)[:, None] * row_bytes
            there = (k[:, None] < terms) & (o[None, :] < width)
            w = cast(decode(data, fields, k_at, o[None, :], n_in, there, TYPE), a.dtype)
        else:
            there = (o[:, None] < width) & inside
            w = decode(data, fields, o_at, k[None, :], n_in, there, TYPE)
            w = tl.trans(cast(w, a.dtype))
        acc = dot(a, w, acc, PRECISION)
    mask = (m[:, None] < rows) & (o[None, :] < width)
    at = (tl.program_id(1) * rows + m).to(tl.int64)[:, None] * width + o[None, :]
    tl.store(y + at, cast(acc, y.dtype.element_ty), mask=mask)


@triton.jit
def _add(parts, y, size, N_PARTS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = i < size
    total = tl.load(parts + i, mask=mask, other=0.0)
    at = i
    for _ in tl.static_range(1, N_PARTS):  # unrolled, to wait for memory once
        at += size
        total += tl.load(parts + at, mask=mask, other=0.0)
    tl.store(y + i, cast(total, y.dtype.element_ty), mask=mask)


def added(parts: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The sum of parts [n_parts, rows, columns], float32, one after the other, as ``dtype``."""
    n_parts, rows, width = parts.shape
    if n_parts == 1 and dtype == torch.float32:
        return parts[0]
    y = torch.empty(rows, width, dtype=dtype, device=DEVICE)
    size = rows * width
    if size:
        _add[(cdiv(size, _ADDED),)](parts, y, size, N_PARTS=n_parts, BLOCK=_ADDED)
    return y


def fused(
    x: torch.Tensor, weight: DeviceWeight, dtype: torch.dtype, back: bool = False
) -> torch.Tensor:
    """x W^T as [rows, n_out] of ``dtype``; x [rows, n_in] of bfloat16, or float32 for exactness.

    back: x W as [rows, n_in], x [rows, n_out].  Sums are taken in an order that depends on their
    number of terms alone.
    """
    if x.dtype == torch.bfloat16 and not back and steps(weight) is not None:
        return few(x, weight, dtype)
    rows, terms = x.shape
    width = weight.n_in if back else weight.n_out
    n_parts = max(1, min(_PARTS, terms // 256))
    part_type = torch.float32 if n_parts > 1 else dtype
    parts = torch.empty(n_parts, rows, width, dtype=part_type, device=DEVICE)
    block_rows = min(64, pow2(rows, 16))
    block_out = 32 if rows <= 16 else 64
    block_in = 64
    chunk = cdiv(cdiv(terms, n_parts), block_in) * block_in
    grid = (cdiv(rows, block_rows) * cdiv(width, block_out), n_parts)
    _fused[grid](
        x,
        weight.data,
        weight.fields,
        parts,
        rows,
        weight.n_out,
        weight.n_in,
        weight.data.shape[1],
        chunk,
        BACK=back,
        TYPE=int(weight.type),
        PRECISION="ieee",
        BM=block_rows,
        BN=block_out,
        BK=block_in,
        num_warps=4,
        num_stages=3,
    )
    return added(parts, dtype) if n_parts > 1 else parts[0]


def by_scratch(x: torch.Tensor, weight: DeviceWeight, dtype: torch.dtype) -> torch.Tensor:
    """As ``fused``, by decoding to scratch; x is bfloat16."""
    parts = list(_scratch_parts(weight))
    if len(parts) == 1:
        return vendor(x, decoded(weight, torch.bfloat16), dtype)
    y = torch.empty(len(x), weight.n_out, dtype=dtype, device=DEVICE)
    at = 0
    for part in parts:
        y[:, at : at + part.n_out] = vendor(x, decoded(part, torch.bfloat16), dtype)
        at += part.n_out
    return y


def back_by_scratch(x: torch.Tensor, weight: DeviceWeight) -> torch.Tensor:
    """x W as float32 [rows, n_in], by decoding to scratch; x [rows, n_out] is bfloat16."""
    y, at = None, 0
    for part in _scratch_parts(weight):
        some = x[:, at : at + part.n_out]
        found = vendor(some, decoded(part, torch.bfloat16).T, torch.float32)
        y = found if y is None else y.add_(found)
        at += part.n_out
    assert y is not None
    return y


def added_to(x: torch.Tensor, exact: bool) -> bool:
    """Whether ``add_product`` can take x: its rows are many, and bfloat16."""
    return not exact and x.dtype == torch.bfloat16 and len(x) >= SCRATCH_ROWS


def add_product(y: torch.Tensor, x: torch.Tensor, weight: DeviceWeight) -> None:
    """y += x W^T in place, by decoding to scratch; y, x bfloat16.

    The vendor's product reads y while it computes: what is written to y before costs less time than
    a pass over the product after it.
    """
    at = 0
    for part in _scratch_parts(weight):
        w, some = decoded(part, torch.bfloat16), y[:, at : at + part.n_out]
        if INTERPRETED:
            some[:] = some.float() + x.float() @ w.float().T
        else:
            some.addmm_(x, w.T)
        at += part.n_out


def vendor(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x w^T of bfloat16 matrices as ``dtype``, summed in float32 by PyTorch's library."""
    if INTERPRETED:  # PyTorch on a CPU cannot return float32 for bfloat16 operands
        return (x.float() @ w.float().T).to(dtype)
    if dtype == x.dtype:
        return x @ w.T
    return torch.mm(x, w.T, out_dtype=dtype)


def product(
    x: torch.Tensor, weight: DeviceWeight, dtype: torch.dtype, exact: bool = False
) -> torch.Tensor:
    """x W^T as [rows, n_out] of ``dtype`` by the faster route; with ``exact`` all in float32."""
    return multiplier(weight, len(x), exact)(x, dtype)


def product_back(x: torch.Tensor, weight: DeviceWeight, exact: bool = False) -> torch.Tensor:
    """x W as float32 [rows, n_in], x [rows, n_out]; with ``exact`` all in float32.

    By scratch however few rows there are: on an H200 that took no longer at one row than decoding
    tiles of a transposed W.
    """
    if exact:
        return fused(x.float(), weight, torch.float32, back=True)
    return back_by_scratch(x.to(torch.bfloat16), weight)


def multiplier(
    weight: DeviceWeight, rows: int, exact: bool = False
) -> Callable[[torch.Tensor, torch.dtype], torch.Tensor]:
    """A function for several x W^T with one weight, which is decoded only once if it fits scratch.

    rows: of all x together.
    """
    if exact:
        return lambda x, dtype: fused(x.float(), weight, dtype)
    if rows < SCRATCH_ROWS:
        return lambda x, dtype: fused(x.to(torch.bfloat16), weight, dtype)
    if _scratch_rows(weight) < weight.n_out:
        return lambda x, dtype: by_scratch(x.to(torch.bfloat16), weight, dtype)
    w = decoded(weight, torch.bfloat16)
    return lambda x, dtype: vendor(x.to(torch.bfloat16), w, dtype)


def _scratch_rows(weight: DeviceWeight) -> int:
    return max(1, SCRATCH_BYTES // (2 * weight.n_in))


def _scratch_parts(weight: DeviceWeight) -> Iterator[DeviceWeight]:
    step = _scratch_rows(weight)
    for first in range(0, weight.n_out, step):
        yield weight.rows(first, first + step)
