"""The random stream in Triton: ``tl.randint4x`` and Box-Muller as ``kernels.reference.random``.

Element i of v(seed) is component i % 4 of block i // 4. Integers are Triton's own. Its
``tl.randn4x`` gives the same normals, but most of its time goes into separate sine and cosine of an
arbitrary angle. Here the angle is within one turn, and sine and cosine share their work.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.triton.runtime import DEVICE, cdiv, host

# Blocks of four numbers that a program makes.
_BLOCK = 256


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of an angle from 0 to 2 pi, to 1e-7.

    By the polynomials of Cephes' sinf.c and cosf.c, after reduction to an eighth of a turn.
    """
    quarter = tl.floor(angle * 0.6366197723675814 + 0.5)
    # pi / 2 in three parts, whose products with 0 .. 4 are exact.
    x = angle - quarter * 1.5703125
    x = x - quarter * 4.837512969970703125e-4
    x = x - quarter * 7.54978995489188216e-8
    z = x * x
    s = ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1) * z * x + x
    c = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    c = c * z * z - 0.5 * z + 1.0
    turned = quarter.to(tl.int32)
    odd = (turned & 1) == 1
    cos = tl.where(odd, s, c)
    sin = tl.where(odd, c, s)
    cos = tl.where(((turned + 1) & 2) == 2, -cos, cos)
    sin = tl.where((turned & 2) == 2, -sin, sin)
    return cos, sin


@triton.jit
def _normals(a, b):
    """Box-Muller of two integers (Triton's ``pair_uniform_to_normal``)."""
    u = tl.maximum(1.0e-7, tl.uint_to_uniform_float(a))
    angle = 6.283185307179586 * tl.uint_to_uniform_float(b)
    radius = tl.sqrt(-2.0 * tl.log(u))
    cos, sin = _cos_sin(angle)
    return radius * cos, radius * sin


@triton.jit
def _sign(bits):
    return tl.where(bits.to(tl.int32, bitcast=True) < 0, -1.0, 1.0)


@triton.jit
def draw4(seed, block, NORMAL: tl.constexpr):
    """The four elements of each block, as four tensors of its shape.

    seed: int64, the bits of the uint64.  block: int32 or int64.
    """
    a, b, c, d = tl.randint4x(seed, block)
    if NORMAL:
        x, y = _normals(a, b)
        z, w = _normals(c, d)
        return x, y, z, w
    else:
        return _sign(a), _sign(b), _sign(c), _sign(d)


@triton.jit
def draw(seed, index, NORMAL: tl.constexpr):
    """Elements at any positions: four times the work of ``draw4`` per element."""
    x, y, z, w = draw4(seed, index >> 2, NORMAL)
    part = (index & 3).to(tl.int32)
    return tl.where(part < 2, tl.where(part == 0, x, y), tl.where(part == 2, z, w))


@triton.jit
def far(index, WIDE: tl.constexpr):
    """The index, as int64 if its sum with a large offset may need that (WIDE)."""
    if WIDE:
        index = index.to(tl.int64)
    return index


@triton.jit
def in_turn(a, b, c, d):
    """a[0], b[0], c[0], d[0], a[1], ... along the last axis."""
    return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))


@triton.jit
def _fill(
    out,
    count,
    shift,
    first,
    seed,
    NORMAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    a, b, c, d = draw4(seed, first + far(pid * BLOCK + tl.arange(0, BLOCK), WIDE), NORMAL)
    i = pid * (4 * BLOCK) + tl.arange(0, 4 * BLOCK) - shift
    tl.store(out + i, in_turn(a, b, c, d), mask=(i >= 0) & (i < count))


@triton.jit
def _words(out, count, first, seed, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b, c, d = tl.randint4x(seed, first + far(i, WIDE))
    mask = i < count
    tl.store(out + 4 * i, a.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 4 * i + 1, b.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 4 * i + 2, c.to(tl.int32, bitcast=True), mask=mask)
    tl.store(out + 4 * i + 3, d.to(tl.int32, bitcast=True), mask=mask)


def is_far(end: int) -> bool:
    """Whether positions before ``end`` may not fit an int32, a whole tile beyond it included."""
    return end >= 2**31 - 2**20


def signed(seed: int) -> int:
    """A uint64 as the int64 of the same bits, which Triton takes."""
    return int(np.uint64(seed).view(np.int64))


def philox(seed: int, start: int, count: int) -> np.ndarray:
    """Philox-4x32-10 words of counters start .. start + count: uint32 [count, 4]."""
    out = torch.empty(count, 4, dtype=torch.int32, device=DEVICE)
    if count:
        wide = is_far(start + count)
        _words[(cdiv(count, _BLOCK),)](out, count, start, signed(seed), WIDE=wide, BLOCK=_BLOCK)
    return host(out).view(np.uint32)


def elements(seed: int, start: int, count: int, distribution: str) -> torch.Tensor:
    """Elements start .. start + count of v(seed), float32 [count] on the device."""
    out = torch.empty(count, dtype=torch.float32, device=DEVICE)
    shift = start % 4
    if count:
        _fill[(cdiv(count + shift, 4 * _BLOCK),)](
            out,
            count,
            shift,
            start // 4,
            signed(seed),
            NORMAL=distribution == "normal",
            WIDE=is_far((start + count) // 4),
            BLOCK=_BLOCK,
        )
    return out


def normal(seed: int, start: int, count: int) -> np.ndarray:
    """Elements start .. start + count of the normal direction v(seed): float32 [count]."""
    return host(elements(seed, start, count, "normal"))


def rademacher(seed: int, start: int, count: int) -> np.ndarray:
    """Elements start .. start + count of the direction of signs: float32 [count], -1 or +1."""
    return host(elements(seed, start, count, "rademacher"))
