"""theta += sum_k c_k v(seed_k) in one sweep over theta."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.random import draw4, far, in_turn, is_far
from fwdllm.kernels.triton.runtime import cdiv, check_distribution, tensor

# Blocks of four numbers that a program makes of each seed: two in each thread of 4 warps.
_BLOCK = 256


@triton.jit
def _axpy(
    theta,
    seeds,
    coefficients,
    n,
    shift,
    first,
    n_seeds,
    NORMAL: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    block = first + far(pid * BLOCK + tl.arange(0, BLOCK), WIDE)
    sum_a = tl.zeros([BLOCK], tl.float32)
    sum_b = tl.zeros([BLOCK], tl.float32)
    sum_c = tl.zeros([BLOCK], tl.float32)
    sum_d = tl.zeros([BLOCK], tl.float32)
    for k in range(n_seeds):
        a, b, c, d = draw4(tl.load(seeds + k), block, NORMAL)
        coefficient = tl.load(coefficients + k)
        sum_a += coefficient * a
        sum_b += coefficient * b
        sum_c += coefficient * c
        sum_d += coefficient * d
    i = pid * (4 * BLOCK) + tl.arange(0, 4 * BLOCK) - shift
    mask = (i >= 0) & (i < n)
    before = tl.load(theta + i, mask=mask, other=0.0)
    tl.store(theta + i, before + in_turn(sum_a, sum_b, sum_c, sum_d), mask=mask)


def seeded_axpy(
    theta: Array,
    seeds: np.ndarray,
    coefficients: np.ndarray,
    *,
    offset: int = 0,
    distribution: str = "normal",
) -> None:
    """theta += sum_k coefficients[k] v(seeds[k])[offset:], in place; theta float32 [n].

    The sum over seeds is taken in their order, in float32, and then added.
    """
    check_distribution(distribution)
    if len(seeds) != len(coefficients):
        raise ValueError(f"{len(seeds)} seeds have {len(coefficients)} coefficients")
    if len(theta) == 0:
        return
    there = tensor(theta)
    shift = offset % 4
    _axpy[(cdiv(len(theta) + shift, 4 * _BLOCK),)](
        there,
        tensor(np.asarray(seeds, np.uint64)),
        tensor(np.asarray(coefficients, np.float32)),
        len(theta),
        shift,
        offset // 4,
        len(seeds),
        NORMAL=distribution == "normal",
        WIDE=is_far((offset + len(theta)) // 4),
        BLOCK=_BLOCK,
    )
    if isinstance(theta, np.ndarray):
        torch.from_numpy(theta).copy_(there)
