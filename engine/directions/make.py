"""Makes the directions that a configuration describes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.directions.base import Directions
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.directions.frozen_a import lora_fa
from fwdllm.engine.directions.lora_xs import lora_xs
from fwdllm.engine.directions.sparse import Sparse, chosen_in_training, foresight_mask
from fwdllm.engine.directions.spiel import spiel
from fwdllm.engine.directions.subzero import subzero
from fwdllm.engine.settings import DirectionsConfig


def make_directions(
    config: DirectionsConfig,
    adapter: Adapter,
    seed: int,
    mean_squares: Callable[[], Mapping[str, np.ndarray]] | None,
    decoded: Callable[[Target], np.ndarray],
) -> Directions:
    """The directions for an adapter that is not trained yet; "lora-xs" and "spiel" also set its A.

    seed: of the random subspaces of "subzero" and the columns of "spiel".  mean_squares: returns
    the mean squares of the targets' inputs, for the mask of "sparse"; see ``foresight_mask``. None
    where there is no model: its mask is then chosen in training, once.  decoded: returns a target's
    weight, float32 [n_out, n_in].
    """
    if config.kind == "lora-fa":
        return lora_fa(adapter, config.scope)
    if config.kind == "lora-xs":
        return lora_xs(adapter, decoded, config.scope)
    if config.kind == "subzero":
        return subzero(adapter, config.dimension, seed, config.scope)
    if config.kind == "sparse":
        dense = Dense(adapter, scope=config.scope)
        if mean_squares is None:
            return chosen_in_training(dense, config.keep, config.reselect, again=False)
        return Sparse(dense, foresight_mask(adapter, mean_squares(), config.keep))
    if config.kind == "spiel":
        return spiel(adapter, config, seed)
    return Dense(adapter, config.kind, config.scope)
