"""Directions inside a fixed subspace of every factor: M maps few coordinates to many parameters.

The fewer coordinates there are, the more accurate is the estimate of their gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.directions.base import check_distribution, combine, dot
from fwdllm.kernels.api import Array
from fwdllm.kernels.types import LoRA


@dataclass(frozen=True)
class Bases:
    """The subspaces of one target's factors.

    a: float32 [q, n_in], whose rows span the changes of the rows of A.  b: float32 [q, n_out],
    whose rows span the changes of the columns of B. An empty basis (q = 0) freezes its factor;
    with None every element of the factor changes freely.
    """

    a: np.ndarray | None
    b: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Subspace:
    """The direction of A is Z_A bases.a, that of B is (Z_B bases.b)^T.

    Coordinates are the Z_A and Z_B of every target, in the adapter's order of targets.
    bases: by the names of the targets to train.
    """

    adapter: Adapter
    bases: Mapping[str, Bases]
    distribution: str = "normal"

    def __post_init__(self) -> None:
        check_distribution(self.distribution)

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        return tuple(t for t in self.adapter.targets if t.name in self.bases)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, int, int]]:
        """By target: where its coordinates begin, and the columns of its Z_A and of its Z_B."""
        shapes, at = {}, 0
        for t in self.targets:
            bases = self.bases[t.name]
            of_a = t.n_in if bases.a is None else len(bases.a)
            of_b = t.n_out if bases.b is None else len(bases.b)
            shapes[t.name] = (at, of_a, of_b)
            at += self.adapter.config.rank * (of_a + of_b)
        return shapes

    @cached_property
    def size(self) -> int:
        rank = self.adapter.config.rank
        return sum(rank * (of_a + of_b) for _, of_a, of_b in self._shapes.values())

    def lora(self, target: Target, theta: Array | None = None) -> LoRA:
        bases, at = self.bases[target.name], self._shapes[target.name][0]
        factors = self.adapter.factors(target, theta)
        return replace(factors, offset=at, basis_a=bases.a, basis_b=bases.b)

    def combine(self, seeds: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        whole = [(0, self.size)]
        return combine(self.adapter, self.distribution, self.size, whole, seeds, coefficients)

    def dot(self, coordinates: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return dot(self.adapter, self.distribution, [(0, self.size)], coordinates, seeds)

    def expand(self, coordinates: np.ndarray) -> np.ndarray:
        theta = np.zeros(self.adapter.n_lora, np.float32)
        rank = self.adapter.config.rank
        for t in self.targets:
            bases, (at, of_a, of_b) = self.bases[t.name], self._shapes[t.name]
            z_a, z_b = np.split(coordinates[at : at + rank * (of_a + of_b)], [rank * of_a])
            a = z_a if bases.a is None else z_a.reshape(rank, of_a) @ bases.a
            b = z_b if bases.b is None else (z_b.reshape(rank, of_b) @ bases.b).T
            theta[t.offset : t.offset + t.size(rank)] = np.concatenate([a.ravel(), b.ravel()])
        return theta

    def project(self, theta: np.ndarray) -> np.ndarray:
        found = []
        rank = self.adapter.config.rank
        for t in self.targets:
            bases = self.bases[t.name]
            a, b = np.split(theta[t.offset : t.offset + t.size(rank)], [rank * t.n_in])
            if bases.a is not None:
                a = a.reshape(rank, t.n_in) @ bases.a.T
            if bases.b is not None:
                b = b.reshape(t.n_out, rank).T @ bases.b.T
            found += [a.ravel(), b.ravel()]
        return np.concatenate(found)
