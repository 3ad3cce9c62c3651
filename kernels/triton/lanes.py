"""Operations on rows: copying them to all lanes, and selecting some."""

from __future__ import annotations

import numpy as np
import torch

from fwdllm.kernels.triton.runtime import constant
from fwdllm.kernels.types import Lanes


def spread(x: torch.Tensor, lanes: Lanes, exact: bool = False) -> torch.Tensor:
    """The rows of all lanes, from the plain rows x: copies of x, or zeros for tangents.

    With tangents all rows are bfloat16 from here on, unless ``exact``: a derivative has a scale of
    its own. Without tangents rows stay float32, because finite differences are small compared with
    the losses they are taken of.
    """
    if not lanes.n_tangents:
        return x.repeat(len(lanes), 1)
    dtype = x.dtype if exact else torch.bfloat16
    y = torch.zeros(len(lanes) * len(x), x.shape[1], dtype=dtype, device=x.device)
    y[: len(x)] = x
    return y


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """x as a contiguous tensor; x itself if it is one."""
    return x.contiguous()


def take(x: torch.Tensor, rows: np.ndarray) -> torch.Tensor:
    """The rows of x with these numbers."""
    return x.index_select(0, constant(rows))
