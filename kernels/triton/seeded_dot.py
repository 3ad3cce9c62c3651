"""g . v(seed_k) for many seeds."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.random import draw4, far, in_turn, is_far
from fwdllm.kernels.triton.runtime import DEVICE, cdiv, check_distribution, host, tensor

# Blocks of four numbers that a program makes.
_BLOCK = 512


@triton.jit
def _dot(
    g,
    seeds,
    partial,
    n,
    shift,
    first,
    NORMAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid, k = tl.program_id(0), tl.program_id(1)
    block = first + far(pid * BLOCK + tl.arange(0, BLOCK), WIDE)
    a, b, c, d = draw4(tl.load(seeds + k), block, NORMAL)
    i = pid * (4 * BLOCK) + tl.arange(0, 4 * BLOCK) - shift
    values = tl.load(g + i, mask=(i >= 0) & (i < n), other=0.0)
    total = tl.sum(values * in_turn(a, b, c, d), axis=0)
    tl.store(partial + k * tl.num_programs(0) + pid, total.to(tl.float64))


def seeded_dot(
    g: Array,
    seeds: np.ndarray,
    *,
    offset: int = 0,
    distribution: str = "normal",
) -> np.ndarray:
    """g . v(seeds[k])[offset:] for every k: float64 [k]; g float32 [n].

    2,048 elements at a time are summed in float32, and these sums in float64.
    """
    check_distribution(distribution)
    shift = offset % 4
    chunks = cdiv(len(g) + shift, 4 * _BLOCK)
    partial = torch.zeros(len(seeds), chunks, dtype=torch.float64, device=DEVICE)
    if len(seeds) and len(g):
        _dot[(chunks, len(seeds))](
            tensor(g),
            tensor(np.asarray(seeds, np.uint64)),
            partial,
            len(g),
            shift,
            offset // 4,
            NORMAL=distribution == "normal",
            WIDE=is_far((offset + len(g)) // 4),
            BLOCK=_BLOCK,
        )
    return host(partial.sum(dim=1))
