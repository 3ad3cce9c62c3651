"""Rows as scaled differences to other rows, for products that are computed elsewhere."""

from __future__ import annotations

import numpy as np

_SMALLEST, _LARGEST = 1e-30, 1e30


def to_relative(x: np.ndarray, references: np.ndarray) -> np.ndarray:
    """x[r] = (x[r] - x[references[r]]) s[r] where that is another row, in place; gives s.

    x: float32 [rows, d].  references: int32 [rows], earlier rows that are their own.  s: float32
    [rows], powers of two that bring the largest of a row to 1 .. 2; 1 if it is 0 or no number.
    What rows have in common is then rounded once by the product that reads them.
    """
    others = references != np.arange(len(x))
    x[others] -= x[references[others]]
    largest = np.abs(x).max(axis=1, initial=0)
    usual = others & (largest > _SMALLEST) & (largest < _LARGEST)
    scales = np.ones(len(x), np.float32)
    scales[usual] = np.ldexp(np.float32(1), 1 - np.frexp(largest[usual])[1])
    x *= scales[:, None]
    return scales


def from_relative(y: np.ndarray, references: np.ndarray, scales: np.ndarray) -> None:
    """The way back after a product: y[r] = y[r] / scales[r] + y[references[r]], in place."""
    others = references != np.arange(len(y))
    y[others] = y[others] / scales[others, None] + y[references[others]]
