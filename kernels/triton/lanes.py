"""Rows between operations: those of new lanes, and some of many."""

from __future__ import annotations

import numpy as np
import torch

from fwdllm.kernels.triton.runtime import constant
from fwdllm.kernels.types import Lanes


def spread(x: torch.Tensor, lanes: Lanes, exact: bool = False) -> torch.Tensor:
    """Rows of every lane, of plain rows x: copies of them, zero in tangents.

    With tangents they are bfloat16 from here on, for a derivative has a scale of its own; but
    finite differences are small beside what they are taken of, so lanes stay float32.
    """
    if not lanes.n_tangents:
        return x.repeat(len(lanes), 1)
    dtype = x.dtype if exact else torch.bfloat16
    y = torch.zeros(len(lanes) * len(x), x.shape[1], dtype=dtype, device=x.device)
    y[: len(x)] = x
    return y


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """x in one piece, itself if it is."""
    return x.contiguous()


def take(x: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """These rows of x."""
    return x.index_select(0, constant(rows))
