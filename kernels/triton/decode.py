"""Weights in Triton, element by element, from rows as of ``layout``.

``decode`` is called inside kernels and returns a tile of a matrix as float32. Each element loads
the byte with its bits and the scales of its block; neighbours load the same bytes, which come from
the first-level cache.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array, Matrix
from fwdllm.kernels.triton.runtime import (
    DEVICE,
    DeviceWeight,
    cast,
    cdiv,
    check_indices,
    constant,
    host,
    pow2,
)
from fwdllm.kernels.triton.runtime import (
    weight as on_device,
)
from fwdllm.kernels.triton.tiles import (
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_K,
    Q6_K,
    Q8_0,
    codes,
    high_bits,
    place,
    scale_words,
    steps,
    values,
    words,
)
from fwdllm.kernels.types import QuantType

F32 = tl.constexpr(int(QuantType.F32))
F16 = tl.constexpr(int(QuantType.F16))
BF16 = tl.constexpr(int(QuantType.BF16))
Q5_0 = tl.constexpr(int(QuantType.Q5_0))
Q5_1 = tl.constexpr(int(QuantType.Q5_1))
Q2_K = tl.constexpr(int(QuantType.Q2_K))
Q3_K = tl.constexpr(int(QuantType.Q3_K))
IQ4_NL = tl.constexpr(int(QuantType.IQ4_NL))
IQ4_XS = tl.constexpr(int(QuantType.IQ4_XS))
MXFP4 = tl.constexpr(int(QuantType.MXFP4))
# The values of codes of IQ4_NL and IQ4_XS, four bytes to a word.
_IQ4 = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113]
_IQ4_0, _IQ4_4, _IQ4_8, _IQ4_12 = (
    tl.constexpr(word) for word in np.array(_IQ4, np.int8).view("<i4").tolist()
)

# Elements that a program decodes: 16 in each thread of 4 warps.
_TILE = 2048
# Steps that a program decodes, of 128 or 256 elements, of four types on an H200.
_STEPS = 32


@triton.jit
def _half(fields, at, mask):
    """The float16 at a byte offset, which is even in every type."""
    return tl.load(fields + (at >> 1), mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _byte(data, at, mask):
    return tl.load(data + at, mask=mask, other=0).to(tl.int32)


@triton.jit
def _signed(byte):
    """The int8 of a byte."""
    return tl.where(byte > 127, byte - 256, byte)


@triton.jit
def _field(data, plane, k, n_in, mask, BITS: tl.constexpr, SIZE: tl.constexpr, EACH: tl.constexpr):
    """Field k of a plane of tiles of ``SIZE`` sub-blocks of ``EACH`` elements."""
    block = k // EACH
    first = block // SIZE * SIZE
    size = tl.minimum(SIZE, n_in // EACH - first)
    at = (first * EACH + k % EACH * size + block - first) * BITS
    return (_byte(data, plane + (at >> 3), mask) >> (at & 7)) & ((1 << BITS) - 1)


@triton.jit
def _scale_and_minimum(data, fields, at, sub, mask):
    """Scale and minimum of sub-block 0 .. 7 of a Q4_K or Q5_K block, times its d and dmin."""
    late = sub >= 4
    low = _byte(data, at + 4 + (sub & 3), mask)  # scales 0-3 and top bits of 4-7
    middle = _byte(data, at + 8 + (sub & 3), mask)  # the same of minima
    rest = _byte(data, at + 12 + (sub & 3), mask)  # low nibbles of scales and of minima 4-7
    scale = tl.where(late, (rest & 15) | ((low >> 6) << 4), low & 63)
    minimum = tl.where(late, (rest >> 4) | ((middle >> 6) << 4), middle & 63)
    d, d_min = _half(fields, at, mask), _half(fields, at + 2, mask)
    return d * scale.to(tl.float32), d_min * minimum.to(tl.float32)


@triton.jit
def _nibble(data, at, i, mask):
    """Field i of 32 in 16 bytes: all low halves and then all high ones."""
    return (_byte(data, at + i % 16, mask) >> (i // 16 * 4)) & 15


@triton.jit
def _fifth_bit(data, at, i, mask):
    """Bit i of the 32 in four bytes, as the fifth of a number."""
    return ((_byte(data, at + i // 8, mask) >> (i % 8)) & 1) << 4


@triton.jit
def _pair_of_bits(data, at, i, mask):
    """Field i of 256 in 64 bytes: all lowest ones of half of the bytes, then the next."""
    return (_byte(data, at + i // 128 * 32 + i % 32, mask) >> (i // 32 % 4 * 2)) & 3


@triton.jit
def _iq4(code):
    """The value of a code of IQ4_NL or IQ4_XS."""
    low = tl.where(code < 4, _IQ4_0, _IQ4_4)
    high = tl.where(code < 12, _IQ4_8, _IQ4_12)
    word = tl.where(code < 8, low, high)
    return _signed((word >> (code % 4 * 8)) & 255)


@triton.jit
def _e2m1(code):
    """Twice the number of a sign, two bits of exponent and one of fraction."""
    size = code & 7
    size = tl.where(size < 2, size, (size & 1 | 2) << tl.maximum((size >> 1) - 1, 0))
    return tl.where(code < 8, size, -size)


@triton.jit
def _half_of_e8m0(byte):
    """Half of 2^(byte - 127): the least two are subnormal."""
    bits = tl.where(byte < 2, 0x00200000 << byte, (byte - 1) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _in_blocks(data, fields, row, k, mask, TYPE: tl.constexpr):
    """As ``decode``, of the types whose blocks lie as in the file."""
    if TYPE == Q5_0 or TYPE == Q5_1:
        SIZE: tl.constexpr = 22 if TYPE == Q5_0 else 24
        at = row + (k // 32) * SIZE
        q = _nibble(data, at + (SIZE - 16), k % 32, mask)
        q |= _fifth_bit(data, at + (SIZE - 20), k % 32, mask)
        if TYPE == Q5_0:
            return _half(fields, at, mask) * (q - 16).to(tl.float32)
        else:
            return _half(fields, at, mask) * q.to(tl.float32) + _half(fields, at + 2, mask)
    elif TYPE == IQ4_NL:
        at = row + (k // 32) * 18
        q = _iq4(_nibble(data, at + 2, k % 32, mask))
        return _half(fields, at, mask) * q.to(tl.float32)
    elif TYPE == MXFP4:
        at = row + (k // 32) * 17
        q = _e2m1(_nibble(data, at + 1, k % 32, mask))
        return _half_of_e8m0(_byte(data, at, mask)) * q.to(tl.float32)
    elif TYPE == IQ4_XS:
        at = row + (k // 256) * 136
        sub = (k // 32) % 8
        low = (_byte(data, at + 4 + sub // 2, mask) >> (sub % 2 * 4)) & 15
        top = (_byte(data, at + 2 + sub // 4, mask) >> (sub % 4 * 2)) & 3
        scale = _half(fields, at, mask) * ((low | (top << 4)) - 32).to(tl.float32)
        q = _iq4(_nibble(data, at + 8 + sub * 16, k % 32, mask))
        return scale * q.to(tl.float32)
    elif TYPE == Q3_K:
        at = row + (k // 256) * 110
        i = k % 256
        sub = i // 16
        low = (_byte(data, at + 96 + sub % 8, mask) >> (sub // 8 * 4)) & 15
        top = (_byte(data, at + 104 + sub % 4, mask) >> (sub // 4 * 2)) & 3
        scale = _half(fields, at + 108, mask) * ((low | (top << 4)) - 32).to(tl.float32)
        high = (_byte(data, at + i % 32, mask) >> (i // 32)) & 1
        q = _pair_of_bits(data, at + 32, i, mask) | (high << 2)
        return scale * (q - 4).to(tl.float32)
    else:  # Q2_K
        at = row + (k // 256) * 84
        i = k % 256
        both = _byte(data, at + i // 16, mask)
        scale = _half(fields, at + 80, mask) * (both & 15).to(tl.float32)
        minimum = _half(fields, at + 82, mask) * (both >> 4).to(tl.float32)
        return scale * _pair_of_bits(data, at + 16, i, mask).to(tl.float32) - minimum


@triton.jit
def decode(data, fields, row, k, n_in, mask, TYPE: tl.constexpr):
    """Elements k of rows that begin at byte ``row``: float32, of the shape they broadcast to.

    data, fields: of a ``DeviceWeight``.  row: int64.  k: int32.
    """
    if TYPE == Q4_0:
        q = _field(data, row, k, n_in, mask, 4, 4, 32)
        at = row + n_in // 2 + (k // 32) * 2
        return _half(fields, at, mask) * (q - 8).to(tl.float32)
    elif TYPE == Q4_1:
        q = _field(data, row, k, n_in, mask, 4, 4, 32)
        at = row + n_in // 2 + (k // 32) * 4
        return _half(fields, at, mask) * q.to(tl.float32) + _half(fields, at + 2, mask)
    elif TYPE == Q8_0:
        q = _signed(_field(data, row, k, n_in, mask, 8, 2, 32))
        at = row + n_in + (k // 32) * 2
        return _half(fields, at, mask) * q.to(tl.float32)
    elif TYPE == Q4_K:
        q = _field(data, row, k, n_in, mask, 4, 4, 32)
        at = row + n_in // 2 + (k // 256) * 16
        scale, minimum = _scale_and_minimum(data, fields, at, (k // 32) % 8, mask)
        return scale * q.to(tl.float32) - minimum
    elif TYPE == Q5_K:
        low = _field(data, row, k, n_in, mask, 4, 4, 32)
        at = row + n_in // 2 + (k // 256) * 32 + k % 16 * 2 + (k // 16) % 2
        high = (_byte(data, at, mask) >> ((k // 32) % 8)) & 1
        at = row + n_in // 2 + n_in // 8 + (k // 256) * 16
        scale, minimum = _scale_and_minimum(data, fields, at, (k // 32) % 8, mask)
        return scale * (low | (high << 4)).to(tl.float32) - minimum
    elif TYPE == Q6_K:
        low = _field(data, row, k, n_in, mask, 4, 4, 16)
        high = _field(data, row + n_in // 2, k, n_in, mask, 2, 8, 16)
        at = row + n_in // 2 + n_in // 4
        scale = _signed(_byte(data, at + k // 16, mask))
        d = _half(fields, at + n_in // 16 + (k // 256) * 2, mask)
        q = (low | (high << 4)) - 32
        return (d * scale.to(tl.float32)) * q.to(tl.float32)
    elif TYPE == F32 or TYPE == F16 or TYPE == BF16:  # the fields are the elements
        return tl.load(
            fields + row // (fields.dtype.element_ty.primitive_bitwidth // 8) + k,
            mask=mask,
            other=0.0,
        ).to(tl.float32)
    else:
        return _in_blocks(data, fields, row, k, mask, TYPE)


@triton.jit
def _rows(
    data,
    fields,
    ids,
    out,
    rows,
    n_in,
    row_bytes,
    GATHER: tl.constexpr,
    TYPE: tl.constexpr,
    BM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)[:, None]
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    row = i
    if GATHER:
        row = tl.load(ids + i, mask=i < rows, other=0).to(tl.int64)
    mask = (i < rows) & (k < n_in)
    values = decode(data, fields, row * row_bytes, k, n_in, mask, TYPE)
    tl.store(out + i * n_in + k, cast(values, out.dtype.element_ty), mask=mask)


@triton.jit
def _steps(
    halves,
    words,
    out,
    size,
    n_in,
    row_units,
    TYPE: tl.constexpr,
    STEP: tl.constexpr,
    EACH: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As ``_rows``, of BLOCK of all ``size`` steps: every byte of them is read once."""
    TILES: tl.constexpr = STEP // EACH // SIZE
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = i < size
    n_steps = n_in // STEP
    row = (tl.minimum(i, size - 1) // n_steps).to(tl.int64)
    step = i % n_steps
    to = out + (row * n_in + step * STEP)[:, None] + tl.arange(0, EACH)[None, :]
    row *= row_units
    scales = scale_words(words, row, step, n_in, TYPE)
    for tile in tl.static_range(TILES):
        code = codes(halves, row, step, tile, TILES, EACH)
        high = code
        if TYPE == Q5_K or TYPE == Q6_K:
            high = high_bits(halves, row, step, n_in, tile // 2, TYPE, EACH)
        for s in tl.static_range(SIZE):
            value = values(code, high, scales, tile * SIZE + s, TYPE)
            at = to + place(tile * SIZE + s, TYPE, EACH)
            tl.store(at, cast(value, out.dtype.element_ty), mask=there[:, None])


def decoded(
    weight: DeviceWeight, dtype: torch.dtype, ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Rows ``ids`` of the matrix, all by default: [rows, n_in] of type ``dtype``."""
    rows = weight.n_out if ids is None else len(ids)
    out = torch.empty(rows, weight.n_in, dtype=dtype, device=DEVICE)
    if rows == 0:
        return out
    how = steps(weight) if ids is None else None
    if how is not None:
        size = rows * (weight.n_in // how.step)
        halves, wide, units = words(weight)
        _steps[(cdiv(size, _STEPS),)](
            halves,
            wide,
            out,
            size,
            weight.n_in,
            units,
            TYPE=int(weight.type),
            STEP=how.step,
            EACH=how.each,
            SIZE=how.size,
            BLOCK=_STEPS,
            num_warps=4,
        )
        return out
    block = min(_TILE, pow2(weight.n_in))
    many = _TILE // block
    _rows[(cdiv(rows, many), cdiv(weight.n_in, block))](
        weight.data,
        weight.fields,
        ids,
        out,
        rows,
        weight.n_in,
        weight.data.shape[1],
        GATHER=ids is not None,
        TYPE=int(weight.type),
        BM=many,
        BLOCK=block,
    )
    return out


def embedding(weight: Matrix, ids: Array) -> torch.Tensor:
    """Rows ``ids`` (int32 [rows]) of a weight: float32 [rows, n_in]; only they are decoded."""
    check_indices(ids, weight.n_out, "token ids")
    return decoded(on_device(weight), torch.float32, constant(ids))


def dequantize(weight: Matrix) -> np.ndarray:
    """The whole weight as float32 [n_out, n_in]."""
    return host(decoded(on_device(weight), torch.float32))
