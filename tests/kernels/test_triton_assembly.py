"""The assembly with which GPUs decode weights, run here an instruction after the other.

Triton's interpreter has NumPy in its place, so nothing else runs it where there is no GPU.
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is published for Linux on x86-64")
import triton.language as tl

from fwdllm.kernels.triton import tiles
from fwdllm.kernels.types import QuantType

# What instructions of ``tiles`` do with 32-bit registers.
_PTX = {
    "mov.b32": lambda a: a,
    "shr.b32": lambda a, n: a >> n,
    "shl.b32": lambda a, n: a << n,
    "lop3.b32": lambda a, b, c, table: _logic(a, b, c, int(table)),
    "fma.rn.bf16x2": lambda a, b, c: _bfloat16(_numbers(a) * _numbers(b) + _numbers(c)),
}


def _logic(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: int) -> np.ndarray:
    assert table == 0xEA
    return (a & b) | c


def _numbers(pairs: np.ndarray) -> np.ndarray:
    """The two bfloat16 numbers of each register: float32 [n, 2]."""
    halves = np.broadcast_to(pairs, (len(pairs),)).astype("<u4").view("<u2").reshape(-1, 2)
    return (halves.astype(np.uint32) << 16).view(np.float32)


def _bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "not exact"
    return (bits >> 16).astype("<u2").view("<u4").ravel()


def run_ptx(assembly: str, code: np.ndarray, high: np.ndarray) -> np.ndarray:
    """The bfloat16 numbers that ``_pairs`` gives for words of 16 bits, as float32."""
    n = len(code) // 2
    registers = {
        "$1": code.view("<u4"),
        "$2": high.view("<u4"),
        "one": np.full(n, 0x3F803F80, "<u4"),
    }
    for line in filter(None, assembly.split(";")):
        name, _, rest = line.partition(" ")
        to, *operands = (operand.strip() for operand in rest.split(","))
        given = [
            registers[o] if o in registers else np.full(n, int(o, 0), "<u4") for o in operands[:3]
        ] + [int(o, 0) for o in operands[3:]]
        registers[to] = _PTX[name](*given)
    return _numbers(registers["$0"]).ravel()


@pytest.mark.parametrize("type", tiles.STEPS)
def test_assembly_decodes_what_the_interpreter_does(
    type: QuantType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter runs NumPy in place of the assembly for cards, so that is run here."""
    monkeypatch.setattr(tiles, "IN_NUMPY", tl.constexpr(False))
    monkeypatch.setattr(tiles, "_pairs", lambda assembly, code, high: run_ptx(assembly, code, high))
    rng = np.random.default_rng(0)
    code, high = (rng.integers(0, 2**16, 4096).astype("<u2") for _ in range(2))
    how = tiles.STEPS[type]
    for j in range(how.step // how.each):
        low = (code >> (j % 4 * 4)) & 15
        want = {
            QuantType.Q8_0: (code >> (j % 2 * 8)).astype(np.int8),
            QuantType.Q4_0: low.astype(int) - 8,
            QuantType.Q5_K: 128 + (low | (high >> (j // 4 % 2 * 8 + j // 8 * 4 + j % 4) & 1) << 4),
            QuantType.Q6_K: (low | (high >> (j % 8 * 2) & 3) << 4).astype(int) - 32,
        }.get(type, 128 + low)
        np.testing.assert_array_equal(tiles.quants.fn(code, high, j, int(type)), want)
