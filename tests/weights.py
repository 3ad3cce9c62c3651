"""Random quantized weights for tests: random bytes with sane scales, so every code occurs."""

from __future__ import annotations

import numpy as np

from fwdllm.kernels.types import QuantType, Weight, row_bytes

# (offset, count) of the fp16 scales inside a block of each type
_HALF_SCALES = {
    QuantType.Q4_0: (18, [0]),
    QuantType.Q4_1: (20, [0, 2]),
    QuantType.Q8_0: (34, [0]),
    QuantType.Q4_K: (144, [0, 2]),
    QuantType.Q5_K: (176, [0, 2]),
    QuantType.Q6_K: (210, [208]),
}


def random_weight(rng: np.random.Generator, type: QuantType, n_out: int, n_in: int) -> Weight:
    """A weight of random codes whose decoded values are of order 0.1."""
    if type in _HALF_SCALES:
        size, positions = _HALF_SCALES[type]
        data = rng.integers(0, 256, (n_out, row_bytes(type, n_in)), np.uint8)
        blocks = data.reshape(n_out, -1, size)
        for at in positions:
            scale = rng.normal(scale=0.01, size=blocks.shape[:2]).astype(np.float16)
            blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
        return Weight(data, type, n_out, n_in)
    values = rng.normal(scale=0.1, size=(n_out, n_in)).astype(np.float32)
    if type == QuantType.BF16:
        raw = np.ascontiguousarray(values.view(np.uint16)[:, 1::2])
    else:
        raw = values.astype(np.float16 if type == QuantType.F16 else np.float32)
    return Weight(raw.view(np.uint8).reshape(n_out, -1), type, n_out, n_in)
