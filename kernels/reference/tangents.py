"""How operations take a primal and its tangents: as 1 + n equal slices of rows, primal first."""

from __future__ import annotations

import numpy as np


def split(x: np.ndarray, tangents: int) -> tuple[np.ndarray, np.ndarray]:
    """[(1 + n) rows, d] -> the primal [rows, d] and its tangents [n, rows, d], in float64.

    ValueError if the rows are not 1 + n equal slices.
    """
    if len(x) % (1 + tangents):
        raise ValueError(f"{len(x)} rows are not a primal and {tangents} tangents")
    slices = x.astype(np.float64).reshape(1 + tangents, len(x) // (1 + tangents), *x.shape[1:])
    return slices[0], slices[1:]


def join(y: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The inverse of ``split``, in float32."""
    return np.concatenate([y[None], dy]).reshape(-1, *y.shape[1:]).astype(np.float32)
