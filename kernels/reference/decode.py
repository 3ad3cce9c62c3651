"""GGUF block formats to float32, as ggml's ``dequantize_row_*`` (ggml-quants.c).

Scale times quant is exact in float32 for every type here (11 + 8 + 5 significant bits at
most), so an element is rounded once, where a minimum is added, and all kernels must agree
with these functions bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fwdllm.kernels.api import Matrix
from fwdllm.kernels.reference.checks import require_indices
from fwdllm.kernels.types import BLOCKS, QuantType


def dequantize(weight: Matrix) -> np.ndarray:
    """The whole matrix, float32 [n_out, n_in]."""
    return _decode_rows(weight.data, weight)


def embedding(weight: Matrix, ids: np.ndarray) -> np.ndarray:
    """Rows ids of the matrix: int32 [rows] -> float32 [rows, n_in]; only they are decoded.

    IndexError if an id is outside 0 .. n_out - 1.
    """
    require_indices(ids, weight.n_out, "token ids")
    return _decode_rows(weight.data[ids], weight)


def _decode_rows(rows: np.ndarray, weight: Matrix) -> np.ndarray:
    _, block_bytes = BLOCKS[weight.type]
    values = _DECODERS[weight.type](rows.reshape(-1, block_bytes))
    return values.astype(np.float32).reshape(len(rows), weight.n_in)


# Each decoder takes the bytes of n blocks, uint8 [n, block_bytes], and returns their values;
# the comment before each is the layout of one block.


def _half(data: np.ndarray) -> np.ndarray:
    """fp16 fields: bytes [n, 2 m] -> float32 [n, m]."""
    return data.view("<f2").astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """4-bit fields, all low halves and then all high halves: [..., m] -> [..., 2 m]."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


# f32 value
def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.view("<f4")


# f16 value
def _f16(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks)


# bf16 value: the upper half of a float32
def _bf16(blocks: np.ndarray) -> np.ndarray:
    return (blocks.view("<u2").astype(np.uint32) << 16).view(np.float32)


# f16 d; u4 q[32]
def _q4_0(blocks: np.ndarray) -> np.ndarray:
    d, q = _half(blocks[:, :2]), _nibbles(blocks[:, 2:])
    return d * (q.astype(np.float32) - 8)


# f16 d; f16 m; u4 q[32]
def _q4_1(blocks: np.ndarray) -> np.ndarray:
    d, m, q = _half(blocks[:, :2]), _half(blocks[:, 2:4]), _nibbles(blocks[:, 4:])
    return d * q + m


def _with_fifth_bits(low: np.ndarray, bits: np.ndarray) -> np.ndarray:
    """Bit i of the four bytes ``bits`` above the four of element i."""
    return low | np.unpackbits(bits, axis=1, bitorder="little") << 4


# f16 d; u1 high[32]; u4 low[32]
def _q5_0(blocks: np.ndarray) -> np.ndarray:
    d, q = _half(blocks[:, :2]), _with_fifth_bits(_nibbles(blocks[:, 6:]), blocks[:, 2:6])
    return d * (q.astype(np.float32) - 16)


# f16 d; f16 m; u1 high[32]; u4 low[32]
def _q5_1(blocks: np.ndarray) -> np.ndarray:
    d, m = _half(blocks[:, :2]), _half(blocks[:, 2:4])
    return d * _with_fifth_bits(_nibbles(blocks[:, 8:]), blocks[:, 4:8]) + m


# f16 d; i8 q[32]
def _q8_0(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks[:, :2]) * blocks[:, 2:].view(np.int8)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """f16 d; f16 dmin; 8 + 8 six-bit integers in 12 bytes: float32 [n, 8, 1] each.

    The low six bits of bytes 0-3 hold scales 0-3, those of bytes 4-7 minima 0-3. Scales 4-7 have
    their low four bits in the low nibbles of bytes 8-11 and their top two bits at the top of
    bytes 0-3; minima 4-7 likewise in the high nibbles and at the top of bytes 4-7.
    """
    d, d_min = _half(blocks[:, 0:2]), _half(blocks[:, 2:4])
    low_scale, low_min, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([low_scale & 63, (rest & 15) | (low_scale >> 6 << 4)], axis=1)
    minimum = np.concatenate([low_min & 63, (rest >> 4) | (low_min >> 6 << 4)], axis=1)
    return (d * scale)[:, :, None], (d_min * minimum)[:, :, None]


def _pairs_of_bits(data: np.ndarray) -> np.ndarray:
    """2-bit fields of 32 bytes at a time, all low ones first: [n, 64] -> [n, 16, 16]."""
    fields = data.reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    return fields.reshape(-1, 16, 16)


# u4 scale[16] and u4 min[16] of sub-blocks of 16, in the low and the high nibbles of 16 bytes;
# u2 q[256]; f16 d; f16 dmin
def _q2_k(blocks: np.ndarray) -> np.ndarray:
    scale = _half(blocks[:, 80:82]) * (blocks[:, :16] & 15)
    minimum = _half(blocks[:, 82:]) * (blocks[:, :16] >> 4)
    return scale[:, :, None] * _pairs_of_bits(blocks[:, 16:80]) - minimum[:, :, None]


# u1 high[256], as Q5_K's; u2 low[256]; 6-bit scale[16] of sub-blocks of 16, the low four bits in
# 8 bytes as nibbles and the top two in 4 bytes, all low ones first; f16 d
def _q3_k(blocks: np.ndarray) -> np.ndarray:
    high = blocks[:, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    q = _pairs_of_bits(blocks[:, 32:96]) | high.reshape(-1, 16, 16) << 2
    top = blocks[:, None, 104:108] >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    scale = (_nibbles(blocks[:, 96:104]) | top.reshape(-1, 16) << 4).astype(np.float32) - 32
    return (_half(blocks[:, 108:]) * scale)[:, :, None] * (q.astype(np.float32) - 4)


# 16 bytes of scales and minima for sub-blocks of 32; u4 q[256], 64 to each 32 bytes
def _q4_k(blocks: np.ndarray) -> np.ndarray:
    scale, minimum = _scales_and_minima(blocks)
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return scale * q - minimum


# as Q4_K, with a fifth bit of q before the nibbles: bit j of byte i is that of element i of
# sub-block j
def _q5_k(blocks: np.ndarray) -> np.ndarray:
    scale, minimum = _scales_and_minima(blocks)
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return scale * (low | high << 4) - minimum


# u4 low[256]; u2 high[256]; i8 scale[16] for sub-blocks of 16; f16 d. Each half of the block
# has 64 bytes of low (nibbles as above) and 32 of high (bits 0-1 of all bytes, then 2-3, ...).
def _q6_k(blocks: np.ndarray) -> np.ndarray:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 16, 16)
    q = (low | _pairs_of_bits(blocks[:, 128:192]) << 4).astype(np.float32) - 32
    scale = _half(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8)
    return scale[:, :, None] * q


# The values of 4-bit codes: Lloyd-Max levels of weights, and of MXFP4 floating-point numbers of a
# sign, two bits of exponent and one of fraction, times two.
_IQ4 = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


# f16 d; u4 code[32]
def _iq4_nl(blocks: np.ndarray) -> np.ndarray:
    return _half(blocks[:, :2]) * _IQ4[_nibbles(blocks[:, 2:])]


# f16 d; 6-bit scale[8] of sub-blocks of 32, the top two bits in a u16 and the low four in 4 bytes,
# in turn low and high nibbles; u4 code[256], 32 to each 16 bytes
def _iq4_xs(blocks: np.ndarray) -> np.ndarray:
    top = blocks[:, 2:4].view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    low = _nibbles(blocks[:, 4:8, None]).reshape(-1, 8)
    scale = (low | top.astype(np.uint8) << 4).astype(np.float32) - 32
    codes = _nibbles(blocks[:, 8:].reshape(-1, 8, 16))
    return (_half(blocks[:, :2]) * scale)[:, :, None] * _IQ4[codes]


# u8 e, of a scale 2^(e - 127); u4 code[32]. Half of the scale belongs to the doubled values.
def _mxfp4(blocks: np.ndarray) -> np.ndarray:
    half_of_scale = np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128)
    with np.errstate(over="ignore"):  # the largest are infinite in float32
        return half_of_scale * _E2M1[_nibbles(blocks[:, 1:])]


_DECODERS: dict[QuantType, Callable[[np.ndarray], np.ndarray]] = {
    QuantType.F32: _f32,
    QuantType.F16: _f16,
    QuantType.BF16: _bf16,
    QuantType.Q4_0: _q4_0,
    QuantType.Q4_1: _q4_1,
    QuantType.Q5_0: _q5_0,
    QuantType.Q5_1: _q5_1,
    QuantType.Q8_0: _q8_0,
    QuantType.Q2_K: _q2_k,
    QuantType.Q3_K: _q3_k,
    QuantType.Q4_K: _q4_k,
    QuantType.Q5_K: _q5_k,
    QuantType.Q6_K: _q6_k,
    QuantType.IQ4_NL: _iq4_nl,
    QuantType.IQ4_XS: _iq4_xs,
    QuantType.MXFP4: _mxfp4,
}
