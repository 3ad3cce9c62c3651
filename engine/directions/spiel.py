"""SpIEL (arXiv 2401.16405): few entries of the weights are trained, and training chooses which.

A change of a weight W [n_out, n_in] that is zero outside of ``rank`` columns is a LoRA: the rows of
A are zero but for a one in their column, and scale * B holds the columns. So the adapter is an
ordinary one for kernels and files. SpIEL takes the entries from all of W; here they are from
columns that are fixed at the start.
"""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.directions.sparse import Sparse, chosen_in_training
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import DirectionsConfig
from fwdllm.kernels.reference import philox


def spiel(adapter: Adapter, config: DirectionsConfig, seed: int) -> Sparse:
    """Directions of the entries of B that training chooses; also sets every A to its columns.

    seed: draws the columns, the same on every machine; those with the largest inputs learn less
    (docs/estimators.md).  ConfigError if a target has fewer columns than the rank.
    """
    dense = Dense(adapter, scope=config.scope)
    rank = adapter.config.rank
    for target in dense.targets:
        if rank > target.n_in:
            raise ConfigError(f"{target.name} has no {rank} columns")
        # Each target reads its own part of the stream.
        keys = philox(seed, target.offset, target.n_in)[:, 0]
        columns = np.sort(np.argsort(keys, kind="stable")[:rank])
        adapter.factors(target).a[:] = np.arange(target.n_in) == columns[:, None]
    return chosen_in_training(dense, config.keep, config.reselect, again=True)
