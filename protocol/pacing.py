"""Variance-controlled pacing (FwdLLM, arXiv 2308.13894, section 3.2).

The perturbations of a round are split into halves; if their mean forward gradients disagree by
more than a threshold, the round asks for more perturbations of the same adapter.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

from fwdllm.protocol.aggregate import Sums
from fwdllm.protocol.federation import FederationConfig


def variance(sums: Sums) -> float | None:
    """The unbiased variance of the two halves' gradients, averaged over coordinates.

    None if the halves cannot be compared, see ``Sums.half_gradients``. FwdLLM averages over one
    layer; this averages over all.
    """
    halves = sums.half_gradients()
    if halves is None:
        return None
    difference = halves[0] - halves[1]
    return float(np.mean(np.square(difference, dtype=np.float64))) / 2


def threshold(config: FederationConfig, first: Sequence[float]) -> float | None:
    """The largest variance at which a round may end, or None during calibration.

    first: for each round so far, the variance after its first part; oldest first.
    """
    if config.variance_threshold is not None:
        return config.variance_threshold
    if len(first) < config.calibration_rounds:
        return None
    return statistics.median(first[: config.calibration_rounds])


def enough(
    config: FederationConfig, part: int, found: float | None, first: Sequence[float]
) -> bool:
    """Whether a round may end after ``part``.

    found: the variance over all parts so far.  first: see ``threshold``.
    """
    if not config.pacing or part + 1 >= config.max_parts:
        return True
    limit = threshold(config, first)
    return limit is None or (found is not None and found <= limit)
