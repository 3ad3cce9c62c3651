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
    zeros,
)
from fwdllm.kernels.reference.decode import dequantize, embedding
from fwdllm.kernels.reference.layers import (
    attention,
    geglu,
    gelu,
    layer_norm,
    rms_norm,
    rope,
    swiglu,
)
from fwdllm.kernels.reference.linear import add_lora, matmul
from fwdllm.kernels.reference.loss import cross_entropy
from fwdllm.kernels.reference.random import normal, philox, rademacher, seeded_axpy, seeded_dot
from fwdllm.kernels.reference.relative import from_relative, to_relative
from fwdllm.kernels.reference.vjp import (
    attention_vjp,
    cross_entropy_vjp,
    geglu_vjp,
    gelu_vjp,
    layer_norm_vjp,
    lora_vjp,
    matmul_vjp,
    rms_norm_vjp,
    swiglu_vjp,
)

__all__ = [
    "add_lora",
    "array",
    "attention",
    "attention_vjp",
    "contiguous",
    "cross_entropy",
    "cross_entropy_vjp",
    "dequantize",
    "embedding",
    "free_bytes",
    "from_relative",
    "geglu",
    "geglu_vjp",
    "gelu",
    "gelu_vjp",
    "host",
    "layer_norm",
    "layer_norm_vjp",
    "lora_vjp",
    "matmul",
    "matmul_vjp",
    "normal",
    "philox",
    "rademacher",
    "repeated",
    "rms_norm",
    "rms_norm_vjp",
    "rope",
    "seeded_axpy",
    "seeded_dot",
    "spread",
    "swiglu",
    "swiglu_vjp",
    "take",
    "to_relative",
    "weight",
    "zeros",
]
