"""Checks of arguments that NumPy alone would let pass."""

from __future__ import annotations

import numpy as np


def require_indices(indices: np.ndarray, size: int, what: str) -> None:
    """IndexError unless all are in 0 .. size - 1; NumPy counts negative ones from the end."""
    if indices.size and not 0 <= indices.min() <= indices.max() < size:
        found = f"{indices.min()} .. {indices.max()}"
        raise IndexError(f"{what} {found} are not all within 0 .. {size - 1}")


def require_window(window: int, softcap: float) -> None:
    """ValueError for a window or a soft cap below 0."""
    if window < 0 or not softcap >= 0:
        raise ValueError(f"a window of {window} rows and a soft cap of {softcap}")
