"""Random quantized weights for tests."""

from __future__ import annotations

import numpy as np
from gguf import GGML_QUANT_SIZES

from fwdllm.kernels.types import QuantType, Weight

# byte offsets of the fp16 fields of a block, which random bytes could make infinite or NaN
HALF_FIELDS = {
    QuantType.Q4_0: [0],
    QuantType.Q4_1: [0, 2],
    QuantType.Q5_0: [0],
    QuantType.Q5_1: [0, 2],
    QuantType.Q8_0: [0],
    QuantType.Q2_K: [80, 82],
    QuantType.Q3_K: [108],
    QuantType.Q4_K: [0, 2],
    QuantType.Q5_K: [0, 2],
    QuantType.Q6_K: [208],
    QuantType.IQ4_NL: [0],
    QuantType.IQ4_XS: [0],
    QuantType.MXFP4: [],
}


def random_weight(
    rng: np.random.Generator, type: QuantType, n_out: int, n_in: int, scale: float = 0.01
) -> Weight:
    """Every bit pattern of the quants; float fields are normals of both signs times scale."""
    block, size = GGML_QUANT_SIZES[type]
    values = rng.standard_normal((n_out, n_in), np.float32) * np.float32(scale)
    if type == QuantType.F32:
        data = values.view(np.uint8)
    elif type == QuantType.F16:
        data = values.astype(np.float16).view(np.uint8)
    elif type == QuantType.BF16:
        data = (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    else:
        blocks = rng.integers(0, 256, (n_out * n_in // block, size), np.uint8)
        for at in HALF_FIELDS[type]:
            field = (rng.standard_normal((len(blocks), 1)) * scale).astype(np.float16)
            blocks[:, at : at + 2] = field.view(np.uint8)
        if type == QuantType.MXFP4:  # a byte, the exponent of a power of two
            exponents = np.frexp(rng.standard_normal(len(blocks)) * scale)[1] + 126
            blocks[:, 0] = exponents.clip(2, 254)
        data = blocks.reshape(n_out, -1)
    return Weight(data, type, n_out, n_in)


def every_scale_of_mxfp4() -> Weight:
    """Row e has all codes with the scale byte e."""
    codes = np.arange(16, dtype=np.uint8)
    codes = codes | codes << 4
    scales = np.arange(256, dtype=np.uint8)[:, None]
    data = np.concatenate([scales, np.tile(codes, (256, 1))], axis=1)
    return Weight(data, QuantType.MXFP4, 256, 32)
