"""Rows as scaled differences to other rows, for products that are computed elsewhere."""

from __future__ import annotations

import numpy as np


def to_relative(x: np.ndarray, references: np.ndarray, scale: float) -> None:
    """x[r] = (x[r] - x[references[r]]) scale where that is another row, in place.

    x: float32 [rows, d].  references: int32 [rows], earlier rows that are their own.  scale: a
    power of two. What rows have in common is then rounded once by the product that reads them.
    """
    others = references != np.arange(len(x))
    x[others] = (x[others] - x[references[others]]) * np.float32(scale)


def from_relative(y: np.ndarray, references: np.ndarray, scale: float) -> None:
    """The way back after a product: y[r] = y[r] / scale + y[references[r]], in place."""
    others = references != np.arange(len(y))
    y[others] = y[others] / np.float32(scale) + y[references[others]]
