"""The interface that computes a model's outputs, implemented by our own graphs and llama.cpp's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.directions import Directions
from fwdllm.kernels.types import Lanes


class Tap(Protocol):
    """A hook that sees the inputs and outputs of adapted layers, and may change the outputs.

    layer: the first layer where the tap makes lanes differ, None if it changes nothing.
    """

    @property
    def layer(self) -> int | None: ...

    def __call__(self, target: Target, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        """Called after the matmul of an adapted layer; y may be changed in place.

        rows: which n rows of the batch these are.  x: the input, float32 [n_lanes * n, n_in].
        y: the output, [n_lanes * n, n_out].
        """
        ...


class SquareSums:
    """A tap that sums the squares of layers' inputs over rows. sums: float64 [n_in] by target."""

    layer = None

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}

    def __call__(self, target: Target, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        squares = np.square(x, dtype=np.float64).sum(axis=0)
        self.sums[target.name] = self.sums.get(target.name, 0) + squares


@dataclass(frozen=True)
class Variants:
    """What a pass evaluates: lanes, the directions that their seeds name, and a tap.

    directions: None if no lane is perturbed by a seed.
    """

    lanes: Lanes = field(default_factory=Lanes.plain)
    directions: Directions | None = None
    tap: Tap | None = None


PLAIN = Variants()


class Graph(Protocol):
    """A model's computation: ``models.graph.OwnGraph`` or ``llamacpp.graph.LlamaGraph``.

    adapter: applied in every pass, None for the model alone; it may be replaced between passes.
    Passes raise ConfigError for what the model or the graph does not support.
    """

    adapter: Adapter | None

    def token_losses(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """NLL of each label token in each lane, derivatives of it in tangents.

        Returns float64 [n_lanes, n_labels].
        """
        ...

    def features(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """Pooled features of every sequence in every lane: float32 [lanes * sequences, width]."""
        ...

    def token_gradient(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """NLL of label tokens, float64 [n_labels], and of their mean the gradient by theta.

        By the way back through the layers. llama.cpp's graphs have one from the logits to the last
        layer's ffn_down, see ``llamacpp.readout``.
        """
        ...

    def feature_gradient(
        self, batch: Batch, cotangents: Callable[[Batch, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pooled features, float32 [n_sequences, width], and the gradient by theta.

        cotangents: of some sequences' features, the gradient of the loss by them.
        """
        ...

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits after each token of one sequence: float32 [n_tokens, n_vocab]."""
        ...

    def watch(self, batch: Batch, tap: Tap) -> None:
        """Run one unperturbed pass with a tap that changes nothing."""
        ...

    def max_lanes(self, batch: Batch, n_lanes: int) -> int:
        """How many of n_lanes fit into one pass within the memory budget."""
        ...

    def lane_tokens(self, n_rows: int, n_lanes: int, first: int) -> int:
        """Rows, summed over lanes, that a pass computes if lanes differ from layer ``first`` on."""
        ...
