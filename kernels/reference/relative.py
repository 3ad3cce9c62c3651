"""Rows as scaled differences to other rows, for matmuls that are computed elsewhere."""

from __future__ import annotations

import numpy as np

_SMALLEST, _LARGEST = 1e-30, 1e30


def to_relative(x: np.ndarray, references: np.ndarray) -> np.ndarray:
    """x[r] = (x[r] - x[references[r]]) s[r] if the reference is another row; returns s.

    x: float32 [rows, d], changed in place.  references: int32 [rows]; a reference is an earlier
    row, or r itself, and must be its own reference.  s: float32 [rows], powers of two that bring a
    row's largest magnitude to 1 .. 2; 1 if it is almost 0 or almost infinite. What rows have in
    common is then rounded once by the matmul that reads them.
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
    """Undoes ``to_relative`` after a matmul: y[r] = y[r] / scales[r] + y[references[r]].

    It changes y in place, only in rows whose reference is another row.
    """
    others = references != np.arange(len(y))
    y[others] = y[others] / scales[others, None] + y[references[others]]
