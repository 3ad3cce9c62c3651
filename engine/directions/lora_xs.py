"""LoRA-XS (arXiv 2405.17604): only a small core matrix is trained, between factors from an SVD.

The weight W is about U S V^T. A = V^T is frozen. B = U R^T changes only through the core
R [rank, rank], which starts at zero. The adapter is saved as an ordinary LoRA.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.directions.subspace import Bases, Subspace
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import Scope

# Power iterations and extra columns (oversampling) of the randomized SVD (Halko et al., arXiv
# 0909.4061): enough for the leading vectors of weights, whose singular values fall slowly.
_ITERATIONS, _SPARE = 4, 8


def lora_xs(
    adapter: Adapter, decoded: Callable[[Target], np.ndarray], scope: Scope | None = None
) -> Subspace:
    """Directions with normal numbers for the targets' cores; also sets every A to its V^T.

    decoded: returns a target's weight, float32 [n_out, n_in].  ConfigError if the rank is above
    n_in or n_out.
    """
    rank, bases = adapter.config.rank, {}
    for t in (scope or Scope()).of(adapter.targets):
        if rank > min(t.n_in, t.n_out):
            raise ConfigError(f"{t.name} has no {rank} singular vectors")
        left, right = _leading(decoded(t), rank)
        adapter.factors(t).a[:] = right
        bases[t.name] = Bases(np.zeros((0, t.n_in), np.float32), left)
    return Subspace(adapter, bases)


def _leading(weight: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The first left and right singular vectors as rows: float32 [rank, n_out], [rank, n_in]."""
    columns = min(rank + _SPARE, *weight.shape)
    x = np.random.default_rng(0).normal(size=(weight.shape[1], columns)).astype(np.float32)
    for _ in range(_ITERATIONS):
        x = weight.T @ np.linalg.qr(weight @ x)[0]
    q = np.linalg.qr(weight @ x)[0]
    u, _, v = np.linalg.svd(q.T @ weight, full_matrices=False)
    left = np.ascontiguousarray((q @ u[:, :rank]).T, np.float32)
    return left, np.ascontiguousarray(v[:rank], np.float32)
