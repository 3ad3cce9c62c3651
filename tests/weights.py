"""Random quantized weights for tests."""

from __future__ import annotations

import numpy as np

from fwdllm.bench.synthetic import random_weights
from fwdllm.kernels.types import QuantType, Weight


def random_weight(rng: np.random.Generator, type: QuantType, n_out: int, n_in: int) -> Weight:
    """A weight of random bytes, so that every code occurs; its values are of order 0.1."""
    data = random_weights(rng, type, n_out, n_in, std=0.1)
    return Weight(data.reshape(n_out, -1), type, n_out, n_in)
