"""SpIEL (arXiv 2401.16405): few entries of the weights are trained, and training chooses which.

A change of a weight W [n_out, n_in] that is zero outside of ``rank`` columns is a LoRA: the rows of
A are zero but for a one in their column, and B / scale holds the columns. So the adapter is an
ordinary one for kernels and files. SpIEL takes the entries from all of W; here they are from
columns that are fixed at the start.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.directions.sparse import Sparse, chosen_in_training
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import DirectionsConfig
from fwdllm.kernels.reference import philox


def spiel(
    adapter: Adapter,
    config: DirectionsConfig,
    seed: int,
    mean_squares: Mapping[str, np.ndarray] | None,
) -> Sparse:
    """Directions of the entries of B that training chooses; also sets every A to its columns.

    mean_squares: of the targets' inputs, float64 [n_in] by name, see ``Engine.input_mean_squares``.
    An entry's squared gradient grows with that of its input, so the columns of the largest are
    taken; with None, as on a server, which has no model, columns that ``seed`` draws, the same on
    every machine.  ConfigError if a target has fewer columns than the rank.
    """
    dense = Dense(adapter, scope=config.scope)
    rank = adapter.config.rank
    for target in dense.targets:
        if rank > target.n_in:
            raise ConfigError(f"{target.name} has no {rank} columns")
        if mean_squares is None:
            rating = _drawn(seed, target)
        else:
            rating = -mean_squares[target.name]
        columns = np.sort(np.argsort(rating, kind="stable")[:rank])
        adapter.factors(target).a[:] = np.arange(target.n_in) == columns[:, None]
    return chosen_in_training(dense, config.keep, config.reselect, again=True)


def _drawn(seed: int, target: Target) -> np.ndarray:
    """Random integers [n_in]; each target reads its own part of the stream."""
    return philox(seed, target.offset, target.n_in)[:, 0]
