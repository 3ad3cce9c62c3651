"""Compiles the Triton kernels for a GPU that need not be here, run by tests in a process of its own.

Usage: python triton_compile.py CAPABILITY, such as 90, with no GPU visible to PyTorch.
The operations run on tensors without values (PyTorch's fake ones), and launches only compile.
Each kernel variant is one line of JSON: its name, the types of its arguments, its constants, and
what the compiler made of them: registers of a thread, bytes of its stack, to which registers spill,
bytes of shared memory of a program, and the instructions of the tensor cores.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction, MockTensor

from fwdllm.kernels import triton as ops
from fwdllm.kernels.types import SUPPORTED_TYPES, Lanes, LoRA, QuantType, Weight, row_bytes

# Of Mistral 7B, and of MiniLM.
WIDTH, HIDDEN, KV_WIDTH, HEAD_DIM, VOCABULARY = 4096, 14336, 1024, 128, 32000
SMALL_WIDTH, SMALL_HEAD_DIM = 384, 32

DTYPES = (torch.bfloat16, torch.float32)
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MMA = re.compile(r"\b(?:wgmma\.mma_async|mma)\.sync\.aligned\.\S+")


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
    return {
        "name": source.fn.__name__,
        "types": {name: type for name, type in source.signature.items() if type != "constexpr"},
        "constants": constants,
        **resources(kernel.asm["cubin"]),
        "shared": kernel.metadata.shared,
        "mma": sorted(set(MMA.findall(kernel.asm["ptx"]))),
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


def weight(type: QuantType, n_out: int, n_in: int) -> Weight:
    return Weight(np.zeros((n_out, row_bytes(type, n_in)), np.uint8), type, n_out, n_in)


def adapter(rank: int, n_in: int, n_out: int, offset: int = 1024, **direction: Any) -> LoRA:
    a, b = np.zeros((rank, n_in), np.float32), np.zeros((n_out, rank), np.float32)
    return LoRA(a, b, 2.0, offset, **direction)


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


def products() -> None:
    """Every type by both routes, for one row, for few, and for full tiles."""
    for type in SUPPORTED_TYPES:
        w = weight(type, 512, WIDTH)
        for rows in (1, 16, 200, 1024):
            ops.matmul(empty(rows, WIDTH, dtype=torch.bfloat16), w)
        ops.embedding(w, np.zeros(16, np.int32))
        ops.dequantize(w)
    for rows in (16, 200):
        ops.matmul(empty(rows, WIDTH), weight(QuantType.Q4_0, 512, WIDTH), exact=True)
    biased = weight(QuantType.F16, SMALL_WIDTH, SMALL_WIDTH)
    for dtype in DTYPES:
        x = empty(64, SMALL_WIDTH, dtype=dtype)
        ops.matmul(x, biased, bias=empty(SMALL_WIDTH))


def adapters() -> None:
    """The LoRA term of tangents and of pairs, whose ranks and offsets are aligned and not."""
    w = weight(QuantType.Q4_0, WIDTH, HIDDEN)
    tangents, parts, n = tangent_lanes(7), tangent_lanes(7, sequences(2, 128)), 256
    for rank in (8, 3):
        lora = adapter(rank, HIDDEN, WIDTH)
        for lanes in (tangents, parts):
            ops.matmul(empty(8 * n, HIDDEN, dtype=torch.bfloat16), w, lora=lora, lanes=lanes)
        ops.matmul(empty(8 * n, HIDDEN), w, lora=lora, lanes=pairs(4), bias=empty(WIDTH))
    x, bits = empty(8 * n, HIDDEN), empty(8 * n, HIDDEN, dtype=torch.bfloat16)
    lora = adapter(8, HIDDEN, WIDTH)
    ops.matmul(x, w, lora=lora, lanes=pairs(4, "rademacher"))
    ops.matmul(x, w, lora=lora, lanes=tangents, exact=True)
    ops.matmul(bits, w, lora=adapter(8, HIDDEN, WIDTH, offset=1023), lanes=tangents)
    size = 8 * (HIDDEN + WIDTH)
    masked = adapter(8, HIDDEN, WIDTH, mask=np.zeros(size, np.float32))
    ops.matmul(bits, w, lora=masked, lanes=tangents)
    bases = {"basis_a": np.zeros((4, HIDDEN), "f"), "basis_b": np.zeros((4, WIDTH), "f")}
    ops.matmul(bits, w, lora=adapter(8, HIDDEN, WIDTH, **bases), lanes=tangents)


def layers(dtype: torch.dtype) -> None:
    """A decoder's and an encoder's layers without and with tangents."""
    n, lanes = 512, 9
    for tangents in (0, lanes - 1):
        rows = n * (1 + tangents)
        x, gain = empty(rows, WIDTH, dtype=dtype), empty(WIDTH)
        ops.rms_norm(x, gain, 1e-5, tangents)
        ops.rms_norm(x.view(-1, HEAD_DIM), gain[:HEAD_DIM], 1e-5, tangents)  # as Qwen 3
        gate = empty(rows, HIDDEN, dtype=dtype)
        ops.swiglu(gate, gate, tangents)
        kv = empty(rows, KV_WIDTH, dtype=dtype)
        starts = sequences(2 * (1 + tangents), n // 2)
        heads = {"scale": 0.1, "tangents": tangents}
        ops.attention(x, kv, kv, starts, head_dim=HEAD_DIM, causal=True, **heads)
        small, gain = empty(rows, SMALL_WIDTH, dtype=dtype), empty(SMALL_WIDTH)
        ops.layer_norm(small, gain, gain, 1e-12, tangents)
        ops.gelu(empty(rows, 4 * SMALL_WIDTH, dtype=dtype), tangents)
        ops.attention(
            small, small, small, starts, head_dim=SMALL_HEAD_DIM, causal=False, **heads
        )
    angles = np.zeros((n, HEAD_DIM // 2), np.float32)
    for interleaved in (True, False):
        ops.rope(x, np.zeros(rows, np.int32), angles, angles, HEAD_DIM, interleaved)


def losses() -> None:
    output, n = weight(QuantType.Q6_K, VOCABULARY, WIDTH), 64
    labels = np.zeros(8 * n, np.int32)
    for lanes, dtype in ((tangent_lanes(7), torch.bfloat16), (pairs(4), torch.float32)):
        ops.cross_entropy(empty(8 * n, WIDTH, dtype=dtype), output, labels, lanes=lanes)


def streams() -> None:
    seeds, theta = np.zeros(16, np.uint64), empty(1 << 20)
    for distribution in ("normal", "rademacher"):
        ops.seeded_axpy(theta, seeds, np.zeros(16, np.float32), distribution=distribution)
        ops.seeded_dot(theta, seeds, distribution=distribution)
    ops.normal(7, 0, 1 << 20)
    ops.rademacher(7, 0, 1 << 20)
    ops.philox(7, 0, 1 << 20)


def without_values(x: torch.Tensor) -> np.ndarray:
    """What operations that end in NumPy arrays get."""
    return np.zeros(x.shape, np.float32)


def main(arguments: Iterable[str]) -> None:
    (capability,) = arguments
    triton.runtime.driver.set_active(Driver(int(capability)))
    report_launches()
    FakeTensor.numpy = without_values
    with FakeTensorMode(allow_non_fake_inputs=True):
        products()
        adapters()
        for dtype in DTYPES:
            layers(dtype)
        losses()
        streams()


if __name__ == "__main__":
    main(sys.argv[1:])
