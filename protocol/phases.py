"""When a run by activation perturbation does what: head first, then B, then A.

B says which way a layer's outputs should move. What is good for the loss shows only under a head
that has learned something, so a head learns alone first. Then B is measured, as a mean over steps
that change nothing but the head; theta carries it, so a checkpoint of theta is all there is to
resume. For the rest of the run B stays and A learns, from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fwdllm.engine.estimators.activation import Gradient, scaled
from fwdllm.protocol.config import TrainConfig

if TYPE_CHECKING:
    from fwdllm.engine.data.batch import Batch

# Shares of a run; of 600 steps on SST-2, 30 and 30 were enough (docs/estimators.md).
_HEAD_SHARE = _MEASURE_SHARE = 0.05


class ActivationEngine(Protocol):
    """What these steps need of an engine; see ``fwdllm.engine.Engine``.

    adapter: an ``Adapter``, which an ``Engine`` need not have.
    """

    @property
    def adapter(self) -> Any: ...

    def head_step(self, batch: Batch) -> Gradient: ...

    def output_sensitivity(self, batch: Batch, seed: int, n_tangents: int) -> Gradient: ...

    def activation_gradient(self, batch: Batch, seed: int, n_tangents: int) -> Gradient: ...


@dataclass(frozen=True)
class Phases:
    """head, measure: steps of the first two phases."""

    head: int
    measure: int

    @property
    def both(self) -> int:
        """Steps before A learns."""
        return self.head + self.measure

    @staticmethod
    def of(config: TrainConfig, has_head: bool) -> Phases:
        """The phases of a run."""
        head = max(1, round(_HEAD_SHARE * config.steps)) if has_head else 0
        return Phases(head, max(1, round(_MEASURE_SHARE * config.steps)))


def activation_step(
    engine: ActivationEngine,
    config: TrainConfig,
    phases: Phases,
    step: int,
    batch: Batch,
    seed: int,
) -> Gradient:
    """The gradient of the step after ``step`` whole ones; those of the second phase write B.

    Values are zero until A learns.
    """
    adapter = engine.adapter
    measured = step - phases.head
    if measured < 0:
        return engine.head_step(batch)
    if measured >= phases.measure:
        return engine.activation_gradient(batch, seed, config.perturbations)
    found = engine.output_sensitivity(batch, seed, config.perturbations)
    mean = adapter.theta[: adapter.n_lora]
    mean += (found.values - mean) / np.float32(measured + 1)
    if measured + 1 == phases.measure:
        mean[:] = scaled(adapter, mean)
    return Gradient(found.loss, np.zeros_like(mean), found.head_gradient, found.n_tokens)
