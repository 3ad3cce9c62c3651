"""What computes a model's outputs: the interface of our own graphs and of llama.cpp's."""

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
    """Sees what adapted layers read and give, and may change what they give.

    layer: the first where a tap makes lanes differ, None if it only looks on.
    """

    @property
    def layer(self) -> int | None: ...

    def __call__(self, target: Target, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        """x: float32 [n_lanes * n, n_in] and y: [n_lanes * n, n_out] of n rows of the batch."""
        ...


class SquareSums:
    """A tap that adds up what layers read, squared. sums: float64 [n_in] by target."""

    layer = None

    def __init__(self) -> None:
        self.sums: dict[str, np.ndarray] = {}

    def __call__(self, target: Target, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        squares = np.square(x, dtype=np.float64).sum(axis=0)
        self.sums[target.name] = self.sums.get(target.name, 0) + squares


@dataclass(frozen=True)
class Variants:
    """What a pass evaluates beside the plain model: lanes, what their seeds mean, and a tap."""

    lanes: Lanes = field(default_factory=Lanes.plain)
    directions: Directions | None = None
    tap: Tap | None = None


PLAIN = Variants()


class Graph(Protocol):
    """Two there are: ``models.graph.OwnGraph`` and ``llamacpp.graph.LlamaGraph``.

    adapter: at work in every pass; it may be exchanged between them, None is the plain model.
    Errors of passes: ConfigError for what the model or the graph does not have.
    """

    adapter: Adapter | None

    def token_losses(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """NLL of label tokens in every lane, slopes in tangents: float64 [n_lanes, n_labels]."""
        ...

    def features(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """Pooled features of every sequence in every lane: float32 [lanes * sequences, width]."""
        ...

    def token_gradient(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """NLL of label tokens, float64 [n_labels], and of their mean the gradient by theta.

        By the way back through the layers, which llama.cpp's graphs have not.
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
        """Let a tap look on at a plain pass."""
        ...

    def max_lanes(self, batch: Batch, n_lanes: int) -> int:
        """How many of n_lanes go through the model at once within the memory budget."""
        ...

    def lane_tokens(self, n_rows: int, n_lanes: int, first: int) -> int:
        """Rows of all lanes that a pass computes if they differ from layer ``first`` on."""
        ...
