"""Kernels for GPUs: the operations of ``kernels.api`` in Triton, one to a file.

Results are PyTorch tensors on the GPU (``host`` brings them back) and of the type of the input,
float32 or bfloat16; inputs may be NumPy arrays, too. With ``exact=True`` matmuls are in float32;
otherwise in bfloat16 with sums in float32. Functions of the random stream return NumPy arrays.
TRITON_INTERPRET=1 runs all of it on a CPU, slowly.
"""

from fwdllm.kernels.triton.attention import attention
from fwdllm.kernels.triton.cross_entropy import cross_entropy
from fwdllm.kernels.triton.decode import dequantize, embedding
from fwdllm.kernels.triton.gelu import gelu
from fwdllm.kernels.triton.lanes import contiguous, spread, take
from fwdllm.kernels.triton.layer_norm import layer_norm
from fwdllm.kernels.triton.matmul import matmul
from fwdllm.kernels.triton.random import normal, philox, rademacher
from fwdllm.kernels.triton.recording import repeated
from fwdllm.kernels.triton.rms_norm import rms_norm
from fwdllm.kernels.triton.rope import rope
from fwdllm.kernels.triton.runtime import array, free_bytes, host, usable, weight
from fwdllm.kernels.triton.seeded_axpy import seeded_axpy
from fwdllm.kernels.triton.seeded_dot import seeded_dot
from fwdllm.kernels.triton.swiglu import swiglu

__all__ = [
    "array",
    "attention",
    "contiguous",
    "cross_entropy",
    "dequantize",
    "embedding",
    "free_bytes",
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
    "usable",
    "weight",
]
