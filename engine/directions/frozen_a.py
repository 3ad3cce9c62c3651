"""LoRA-FA (arXiv 2308.03303), as P-RGE uses it: A is frozen and only B is trained."""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions.subspace import Bases, Subspace
from fwdllm.engine.settings import Scope


def lora_fa(adapter: Adapter, scope: Scope | None = None) -> Subspace:
    """Directions with a normal number for every element of B."""
    targets = (scope or Scope()).of(adapter.targets)
    return Subspace(
        adapter, {t.name: Bases(np.zeros((0, t.n_in), np.float32), None) for t in targets}
    )
