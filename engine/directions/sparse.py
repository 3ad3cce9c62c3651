"""Directions that are zero for most parameters: M = diag(mask)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.errors import ConfigError
from fwdllm.kernels.api import Array
from fwdllm.kernels.types import LoRA


@dataclass(frozen=True, eq=False)
class Choice:
    """That training itself chooses the mask, see ``protocol.selection``.

    candidates: int64, ascending; the parameters among which it chooses.  keep: the share of them
    that is trained.  reselect: updates between choices.  again: False: the first choice stays.
    """

    candidates: np.ndarray
    keep: float
    reselect: int
    again: bool

    @property
    def n_trained(self) -> int:
        """How many of the candidates are trained at a time."""
        return max(1, round(self.keep * len(self.candidates)))


@dataclass(frozen=True, eq=False)
class Sparse:
    """Normal numbers where mask, float32 [n_lora], is 1; parameters with a 0 are frozen.

    choice: if there is one, the mask changes in place between steps.
    """

    dense: Dense
    mask: np.ndarray
    choice: Choice | None = None

    def __post_init__(self) -> None:
        if self.mask.shape != (self.dense.size,) or self.mask.dtype != np.float32:
            raise ConfigError(
                f"a mask of {self.dense.size} numbers is needed, not {self.mask.shape}"
            )

    @property
    def distribution(self) -> str:
        return self.dense.distribution

    @property
    def size(self) -> int:
        return self.dense.size

    @property
    def targets(self) -> tuple[Target, ...]:
        return self.dense.targets

    @property
    def n_trained(self) -> int:
        """How many parameters are trained at a time."""
        return self.choice.n_trained if self.choice else int(self.mask.sum())

    def lora(self, target: Target, theta: Array | None = None) -> LoRA:
        rank = self.dense.adapter.config.rank
        mask = self.mask[target.offset : target.offset + target.size(rank)]
        return replace(self.dense.lora(target, theta), mask=mask)

    def combine(self, seeds: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        return self.dense.combine(seeds, coefficients) * self.mask

    def dot(self, coordinates: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return self.dense.dot(coordinates * self.mask, seeds)

    def expand(self, coordinates: np.ndarray) -> np.ndarray:
        return coordinates * self.mask

    def project(self, theta: np.ndarray) -> np.ndarray:
        return self.dense.project(theta) * self.mask


def chosen_in_training(dense: Dense, keep: float, reselect: int, again: bool) -> Sparse:
    """Directions of entries of B, which training chooses; at first of all of them. See ``Choice``.

    A is frozen: while B is zero its gradient is zero, too, which says nothing about its parameters.
    """
    mask = np.zeros(dense.size, np.float32)
    for target in dense.targets:
        end = target.offset + target.size(dense.adapter.config.rank)
        mask[end - dense.adapter.factors(target).b.size : end] = 1
    return Sparse(dense, mask, Choice(np.flatnonzero(mask), keep, reselect, again))


def foresight_mask(
    adapter: Adapter, mean_squares: Mapping[str, np.ndarray], keep: float
) -> np.ndarray:
    """A mask of the parameters that influence the model's outputs most: float32 [n_lora].

    mean_squares: of the inputs of every target over some data, float64 [n_in] by target name; see
    ``Engine.input_mean_squares``.  keep: the share of parameters with a 1, above 0 and at most 1.

    Foresight pruning scores a weight before training by its part of the trace of the neural
    tangent kernel: the squared derivatives of the outputs with respect to that weight (NTK-SAP,
    arXiv 2304.02840). Here the outputs are those of the adapted layer, y = scale B A x, because a
    forward pass does not tell what the rest of the model does to y. The scores are then
    x_j^2 |B_r|^2 for A[r, j] and (A_r x)^2 for B[i, r], averaged over the data as if the inputs
    x_j were independent. While B is zero, |B_r|^2 counts as one for all r.
    """
    if not 0 < keep <= 1:
        raise ConfigError(f"the share of parameters to keep is above 0 and at most 1, not {keep}")
    score = np.empty(adapter.n_lora, np.float64)
    for target in adapter.targets:
        lora, squares = adapter.factors(target), mean_squares[target.name].astype(np.float64)
        b_squares = np.square(lora.b, dtype=np.float64).sum(axis=0)
        if not b_squares.any():
            b_squares[:] = 1
        a = b_squares[:, None] * squares
        b = np.tile(np.square(lora.a, dtype=np.float64) @ squares, (target.n_out, 1))
        at = target.offset + a.size
        score[target.offset : at] = a.ravel()
        score[at : at + b.size] = b.ravel()
    n = max(1, round(keep * score.size))
    mask = np.zeros(score.size, np.float32)
    mask[np.argsort(-score, kind="stable")[:n]] = 1
    return mask
