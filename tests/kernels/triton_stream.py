"""Writes Triton's own random stream to a file, run by the tests in a process of its own.

Usage: python triton_stream.py OUT.npz COUNT SEED:START ...
The counters of case k are START .. START + COUNT; array ints{k} is uint32 [COUNT, 4], and
normals{k}, from ``tl.randn4x``, is float32 [COUNT, 4] where the counters fit in 31 bits.
edge_bits (uint32 [64, 2]) and edge_normals (float32 [64, 2]) are Box-Muller pairs of extreme
integers, which random cases are unlikely to meet.
"""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported: no GPU needed

import numpy as np
import torch
import triton
import triton.language as tl


@triton.jit
def philox_kernel(seed, low, high, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    low_word = tl.load(low + i).to(tl.uint32, bitcast=True)
    high_word = tl.load(high + i).to(tl.uint32, bitcast=True)
    zero = low_word * 0
    a, b, c, d = tl.philox(seed, low_word, high_word, zero, zero)
    tl.store(out + 4 * i, a.to(tl.int32, bitcast=True))
    tl.store(out + 4 * i + 1, b.to(tl.int32, bitcast=True))
    tl.store(out + 4 * i + 2, c.to(tl.int32, bitcast=True))
    tl.store(out + 4 * i + 3, d.to(tl.int32, bitcast=True))


@triton.jit
def randn4x_kernel(seed, start, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a, b, c, d = tl.randn4x(seed, start + i)
    tl.store(out + 4 * i, a)
    tl.store(out + 4 * i + 1, b)
    tl.store(out + 4 * i + 2, c)
    tl.store(out + 4 * i + 3, d)


@triton.jit
def box_muller_kernel(bits, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    u1 = tl.uint_to_uniform_float(tl.load(bits + 2 * i))
    u2 = tl.uint_to_uniform_float(tl.load(bits + 2 * i + 1))
    a, b = tl.pair_uniform_to_normal(u1, u2)
    tl.store(out + 2 * i, a)
    tl.store(out + 2 * i + 1, b)


def integers(seed: int, start: int, count: int) -> np.ndarray:
    counter = np.uint64(start) + np.arange(count, dtype=np.uint64)
    low, high = (torch.from_numpy(w.astype(np.uint32).view(np.int32)) for w in words(counter))
    out = torch.empty(count, 4, dtype=torch.int32)
    philox_kernel[(1,)](seed, low, high, out, COUNT=count)
    return out.numpy().view(np.uint32)


def words(counter: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return counter & np.uint64(0xFFFFFFFF), counter >> np.uint64(32)


def normals(seed: int, start: int, count: int) -> np.ndarray:
    out = torch.empty(count, 4, dtype=torch.float32)
    randn4x_kernel[(1,)](seed, start, out, COUNT=count)
    return out.numpy()


def edges() -> dict[str, np.ndarray]:
    values = [0, 1, 214, 215, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]  # 214 is below 1e-7
    bits = np.array([(a, b) for a in values for b in values], np.uint32)
    out = torch.empty(len(bits), 2, dtype=torch.float32)
    box_muller_kernel[(1,)](torch.from_numpy(bits.view(np.int32)), out, COUNT=len(bits))
    return {"edge_bits": bits, "edge_normals": out.numpy()}


def main(path: str, count: int, cases: list[str]) -> None:
    arrays = edges()
    for k, case in enumerate(cases):
        seed, start = map(int, case.split(":"))
        arrays[f"ints{k}"] = integers(seed, start, count)
        if start + count <= 2**31:
            arrays[f"normals{k}"] = normals(seed, start, count)
    np.savez(path, **arrays)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
