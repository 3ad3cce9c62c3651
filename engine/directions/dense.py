"""Directions with one random number for each parameter: M is the identity inside a scope."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.directions.base import check_distribution, combine, dot
from fwdllm.engine.settings import Scope
from fwdllm.kernels.api import Array
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
        return (self.scope or Scope()).of(self.adapter.targets)

    def lora(self, target: Target, theta: Array | None = None) -> LoRA:
        return self.adapter.factors(target, theta)

    def combine(self, seeds: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        return combine(self.adapter, self.distribution, self.size, self.ranges, seeds, coefficients)

    def dot(self, coordinates: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        return dot(self.adapter, self.distribution, self.ranges, coordinates, seeds)

    def expand(self, coordinates: np.ndarray) -> np.ndarray:
        return coordinates

    def project(self, theta: np.ndarray) -> np.ndarray:
        inside = np.zeros_like(theta)
        for start, end in self.ranges:
            inside[start:end] = theta[start:end]
        return inside

    @cached_property
    def ranges(self) -> list[tuple[int, int]]:
        """(start, end) of the targets' parameters in theta; adjacent ranges are merged."""
        rank = self.adapter.config.rank
        ranges: list[tuple[int, int]] = []
        for t in self.targets:
            start = ranges.pop()[0] if ranges and ranges[-1][1] == t.offset else t.offset
            ranges.append((start, t.offset + t.size(rank)))
        return ranges
