"""Directional derivatives by perturbed inference: which lanes to run, and what their losses say.

All lanes of a step go through the model in one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.kernels.types import DISTRIBUTIONS, Lanes

# Step along a direction of unit variance per parameter; docs/decisions.md has the sweep.
DEFAULT_EPSILON = 1e-3


@dataclass(frozen=True)
class Probe:
    """What one step learned about the loss around the adapter.

    loss: mean negative log-likelihood in nats per label.  derivative: float64 [n_seeds], its
    slope along each v(seed).  head_gradient: float32 [n_head], or None without a head.
    n_tokens: lane-tokens forwarded.
    """

    loss: float
    derivative: np.ndarray
    head_gradient: np.ndarray | None
    n_tokens: int


@dataclass(frozen=True)
class Plan:
    """The lanes of one step. derivative: losses float64 [n_lanes] -> slopes [n_seeds].

    plain: whether lane 0 is unperturbed.  per_seed: lanes of each seed.
    """

    lanes: Lanes
    derivative: Callable[[np.ndarray], np.ndarray]
    plain: bool
    per_seed: int

    def parts(self, max_lanes: int) -> list[Lanes]:
        """The lanes in groups of about ``max_lanes``, each with whole seeds and the plain lane.

        A seed's lanes give the same bits in any group.
        """
        first, n = int(self.plain), len(self.lanes)
        step = max(1, (max_lanes - first) // self.per_seed) * self.per_seed
        chosen = [[*range(first), *range(i, min(i + step, n))] for i in range(first, n, step)]
        seeds, coefficients = self.lanes.seeds, self.lanes.coefficients
        return [Lanes(seeds[c], coefficients[c], self.lanes.distribution) for c in chosen]


def plan(
    seeds: np.ndarray, method: str, epsilon: float, distribution: str, plain: bool = False
) -> Plan:
    """Lanes for ``method``; ``plain`` adds an unperturbed lane if the method has none.

    central: (L(theta + eps v) - L(theta - eps v)) / 2 eps, FwdLLM's estimator
    (arXiv 2308.13894, section 3.1).  forward-difference: (L(theta + eps v) - L(theta)) / eps.
    """
    seeds = np.asarray(seeds, np.uint64)
    if seeds.ndim != 1 or len(seeds) == 0:
        raise ConfigError("directional derivatives need at least one seed")
    if distribution not in DISTRIBUTIONS:
        raise ConfigError(f"distribution must be one of {DISTRIBUTIONS}, not {distribution!r}")
    if not (np.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"epsilon must be a positive number, not {epsilon!r}")
    if method == "central":
        lane_seeds = np.repeat(seeds, 2)
        signs = np.tile(np.array([1.0, -1.0]), len(seeds))
        first = 1 if plain else 0

        def derivative(losses: np.ndarray) -> np.ndarray:
            return (losses[first::2] - losses[first + 1 :: 2]) / (2 * epsilon)

    elif method == "forward-difference":
        lane_seeds, signs, plain = seeds, np.ones(len(seeds)), True

        def derivative(losses: np.ndarray) -> np.ndarray:
            return (losses[1:] - losses[0]) / epsilon

    else:
        raise ConfigError(f"method must be central or forward-difference, not {method!r}")
    coefficients = epsilon * signs
    if plain:
        lane_seeds = np.concatenate([np.zeros(1, np.uint64), lane_seeds])
        coefficients = np.concatenate([np.zeros(1), coefficients])
    lanes = Lanes(lane_seeds, coefficients.astype(np.float32), distribution)
    return Plan(lanes, derivative, plain, 2 if method == "central" else 1)
