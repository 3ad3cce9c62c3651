"""The kernels in NumPy: the specification of all others. Short and slow."""

from fwdllm.kernels.reference.arrays import (
    array,
    contiguous,
    free_bytes,
    host,
    repeated,
    spread,
    take,
    weight,
)
from fwdllm.kernels.reference.decode import dequantize, embedding
from fwdllm.kernels.reference.layers import attention, gelu, layer_norm, rms_norm, rope, swiglu
from fwdllm.kernels.reference.linear import add_lora, matmul
from fwdllm.kernels.reference.loss import cross_entropy
from fwdllm.kernels.reference.random import normal, philox, rademacher, seeded_axpy, seeded_dot
from fwdllm.kernels.reference.relative import from_relative, to_relative

__all__ = [
    "add_lora",
    "array",
    "attention",
    "contiguous",
    "cross_entropy",
    "dequantize",
    "embedding",
    "free_bytes",
    "from_relative",
    "gelu",
    "host",
    "layer_norm",
    "matmul",
    "normal",
    "philox",
    "rademacher",
    "repeated",
    "rms_norm",
    "rope",
    "seeded_axpy",
    "seeded_dot",
    "spread",
    "swiglu",
    "take",
    "to_relative",
    "weight",
]
