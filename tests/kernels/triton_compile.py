"""Compiles the Triton kernels for a GPU that need not be here, in a process of its own.

Usage: python triton_compile.py CAPABILITY, such as 90, with no GPU visible to PyTorch.
The operations run on tensors without values (PyTorch's fake ones), and launches only compile.
Each kernel variant is one line of JSON: its name, the types of its arguments, its constants, and
what the compiler made of them: registers of a thread, bytes of its stack, to which registers spill,
bytes of shared memory of a program, the precisions of its products, and the instructions of the
tensor cores.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from fwdllm.kernels import triton as ops
from fwdllm.kernels.triton.tiles import STEPS
from fwdllm.kernels.types import SUPPORTED_TYPES, Lanes, LoRA, QuantType, Weight, row_bytes

# Of Mistral 7B, of MiniLM, and Gemma's heads.
WIDTH, HIDDEN, KV_WIDTH, HEAD_DIM, VOCABULARY = 4096, 14336, 1024, 128, 32000
SMALL_WIDTH, SMALL_HEAD_DIM, TINY_HEAD_DIM = 384, 32, 16
SOFTCAP = 50.0
GEMMA = {"head_dim": 256, "causal": True, "window": 512, "softcap": SOFTCAP}

# All is compiled for the last; for the others what depends on their tensor cores, with the types
# that are decoded in tiles and one of those that are decoded element by element.
CAPABILITIES = (80, 90)
FEW_TYPES = (*STEPS, QuantType.F16)
DTYPES = (torch.bfloat16, torch.float32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MMA = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+")
# A product of float32 that does not say its precision has all of it.
DOT = re.compile(r"= tt\.dot (?:.*inputPrecision = (\w+))?")


class Driver:
    """What Triton asks of a driver to compile."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def report_launches() -> None:
    """Have launches compile and print, once for each variant."""
    run, seen = JITFunction.run, set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        args = tuple(MockTensor(a.dtype) if isinstance(a, torch.Tensor) else a for a in args)
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if id(kernel) not in seen:  # Triton keeps them
            seen.add(id(kernel))
            print(json.dumps(facts(kernel)), flush=True)

    JITFunction.run = compile_only


def facts(kernel: Any) -> dict[str, Any]:
    source = kernel.src
    constants = {source.fn.arg_names[at]: value for (at,), value in source.constants.items()}
    mma = MMA.findall(kernel.asm["ptx"])
    return {
        "name": source.fn.__name__,
        "types": {name: type for name, type in source.signature.items() if type != "constexpr"},
        "constants": constants,
        **resources(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "precisions": sorted({found or "ieee" for found in DOT.findall(kernel.asm["ttir"])}),
        "mma": sorted(set(mma)),
        "mma_count": len(mma),
    }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and bytes of stack of a thread, as the driver will find them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(CUOBJDUMP), "-res-usage", file.name]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", dump)
    assert found is not None, dump
    return {"registers": int(found[1]), "stack": int(found[2])}


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def weight(type: QuantType, n_out: int, n_in: int) -> Weight:
    return Weight(np.zeros((n_out, row_bytes(type, n_in)), np.uint8), type, n_out, n_in)


def adapter(
    rank: int, n_in: int = HIDDEN, n_out: int = WIDTH, offset: int = 1024, **direction: Any
) -> LoRA:
    return LoRA(zeros(rank, n_in), zeros(n_out, rank), 2.0, offset, **direction)


def tangent_lanes(n: int, starts: np.ndarray | None = None) -> Lanes:
    """A primal and n tangents, with seeds of their own for parts if there are starts."""
    shape = (1 + n,) if starts is None else (1 + n, len(starts) - 1)
    coefficients = np.array([0] + [1] * n, np.float32)
    return Lanes(np.zeros(shape, np.uint64), coefficients, tangents=True, starts=starts)


def pairs(n: int, distribution: str = "normal") -> Lanes:
    seeds = np.repeat(np.arange(n, dtype=np.uint64), 2)
    return Lanes(seeds, np.tile([1e-3, -1e-3], n).astype(np.float32), distribution)


def sequences(n: int, rows: int) -> np.ndarray:
    return (np.arange(n + 1) * rows).astype(np.int32)


def products(dtypes: Sequence[torch.dtype], types: Iterable[QuantType]) -> None:
    """Each type by both routes, of tiles that are full, and of some that are small."""
    for type in types:
        w = weight(type, 512, WIDTH)
        for rows in (1, 16, 32, 64, 1024):
            ops.matmul(empty(rows, WIDTH, dtype=torch.bfloat16), w)
        for rows in (100, 1024):
            ops.matmul_vjp(empty(rows, 512, dtype=torch.bfloat16), w)
        ops.embedding(w, np.zeros(16, np.int32))
    w = weight(QuantType.Q4_0, 512, WIDTH)
    for dtype, rows in product(dtypes, (1, 16, 40, 64)):
        ops.matmul(empty(rows, WIDTH, dtype=dtype), w, exact=dtype == torch.float32)
        ops.matmul_vjp(empty(rows, 512, dtype=dtype), w, exact=dtype == torch.float32)
    w = weight(QuantType.F16, SMALL_WIDTH, SMALL_WIDTH)
    ops.matmul(empty(64, SMALL_WIDTH, dtype=torch.bfloat16), w, bias=empty(SMALL_WIDTH))
    ops.dequantize(w)


def adapters() -> None:
    """The LoRA term of tangents and of pairs, of ranks and offsets that are aligned and not."""
    w, n = weight(QuantType.Q4_0, WIDTH, HIDDEN), 256
    narrow, wide = (empty(8 * n, HIDDEN, dtype=dtype) for dtype in DTYPES)
    tangents, parts = tangent_lanes(7), tangent_lanes(7, sequences(2, n // 2))
    even, odd = adapter(8), adapter(3, offset=2**33 + 1)
    masked = adapter(3, offset=1023, mask=zeros(3 * (HIDDEN + WIDTH)))
    inside = adapter(3, basis_a=zeros(4, HIDDEN), basis_b=zeros(4, WIDTH))
    ops.matmul(narrow, w, lora=even, lanes=tangents)
    ops.matmul(narrow, w, lora=adapter(64), lanes=tangents)
    ops.matmul(narrow, w, lora=odd, lanes=parts)
    ops.matmul(narrow, w, lora=inside, lanes=tangents)
    ops.matmul(wide, w, lora=even, lanes=pairs(4), bias=empty(WIDTH))
    ops.matmul(wide, w, lora=adapter(64), lanes=pairs(4))
    ops.matmul(wide, w, lora=masked, lanes=pairs(4, "rademacher"))
    ops.matmul(wide, w, lora=even, lanes=tangents, exact=True)


def plain_and_exact_adapter() -> None:
    """The LoRA term of tangents by both kinds of products."""
    w, rows = weight(QuantType.Q4_0, WIDTH, HIDDEN), 8 * 256
    for dtype in DTYPES:
        x = empty(rows, HIDDEN, dtype=dtype)
        ops.matmul(x, w, lora=adapter(8), lanes=tangent_lanes(7), exact=dtype == torch.float32)


def layers(dtype: torch.dtype, wide: bool = True) -> None:
    """Of a decoder and of an encoder, without and with tangents. wide: with Gemma's heads."""
    n = 512
    for tangents in (0, 8):
        rows = n * (1 + tangents)
        x, gain = empty(rows, WIDTH, dtype=dtype), empty(WIDTH)
        ops.rms_norm(x, gain, 1e-5, tangents)
        ops.swiglu(x, x, tangents)
        kv, starts = empty(rows, KV_WIDTH, dtype=dtype), sequences(2 * (1 + tangents), n // 2)
        options = {"scale": 0.1, "tangents": tangents}
        if not tangents or dtype == torch.bfloat16:  # the others are rare, and 7 seconds each
            ops.attention(x, kv, kv, starts, head_dim=HEAD_DIM, causal=True, **options)
        if dtype == torch.bfloat16:
            ops.geglu(x, x, tangents)
            if wide:
                ops.attention(x, kv, kv, starts, **GEMMA, **options)
        x, gain = empty(rows, SMALL_WIDTH, dtype=dtype), empty(SMALL_WIDTH)
        ops.layer_norm(x, gain, gain, 1e-12, tangents)
        ops.gelu(x, tangents)
        head_dim = SMALL_HEAD_DIM if dtype == torch.bfloat16 else TINY_HEAD_DIM
        options |= {"head_dim": head_dim, "causal": False}
        for window in (0, 64)[: 1 + (dtype == torch.bfloat16)]:
            ops.attention(x, x, x, starts, window=window, **options)
    angles, x = zeros(n, HEAD_DIM // 2), empty(n, WIDTH, dtype=dtype)
    ops.rms_norm(x.view(-1, HEAD_DIM), empty(HEAD_DIM), 1e-5)  # of heads, as in Qwen 3
    for interleaved in (True, False):
        ops.rope(x, np.zeros(n, np.int32), angles, angles, HEAD_DIM, interleaved)


def layers_back(dtype: torch.dtype, wide: bool = True) -> None:
    """Of a decoder and of an encoder."""
    n = 512
    x, gain = empty(n, WIDTH, dtype=dtype), empty(WIDTH)
    ops.rms_norm_vjp(x, gain, 1e-5, x)
    ops.rms_norm_vjp(x.view(-1, HEAD_DIM), empty(HEAD_DIM), 1e-5, x.view(-1, HEAD_DIM))
    ops.swiglu_vjp(x, x, x)
    ops.geglu_vjp(x, x, x)
    kv, starts = empty(n, KV_WIDTH, dtype=dtype), sequences(2, n // 2)
    ops.attention_vjp(x, kv, kv, starts, x, scale=0.1, head_dim=HEAD_DIM, causal=True)
    if wide and dtype == torch.bfloat16:
        ops.attention_vjp(x, kv, kv, starts, x, scale=0.1, **GEMMA)
    x, gain = empty(n, SMALL_WIDTH, dtype=dtype), empty(SMALL_WIDTH)
    ops.layer_norm_vjp(x, gain, 1e-12, x)
    ops.gelu_vjp(x, x)
    head_dim = SMALL_HEAD_DIM if dtype == torch.bfloat16 else TINY_HEAD_DIM
    options = {"scale": 0.1, "head_dim": head_dim, "causal": False}
    for window in (0, 64)[: 1 + (dtype == torch.bfloat16)]:
        ops.attention_vjp(x, x, x, starts, x, window=window, **options)
    x, dy = empty(n, HIDDEN, dtype=dtype), empty(n, WIDTH, dtype=dtype)
    for rank in (8, 64):
        ops.lora_vjp(x, dy, adapter(rank), empty(rank, HIDDEN), empty(WIDTH, rank))
    ops.matmul_vjp(dy, weight(QuantType.Q4_0, WIDTH, HIDDEN), lora=adapter(8))


def losses() -> None:
    output, n = weight(QuantType.Q6_K, VOCABULARY, WIDTH), 64
    labels = np.zeros(8 * n, np.int32)
    for exact in (False, True):
        ops.cross_entropy_vjp(empty(n, WIDTH), output, labels[:n], exact=exact)
    ops.cross_entropy_vjp(empty(n, WIDTH), output, labels[:n], softcap=SOFTCAP)
    for lanes, dtype in ((tangent_lanes(7), torch.bfloat16), (pairs(4), torch.float32)):
        x = empty(8 * n, WIDTH, dtype=dtype)
        ops.cross_entropy(x, output, labels, lanes=lanes)
        ops.cross_entropy(x, output, labels, lanes=lanes, softcap=SOFTCAP)


def streams() -> None:
    """Seeds and positions of 1, 32 and 64 bits."""
    seeds, theta = np.zeros(16, np.uint64), empty(1 << 20)
    for distribution in ("normal", "rademacher"):
        ops.seeded_axpy(theta, seeds, zeros(16), distribution=distribution)
        ops.seeded_dot(theta, seeds, distribution=distribution)
    for seed, start in ((1, 4), (7, 2**33), (2**64 - 2**40, 2**63)):
        ops.philox(seed, start, 1000)
        ops.normal(seed, start, 1000)
    ops.rademacher(7, 0, 1000)


def single() -> None:
    """One row, one tangent, rank 1: Triton takes an argument of 1 for a constant."""
    x, gain = empty(2, 64, dtype=torch.bfloat16), empty(64)
    ops.gelu(x[:, :1], 1)
    ops.swiglu(x[:, :1], x[:, :1], 1)
    for rows in (x[:1], x):
        ops.rms_norm(rows, gain, 1e-5, len(rows) - 1)
        ops.layer_norm(rows, gain, gain, 1e-5, len(rows) - 1)
    ops.attention(x, x, x, sequences(2, 1), head_dim=64, scale=1.0, causal=True, tangents=1)
    ops.rope(x[:1], np.zeros(1, np.int32), zeros(1, 1), zeros(1, 1), 2, True)
    w, lora = weight(QuantType.F32, 1, 1), adapter(1, 1, 1, offset=1)
    ops.matmul(x[:, :1], w, lora=lora, lanes=tangent_lanes(1))
    ops.matmul(x[:1, :1], w, lora=lora)
    ops.cross_entropy(x[:, :1], w, np.zeros(2, np.int32), lanes=tangent_lanes(1))
    ops.gelu_vjp(x[:1, :1], x[:1, :1])
    ops.swiglu_vjp(x[:1, :1], x[:1, :1], x[:1, :1])
    ops.rms_norm_vjp(x[:1], gain, 1e-5, x[:1])
    ops.layer_norm_vjp(x[:1], gain, 1e-5, x[:1])
    options = {"head_dim": 64, "scale": 1.0, "causal": True}
    ops.attention_vjp(x[:1], x[:1], x[:1], sequences(1, 1), x[:1], **options)
    ops.matmul_vjp(x[:1, :1], w, lora=lora)
    ops.lora_vjp(x[:1, :1], x[:1, :1], lora, empty(1, 1), empty(1, 1))
    ops.cross_entropy_vjp(x[:1, :1], w, np.zeros(1, np.int32))
    ops.seeded_axpy(empty(1), np.zeros(1, np.uint64), zeros(1), offset=5)
    ops.seeded_dot(empty(1), np.zeros(1, np.uint64), offset=5)


def without_values(x: torch.Tensor) -> np.ndarray:
    """What operations that end in NumPy arrays get."""
    return np.zeros(x.shape, np.float32)


def main(arguments: Iterable[str]) -> None:
    (capability,) = arguments
    triton.runtime.driver.set_active(Driver(int(capability)))
    report_launches()
    FakeTensor.numpy = without_values
    with FakeTensorMode(allow_non_fake_inputs=True):
        if int(capability) == CAPABILITIES[-1]:
            products(DTYPES, SUPPORTED_TYPES)
            adapters()
            for dtype in DTYPES:
                layers(dtype)
                layers_back(dtype)
            losses()
            streams()
            single()
        else:
            products(DTYPES[:1], FEW_TYPES)
            layers(DTYPES[0], wide=False)
            layers_back(DTYPES[0], wide=False)
            plain_and_exact_adapter()


if __name__ == "__main__":
    main(sys.argv[1:])
