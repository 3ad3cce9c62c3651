"""B stays as it is and A alone moves, as ``engine.estimators.activation`` trains."""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions.subspace import Bases, Subspace
from fwdllm.engine.settings import Scope


def frozen_b(adapter: Adapter, scope: Scope | None = None) -> Subspace:
    """Normal numbers for every element of A; its coordinates are the A of the targets in turn."""
    targets = (scope or Scope()).of(adapter.targets)
    return Subspace(
        adapter, {t.name: Bases(None, np.zeros((0, t.n_out), np.float32)) for t in targets}
    )
