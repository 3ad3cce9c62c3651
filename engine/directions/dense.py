"""Directions that have a number of their own for every parameter: M = I, in a scope."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fwdllm.engine.adapter import Adapter, Target
from fwdllm.engine.directions.base import Scope, check_distribution, combine
from fwdllm.kernels.types import LoRA


@dataclass(frozen=True)
class Dense:
    """Normal numbers (MeZO, FwdLLM, Spry) or signs ("rademacher"), in the flat layout of theta."""

    adapter: Adapter
    distribution: str = "normal"
    scope: Scope | None = None

    def __post_init__(self) -> None:
        check_distribution(self.distribution)

    @property
    def size(self) -> int:
        return self.adapter.n_lora

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        return (self.scope or Scope()).of(self.adapter)

    def lora(self, target: Target) -> LoRA:
        return self.adapter.factors(target)

    def combine(self, seeds: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        rank = self.adapter.config.rank
        ranges = [(t.offset, t.offset + t.size(rank)) for t in self.targets]
        return combine(self.adapter, self.distribution, self.size, ranges, seeds, coefficients)

    def expand(self, coordinates: np.ndarray) -> np.ndarray:
        return coordinates

    def project(self, theta: np.ndarray) -> np.ndarray:
        inside = np.zeros_like(theta)
        for t in self.targets:
            rows = slice(t.offset, t.offset + t.size(self.adapter.config.rank))
            inside[rows] = theta[rows]
        return inside
