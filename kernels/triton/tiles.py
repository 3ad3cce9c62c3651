"""Whole tiles of quantized rows (``layout``), decoded a piece of one scale at a time.

Tiles are read as they lie, as 16-bit words. Two words side by side have the quants of two elements
in the same bits; one mask moves both to the last bits of two bfloat16 numbers, 128 + q each. That
is exact, and takes two instructions or three for both of them.

A step is the fewest elements that are whole tiles of all planes; twice as many of Q4_0 or Q8_0 took
a tenth more time for one row on an H200. It has so many pieces, which are decoded one at a time:
they are the sub-blocks, or of Q5_K halves of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from fwdllm.kernels.triton.layout import ALIGNMENT
from fwdllm.kernels.triton.runtime import IN_NUMPY, DeviceWeight, cast
from fwdllm.kernels.types import QuantType

Q4_0 = tl.constexpr(int(QuantType.Q4_0))
Q4_1 = tl.constexpr(int(QuantType.Q4_1))
Q8_0 = tl.constexpr(int(QuantType.Q8_0))
Q4_K = tl.constexpr(int(QuantType.Q4_K))
Q5_K = tl.constexpr(int(QuantType.Q5_K))
Q6_K = tl.constexpr(int(QuantType.Q6_K))


@dataclass(frozen=True)
class Steps:
    """Elements of a step and of a piece, pieces of a tile of the first plane."""

    step: int
    each: int
    size: int


STEPS = {
    QuantType.Q4_0: Steps(128, 32, 4),
    QuantType.Q4_1: Steps(128, 32, 4),
    QuantType.Q8_0: Steps(128, 32, 2),
    QuantType.Q4_K: Steps(256, 32, 4),
    QuantType.Q5_K: Steps(256, 16, 4),
    QuantType.Q6_K: Steps(256, 16, 4),
}


def steps(weight: DeviceWeight) -> Steps | None:
    """How rows are decoded in steps, if they are whole ones."""
    found = STEPS.get(weight.type)
    return found if found is not None and weight.n_in % found.step == 0 else None


def words(weight: DeviceWeight) -> tuple[torch.Tensor, torch.Tensor, int]:
    """The bytes of a weight, as words of 16 and of 32 bits, and a row's bytes / ``ALIGNMENT``."""
    data = weight.data
    return data.view(torch.int16), data.view(torch.int32), data.shape[1] // ALIGNMENT


@triton.jit
def codes(halves, row, step, TILE: tl.constexpr, TILES: tl.constexpr, EACH: tl.constexpr):
    """Tile ``TILE`` of the ``TILES`` of a step of the first plane: int16 [rows, EACH].

    row: int64 [rows], where rows begin, as a multiple of ``ALIGNMENT``.  step: one for all rows, or
    int32 [rows].
    """
    at = row * 8 + (step * TILES + TILE) * EACH
    return tl.load(halves + at[:, None] + tl.arange(0, EACH)[None, :])


@triton.jit
def high_bits(halves, row, step, n_in, TILE: tl.constexpr, TYPE: tl.constexpr, EACH: tl.constexpr):
    """Tile ``TILE`` of a step of the second plane, q1 or q2, for pieces 8 TILE and on."""
    at = row * 8 + n_in // 4
    if TYPE == Q5_K:  # has one tile
        at += step * EACH
    else:
        at += (step * 2 + TILE) * EACH
    return tl.load(halves + at[:, None] + tl.arange(0, EACH)[None, :])


@triton.jit
def place(J: tl.constexpr, TYPE: tl.constexpr, EACH: tl.constexpr):
    """Where in a step piece J begins."""
    if TYPE == Q5_K:  # tiles of half 0 and half 1 of four sub-blocks, and of the other four
        return J // 8 * 128 + J % 4 * 32 + J // 4 % 2 * 16
    else:
        return J * EACH


@triton.jit
def scale_words(words, row, step, n_in, TYPE: tl.constexpr):
    """Five words that ``scale`` reads, of which some types use fewer: int32 [rows] each."""
    at = words + row * 4
    if TYPE == Q4_0 or TYPE == Q8_0:
        at += n_in // (8 if TYPE == Q4_0 else 4) + step * 2
        a, b = tl.load(at), tl.load(at + 1)
        return a, b, a, a, a
    elif TYPE == Q6_K:
        at += n_in // 16 * 3
        d = tl.load(at + n_in // 64 + step // 2) >> (step % 2 * 16)
        at += step * 4
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3), d
    else:
        at += n_in // 8 + step * 4
        if TYPE == Q5_K:
            at += n_in // 32
        a, b, c, d = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        return a, b, c, d, a


@triton.jit
def _half(word, HIGH: tl.constexpr):
    """The float16 in one half of a word."""
    bits = (word >> (16 if HIGH else 0)).to(tl.int16)
    return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _six_bits(first, rest, J: tl.constexpr, LATE: tl.constexpr):
    """Scale or minimum J of Q4_K and Q5_K, as ``decode._scale_and_minimum``."""
    if J < 4:
        q = (first >> (8 * J)) & 63
    else:
        q = ((rest >> (8 * (J - 4) + LATE)) & 15) | ((first >> (8 * (J - 4) + 2)) & 48)
    return q.to(tl.float32)


@triton.jit
def scale(words, J: tl.constexpr, TYPE: tl.constexpr):
    """Scale and minimum of piece J of a step: elements are scale * q - minimum.

    words: as of ``scale_words``.  The minimum is 0 for types that have none.
    """
    if TYPE == Q4_0 or TYPE == Q8_0:
        return _half(words[J // 2], J % 2 == 1), 0.0
    elif TYPE == Q4_1:
        return _half(words[J], False), -_half(words[J], True)
    elif TYPE == Q6_K:
        each = words[J // 4] << (24 - J % 4 * 8) >> 24
        return _half(words[4], False) * each.to(tl.float32), 0.0
    else:
        d, d_min = _half(words[0], False), _half(words[0], True)
        a = _six_bits(words[1], words[3], J if TYPE == Q4_K else J // 8 * 4 + J % 4, 0)
        b = _six_bits(words[2], words[3], J if TYPE == Q4_K else J // 8 * 4 + J % 4, 4)
        return d * a, d_min * b


@triton.jit
def quants(code, high, J: tl.constexpr, TYPE: tl.constexpr):
    """Quants of piece J of a step as bfloat16 numbers: q, or for types with a minimum 128 + q.

    code: the piece's tile of ``codes``.  high: that of ``high_bits``, if the type has them.
    """
    if IN_NUMPY:
        return cast(_quants_in_numpy(code, high, J, TYPE), tl.bfloat16)
    elif TYPE == Q8_0:
        # Of a byte, the low seven bits become 128 + them. 128 is subtracted, or 256 if the byte is
        # negative: its sign is the last bit of the exponent.
        return _pairs(
            f"shr.b32 q, $1, {J % 2 * 8};"
            + "lop3.b32 t, q, 0x00800080, 0xC300C300, 0xEA;"
            + "lop3.b32 q, q, 0x007F007F, 0x43004300, 0xEA;"
            + "fma.rn.bf16x2 $0, q, one, t;",
            code,
            high,
        )
    elif TYPE == Q4_0:
        return _pairs(
            f"shr.b32 q, $1, {J % 4 * 4};"
            + "lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;"
            + "mov.b32 t, 0xC308C308;"  # -(128 + 8)
            + "fma.rn.bf16x2 $0, q, one, t;",
            code,
            high,
        )
    elif TYPE == Q5_K:
        return _pairs(
            f"shr.b32 q, $1, {J % 4 * 4};"
            + "lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;"
            # bit J // 8 * 4 + J % 4 of the byte of the half to bit 4
            + (
                f"shl.b32 t, $2, {4 - J % 4};"
                if J < 4
                else f"shr.b32 t, $2, {J // 4 % 2 * 8 + J // 8 * 4 + J % 4 - 4};"
            )
            + "lop3.b32 $0, t, 0x00100010, q, 0xEA;",
            code,
            high,
        )
    elif TYPE == Q6_K:
        return _pairs(
            f"shr.b32 q, $1, {J % 4 * 4};"
            + "lop3.b32 q, q, 0x000F000F, 0x43004300, 0xEA;"
            + (
                f"shl.b32 t, $2, {4 - J % 8 * 2};"
                if J % 8 < 2
                else f"shr.b32 t, $2, {J % 8 * 2 - 4};"
            )
            + "lop3.b32 q, t, 0x00300030, q, 0xEA;"
            + "mov.b32 t, 0xC320C320;"  # -(128 + 32)
            + "fma.rn.bf16x2 $0, q, one, t;",
            code,
            high,
        )
    else:
        return _pairs(
            f"shr.b32 q, $1, {J % 4 * 4};" + "lop3.b32 $0, q, 0x000F000F, 0x43004300, 0xEA;",
            code,
            high,
        )


@triton.jit
def values(code, high, scales, J: tl.constexpr, TYPE: tl.constexpr):
    """Elements of piece J of a step: float32 [rows, EACH].

    code, high: as of ``quants``.  scales: as of ``scale_words``.
    """
    if IN_NUMPY:
        q = _quants_in_numpy(code, high, J, TYPE)
    else:
        q = quants(code, high, J, TYPE).to(tl.float32)
    a, b = scale(scales, J, TYPE)
    if TYPE == Q4_1 or TYPE == Q4_K or TYPE == Q5_K:
        return a[:, None] * (q - 128.0) - b[:, None]
    else:
        return a[:, None] * q


@triton.jit
def _pairs(ASSEMBLY: tl.constexpr, code, high):
    """Two bfloat16 numbers $0 for each two words of ``code``, $1, and of ``high``, $2."""
    return tl.inline_asm_elementwise(
        "{.reg .b32 q, t, one; mov.b32 one, 0x3F803F80;" + ASSEMBLY + "}",
        "=r,r,r",
        [code, high],
        dtype=tl.bfloat16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _quants_in_numpy(code, high, J: tl.constexpr, TYPE: tl.constexpr):
    """As ``quants``, as float32, for the interpreter: it has no assembly, nor zeros in bfloat16."""
    if TYPE == Q8_0:
        q = (code >> (J % 2 * 8)).to(tl.int8).to(tl.int32)
    else:
        q = (code.to(tl.int32) >> (J % 4 * 4)) & 15
    if TYPE == Q5_K:
        q = q | ((high.to(tl.int32) >> (J // 4 % 2 * 8 + J // 8 * 4 + J % 4)) & 1) << 4
    elif TYPE == Q6_K:
        q = (q | ((high.to(tl.int32) >> (J % 8 * 2)) & 3) << 4) - 32
    elif TYPE == Q4_0:
        q -= 8
    if TYPE == Q4_1 or TYPE == Q4_K or TYPE == Q5_K:
        q += 128
    return q.to(tl.float32)
