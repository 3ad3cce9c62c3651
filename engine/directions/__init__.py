"""What direction of the adapter a seed names: v(seed) = M z(seed), for the stream z of the seed
(``fwdllm.kernels.reference.random``) and a linear map M that differs from one kind of directions
to the next.
"""

from __future__ import annotations

from fwdllm.engine.directions.base import Directions, Scope
from fwdllm.engine.directions.config import DIRECTIONS, DirectionsConfig
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.directions.frozen_a import lora_fa
from fwdllm.engine.directions.frozen_b import frozen_b
from fwdllm.engine.directions.lora_xs import lora_xs
from fwdllm.engine.directions.sparse import Sparse, foresight_mask
from fwdllm.engine.directions.subspace import Bases, Subspace
from fwdllm.engine.directions.subzero import subzero

__all__ = [
    "DIRECTIONS",
    "Bases",
    "Dense",
    "Directions",
    "DirectionsConfig",
    "Scope",
    "Sparse",
    "Subspace",
    "foresight_mask",
    "frozen_b",
    "lora_fa",
    "lora_xs",
    "subzero",
]
