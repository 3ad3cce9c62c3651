"""The interface of directions, and what all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.errors import ConfigError
from fwdllm.kernels.api import Array
from fwdllm.kernels.types import DISTRIBUTIONS, LoRA


class Directions(Protocol):
    """What v(seed) = M z(seed) is, z the numbers of the seed's stream, called coordinates.

    An update of theta is made in coordinates and expanded: M sum_k c_k z(seed_k).
    distribution: of the coordinates.  size: how many there are.  targets: what M moves.
    """

    @property
    def distribution(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def targets(self) -> tuple[Target, ...]: ...

    def lora(self, target: Target, theta: Array | None = None) -> LoRA:
        """The factors of a target with their directions, for the kernels; see Adapter.factors."""
        ...

    def combine(self, seeds: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """sum_k coefficients[k] z(seeds[k]): float32 [size]. Two of it: uint64 [k], float32 [k]."""
        ...

    def dot(self, coordinates: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """coordinates . z(seed) for every seed: float32 [size], uint64 [k] to float64 [k]."""
        ...

    def expand(self, coordinates: np.ndarray) -> np.ndarray:
        """M coordinates: float32 [n_lora]."""
        ...

    def project(self, theta: np.ndarray) -> np.ndarray:
        """M^T theta, of a gradient by theta that by coordinates: float32 [n_lora] to [size]."""
        ...


def combine(
    adapter: Adapter,
    distribution: str,
    size: int,
    ranges: Sequence[tuple[int, int]],
    seeds: np.ndarray,
    coefficients: np.ndarray,
) -> np.ndarray:
    """sum_k coefficients[k] z(seeds[k]) in ranges start .. end, zero elsewhere: float32 [size]."""
    out = np.zeros(size, np.float32)
    for start, end in ranges:
        adapter.ops.seeded_axpy(
            out[start:end], seeds, coefficients, offset=start, distribution=distribution
        )
    return out


def dot(
    adapter: Adapter,
    distribution: str,
    ranges: Sequence[tuple[int, int]],
    coordinates: np.ndarray,
    seeds: np.ndarray,
) -> np.ndarray:
    """coordinates . z(seed) over ranges start .. end, for every seed: float64 [k]."""
    total = np.zeros(len(seeds))
    for start, end in ranges:
        total += adapter.ops.seeded_dot(
            coordinates[start:end], seeds, offset=start, distribution=distribution
        )
    return total


def check_distribution(distribution: str) -> None:
    """ConfigError for a distribution that does not exist."""
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"distribution must be one of {DISTRIBUTIONS}, not {distribution!r}")
