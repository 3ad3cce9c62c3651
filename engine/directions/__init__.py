"""Which direction in the adapter's parameter space a seed names.

v(seed) = M z(seed): z is the random stream of the seed (``kernels.api.Kernels.normal``), M a linear
map that depends on the kind of directions.
"""

from __future__ import annotations

from fwdllm.engine.directions.base import Directions
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.directions.frozen_a import lora_fa
from fwdllm.engine.directions.frozen_b import frozen_b
from fwdllm.engine.directions.lora_xs import lora_xs
from fwdllm.engine.directions.make import make_directions
from fwdllm.engine.directions.sparse import Choice, Sparse, foresight_mask
from fwdllm.engine.directions.spiel import spiel
from fwdllm.engine.directions.subspace import Bases, Subspace
from fwdllm.engine.directions.subzero import subzero

__all__ = [
    "Bases",
    "Choice",
    "Dense",
    "Directions",
    "Sparse",
    "Subspace",
    "foresight_mask",
    "frozen_b",
    "lora_fa",
    "lora_xs",
    "make_directions",
    "spiel",
    "subzero",
]
