"""B is frozen and only A is trained, as ``engine.estimators.activation`` does it."""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions.subspace import Bases, Subspace
from fwdllm.engine.settings import Scope


def frozen_b(adapter: Adapter, scope: Scope | None = None) -> Subspace:
    """Directions with a normal number for every element of A.

    The coordinates are the A matrices of the targets, one after the other.
    """
    targets = (scope or Scope()).of(adapter.targets)
    return Subspace(
        adapter, {t.name: Bases(None, np.zeros((0, t.n_out), np.float32)) for t in targets}
    )
