"""Kernels for GPUs: the operations of ``kernels.api`` in Triton, one to a file.

Results are PyTorch tensors on the GPU (``host`` brings them back) and of the type of the input,
float32 or bfloat16; cotangents are float32. Inputs may be NumPy arrays, too. With ``exact=True``
matmuls are in float32; otherwise in bfloat16 with sums in float32. Functions of the random stream
return NumPy arrays. TRITON_INTERPRET=1 runs all of it on a CPU, slowly.
"""

from fwdllm.kernels.triton.attention import attention, attention_vjp
from fwdllm.kernels.triton.cross_entropy import cross_entropy, cross_entropy_vjp
from fwdllm.kernels.triton.decode import dequantize, embedding
from fwdllm.kernels.triton.gated import geglu, geglu_vjp, swiglu, swiglu_vjp
from fwdllm.kernels.triton.gelu import gelu, gelu_vjp
from fwdllm.kernels.triton.lanes import contiguous, spread, take
from fwdllm.kernels.triton.layer_norm import layer_norm, layer_norm_vjp
from fwdllm.kernels.triton.matmul import lora_vjp, matmul, matmul_vjp
from fwdllm.kernels.triton.random import normal, philox, rademacher
from fwdllm.kernels.triton.recording import repeated
from fwdllm.kernels.triton.rms_norm import rms_norm, rms_norm_vjp
from fwdllm.kernels.triton.rope import rope
from fwdllm.kernels.triton.runtime import array, free_bytes, host, usable, weight, zeros
from fwdllm.kernels.triton.seeded_axpy import seeded_axpy
from fwdllm.kernels.triton.seeded_dot import seeded_dot

__all__ = [
    "array",
    "attention",
    "attention_vjp",
    "contiguous",
    "cross_entropy",
    "cross_entropy_vjp",
    "dequantize",
    "embedding",
    "free_bytes",
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
    "usable",
    "weight",
    "zeros",
]
