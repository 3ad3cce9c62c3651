"""What a client sends back, and whether the server may use it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.space import Space

# Of one report, or of many.
Figure: TypeAlias = "np.ndarray | float"


@dataclass(frozen=True, eq=False)
class Report:
    """A client's answer to an assignment.

    n_examples: in the client's batches.  n_tokens: tokens forwarded, counted in every lane.
    seconds: by the client's own clock.
    loss: mean over the batches in nats, each at the adapter before its local step.
    derivatives: float32 [seed_steps, perturbations], head_derivatives: float32 [seed_steps,
    head_perturbations]; directional derivatives of the loss along the assignment's seeds, or, of a
    projection, products of the directions with how far local training moved against them.
    vector: float32, the client's share of the adapter before training minus the same after it, in
    the order of ``Space.pack``; None unless clients upload weights.
    """

    round: int
    part: int
    n_examples: int
    n_tokens: int
    seconds: float
    loss: float
    derivatives: np.ndarray
    head_derivatives: np.ndarray
    vector: np.ndarray | None = None


def expected_shapes(
    config: FederationConfig, space: Space, assignment: Assignment
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """Shapes of derivatives and head_derivatives of an answer, and the size of its vector."""
    if config.upload == "weights":
        return (0, 0), (0, 0), space.packed_size(assignment.layers)
    return assignment.seeds.shape, assignment.head_seeds.shape, 0


def usable(
    config: FederationConfig,
    n_examples: Figure,
    seconds: Figure,
    loss: Figure,
    scalars: np.ndarray,
    n_clients: int = 1,
) -> np.ndarray:
    """Whether reports may be used as far as their numbers go: bool [n], [1] of one report.

    n_examples, seconds, loss: of each report, [n].  scalars: [n, k].  n_clients: that each stands
    for.
    """
    # An array, so that every NumPy compares in double precision. NaN is no less than anything.
    limit, most = np.array([config.max_derivative]), _most_examples(config, n_clients)
    fits = (n_examples >= 1) & (n_examples <= most) & (seconds >= 0) & (seconds < math.inf)
    return (np.abs(scalars) <= limit).all(axis=-1) & fits & (abs(loss) <= limit)


def _most_examples(config: FederationConfig, n_clients: int) -> int:
    return config.batch_size * config.local_steps * n_clients


def fault(config: FederationConfig, report: Report, n_clients: int = 1) -> str | None:
    """Why a report may not be used, in a few words, or None. n_clients: that it stands for."""
    r, most = report, _most_examples(config, n_clients)
    arrays = {"derivative": r.derivatives, "head derivative": r.head_derivatives}
    if r.vector is not None:
        arrays["weight"] = r.vector
    scalars = np.concatenate([values.ravel() for values in arrays.values()])
    if usable(config, r.n_examples, r.seconds, r.loss, scalars, n_clients):
        return None
    if not 1 <= report.n_examples <= most:
        return f"{report.n_examples} examples are not between 1 and {most}"
    if not abs(report.loss) <= config.max_derivative:
        return f"a loss of {report.loss:.3g} is beyond {config.max_derivative:g}"
    if not 0 <= report.seconds < math.inf:
        return f"{report.seconds} seconds are no time"
    for name, values in arrays.items():
        if values.size and not np.isfinite(values).all():
            return f"a {name} is not finite"
        if values.size and (largest := float(np.abs(values).max())) > config.max_derivative:
            return f"a {name} of {largest:.3g} is beyond {config.max_derivative:g}"
    raise AssertionError("a report is refused without a reason")
