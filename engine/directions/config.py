"""Which directions a run uses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.directions.base import Directions, Scope
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.directions.frozen_a import lora_fa
from fwdllm.engine.directions.lora_xs import lora_xs
from fwdllm.engine.directions.sparse import Sparse, foresight_mask
from fwdllm.engine.directions.subzero import subzero
from fwdllm.engine.errors import ConfigError

DIRECTIONS = ("normal", "rademacher", "lora-fa", "lora-xs", "subzero", "sparse")


@dataclass(frozen=True)
class DirectionsConfig:
    """kind: of DIRECTIONS.  dimension: of subzero's subspaces.  keep: sparse's share, 0 to 1.

    scope: the part of the adapter that is trained.  Errors: ConfigError.
    """

    kind: str = "normal"
    dimension: int = 8
    keep: float = 0.1
    scope: Scope | None = None

    def __post_init__(self) -> None:
        if self.kind not in DIRECTIONS:
            raise ConfigError(f"directions are {', '.join(DIRECTIONS)}, not {self.kind!r}")

    def make(
        self,
        adapter: Adapter,
        seed: int,
        mean_squares: Callable[[], Mapping[str, np.ndarray]],
        decoded: Callable[[Target], np.ndarray],
    ) -> Directions:
        """The directions for an adapter as it is before training; lora-xs sets its A.

        seed: of random subspaces.  mean_squares: gives those of the targets' inputs, for a mask.
        decoded: gives a target's weight, float32 [n_out, n_in].
        """
        if self.kind == "lora-fa":
            return lora_fa(adapter, self.scope)
        if self.kind == "lora-xs":
            return lora_xs(adapter, decoded, self.scope)
        if self.kind == "subzero":
            return subzero(adapter, self.dimension, seed, self.scope)
        if self.kind == "sparse":
            dense = Dense(adapter, scope=self.scope)
            return Sparse(dense, foresight_mask(adapter, mean_squares(), self.keep))
        return Dense(adapter, self.kind, self.scope)
