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
    """The map from a seed to its direction v(seed) = M z(seed).

    z(seed) are numbers of the seed's random stream, called coordinates. An update of theta is
    summed in coordinates and then expanded: M sum_k c_k z(seed_k).
    distribution: of the coordinates.  size: number of coordinates.  targets: the adapted layers
    whose factors M changes.
    """

    @property
    def distribution(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def targets(self) -> tuple[Target, ...]: ...

    def lora(self, target: Target, theta: Array | None = None) -> LoRA:
        """A target's factors, and how kernels generate their directions; see Adapter.factors."""
        ...

    def combine(self, seeds: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        """sum_k coefficients[k] z(seeds[k]): float32 [size].

        seeds: uint64 [k].  coefficients: float32 [k].
        """
        ...

    def dot(self, coordinates: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """coordinates . z(seed) for every seed: float64 [k].

        coordinates: float32 [size].  seeds: uint64 [k].
        """
        ...

    def expand(self, coordinates: np.ndarray) -> np.ndarray:
        """M coordinates: float32 [size] to [n_lora]."""
        ...

    def project(self, theta: np.ndarray) -> np.ndarray:
        """M^T theta: float32 [n_lora] to [size].

        It turns a gradient with respect to theta into the one with respect to coordinates.
        """
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
