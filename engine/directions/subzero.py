"""SubZero (arXiv 2410.08989): a random subspace of low rank in every layer.

SubZero perturbs a weight by U Z V^T with random orthonormal U and V. One side of a LoRA factor has
only ``rank`` entries, so only its long side gets a basis: A changes by Z_A V^T and B by U Z_B.
"""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions.subspace import Bases, Subspace
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import Scope


def subzero(adapter: Adapter, dimension: int, seed: int, scope: Scope | None = None) -> Subspace:
    """Directions in a random subspace of ``dimension`` dimensions of each factor's long side.

    Equal seeds give equal subspaces on every machine, up to rounding.  ConfigError if
    ``dimension`` is above n_in or n_out of a target.
    """
    bases = {}
    for t in (scope or Scope()).of(adapter.targets):
        if not 1 <= dimension <= min(t.n_in, t.n_out):
            raise ConfigError(f"{t.name} has no subspace of {dimension} dimensions")
        # Each target reads its own part of the stream, so that their subspaces differ.
        n_in, n_out = t.n_in * dimension, t.n_out * dimension
        numbers = adapter.ops.normal(seed, t.offset * dimension, n_in + n_out)
        a, b = np.split(numbers, [n_in])
        bases[t.name] = Bases(_orthonormal(a, t.n_in), _orthonormal(b, t.n_out))
    return Subspace(adapter, bases)


def _orthonormal(numbers: np.ndarray, width: int) -> np.ndarray:
    q, r = np.linalg.qr(numbers.astype(np.float64).reshape(-1, width).T)
    return np.ascontiguousarray((q * np.sign(np.diag(r))).T, np.float32)
