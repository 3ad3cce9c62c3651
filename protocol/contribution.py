"""What a client reports about one perturbation, and which reports are usable."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Contribution:
    """One directional derivative of the mean loss over a client's batch.

    seed: names the direction.  derivative: grad(L) . v(seed), nats per unit of v.
    n_examples: examples in the batch.  loss: mean loss of the batch in nats.
    """

    seed: int
    derivative: float
    n_examples: int
    loss: float


@dataclass(frozen=True)
class Rejection:
    """A contribution left out of the update, and why, in a few words."""

    contribution: Contribution
    reason: str


def accept(
    contributions: Iterable[Contribution],
) -> tuple[list[Contribution], list[Rejection]]:
    """Split contributions into usable and rejected ones; both keep the order."""
    accepted: list[Contribution] = []
    rejected: list[Rejection] = []
    for contribution in contributions:
        reason = _fault(contribution)
        if reason is None:
            accepted.append(contribution)
        else:
            rejected.append(Rejection(contribution, reason))
    return accepted, rejected


# The update multiplies directions by float32 coefficients: beyond this they become infinite.
_FLOAT32_MAX = 3.4028234663852886e38


def _fault(contribution: Contribution) -> str | None:
    if not math.isfinite(contribution.loss):
        return f"loss is {contribution.loss}"
    if not math.isfinite(contribution.derivative):
        return f"derivative is {contribution.derivative}"
    if abs(contribution.derivative) > _FLOAT32_MAX:
        return f"derivative {contribution.derivative:g} does not fit float32"
    if contribution.n_examples < 1:
        return f"batch of {contribution.n_examples} examples"
    return None
