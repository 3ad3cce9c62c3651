"""Directional derivatives by forward passes: which lanes to run, and how to use their losses.

All lanes of a step go through the model in one forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import DEFAULT_EPSILON, EXACT_METHODS, SLOPE_METHODS
from fwdllm.kernels.reference import philox
from fwdllm.kernels.types import Lanes

# Where examples' seeds are in the stream of a seed: far behind the numbers of its direction.
_EXAMPLES_AT = 1 << 62


@dataclass(frozen=True)
class Probe:
    """The loss at the adapter's parameters, and its directional derivatives.

    loss: mean negative log-likelihood in nats per label.  seeds: uint64 [n_seeds].  derivative:
    float64 [n_seeds], of the loss along each v(seed). With a direction for every example both are
    [n_seeds, n_examples], and a derivative is that of one example's share of the loss along its own
    v(seed).  head_gradient: float32 [n_head], or None without a head.  n_tokens: rows forwarded,
    summed over lanes; layers before the first perturbed one compute only one lane.
    gradient: float32 [n_lora], the adapter's, where an exact method has it of the whole batch.
    """

    loss: float
    seeds: np.ndarray
    derivative: np.ndarray
    head_gradient: np.ndarray | None
    n_tokens: int
    gradient: np.ndarray | None = None


@dataclass(frozen=True)
class Plan:
    """The lanes of one step.

    method, epsilon: how derivatives are computed from the lanes' losses.  plain: whether lane 0 is
    unperturbed.
    """

    lanes: Lanes
    method: str
    epsilon: float
    plain: bool

    def loss(self, losses: np.ndarray) -> float:
        """The loss from losses [n_lanes]: the plain lane's, or without one the mean of the finite
        ones."""
        finite = losses[np.isfinite(losses)]
        return float(losses[0] if self.plain or not finite.size else finite.mean())

    def derivative(self, losses: np.ndarray) -> np.ndarray:
        """Derivatives along the seeds' directions: float64 [n_lanes, ...] to [n_seeds, ...].

        losses: of each lane; tangent lanes have derivatives already.
        """
        first = int(self.plain)
        if self.method == "forward-ad":
            return losses[1:]
        if self.method == "forward-difference":
            return (losses[1:] - losses[0]) / self.epsilon
        return (losses[first::2] - losses[first + 1 :: 2]) / (2 * self.epsilon)

    def parts(self, max_lanes: int) -> list[Lanes]:
        """The lanes in groups of about ``max_lanes``.

        The lanes of a seed stay together, and every group has the plain lane if there is one, so
        that a seed's lanes give the same bits in any group.
        """
        first, n = int(self.plain), len(self.lanes)
        per_seed = 2 if self.method == "central" else 1
        step = max(1, (max_lanes - first) // per_seed) * per_seed
        chosen = [[*range(first), *range(i, min(i + step, n))] for i in range(first, n, step)]
        seeds, coefficients = self.lanes.seeds, self.lanes.coefficients
        return [replace(self.lanes, seeds=seeds[c], coefficients=coefficients[c]) for c in chosen]


def plan(
    seeds: np.ndarray,
    method: str,
    epsilon: float = DEFAULT_EPSILON,
    distribution: str = "normal",
    plain: bool = False,
) -> Plan:
    """Lanes for ``method``; ``plain`` adds an unperturbed lane if the method has none.

    seeds: uint64 [n_seeds], or [n_seeds, n_examples] if every example has directions of its own.
    forward-ad: grad(L) . v, exact, with a plain lane and a tangent lane for each seed (Spry,
    arXiv 2405.15551, section 3).
    central: (L(theta + eps v) - L(theta - eps v)) / 2 eps, FwdLLM's estimator
    (arXiv 2308.13894, section 3.1).  forward-difference: (L(theta + eps v) - L(theta)) / eps.
    """
    seeds = np.asarray(seeds, np.uint64)
    if seeds.ndim not in (1, 2) or len(seeds) == 0:
        raise ConfigError("directional derivatives need at least one seed")
    if method not in SLOPE_METHODS:
        raise ConfigError(f"method must be one of {', '.join(SLOPE_METHODS)}, not {method!r}")
    if not (np.isfinite(epsilon) and epsilon > 0):
        raise ConfigError(f"epsilon must be a positive number, not {epsilon!r}")
    if method == "central":
        seeds = np.repeat(seeds, 2, axis=0)
        coefficients = epsilon * np.tile([1.0, -1.0], len(seeds) // 2)
    else:
        plain = True
        coefficients = np.full(len(seeds), 1.0 if method == "forward-ad" else epsilon)
    if plain:
        seeds = np.concatenate([np.zeros_like(seeds[:1]), seeds])
        coefficients = np.concatenate([np.zeros(1), coefficients])
    tangents = method == "forward-ad"
    lanes = Lanes(seeds, coefficients.astype(np.float32), distribution, tangents)
    return Plan(lanes, method, epsilon, plain)


def n_lanes(method: str, n_seeds: int, plain: bool = False) -> int:
    """Lanes of a step along ``n_seeds`` directions; ConfigError for an unknown method.

    plain: as of ``plan``.
    """
    if method in EXACT_METHODS:
        return 1
    return len(plan(np.arange(n_seeds, dtype=np.uint64), method, plain=plain).lanes)


def example_seeds(seeds: np.ndarray, n_examples: int) -> np.ndarray:
    """Derive from each seed a seed for every example: uint64 [n_seeds, n_examples].

    seeds: uint64 [n_seeds]. Example i gets the first 64 bits of block 2^62 + i of a seed's stream.
    """
    words = np.stack([philox(int(s), _EXAMPLES_AT, n_examples) for s in seeds]).astype(np.uint64)
    return words[..., 0] | words[..., 1] << np.uint64(32)
