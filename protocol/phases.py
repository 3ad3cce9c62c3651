"""The phases of a run with activation perturbation: first the head, then B, then A.

B sets the directions in which a layer's outputs can move. Which directions lower the loss can be
seen only with a head that has learned something, so a head is trained alone first. Then B is
measured: an average of estimates over steps that train only the head. B is stored in theta, so a
checkpoint needs nothing else. For the rest of the run B is frozen and A is trained, from zero.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from fwdllm.engine.estimators.activation import Gradient, scaled
from fwdllm.protocol.config import TrainConfig

if TYPE_CHECKING:
    from fwdllm.engine.data.batch import Batch

# Shares of a run's steps; on SST-2, 30 and 30 of 600 were enough (docs/estimators.md).
_HEAD_SHARE = _MEASURE_SHARE = 0.05


class ActivationEngine(Protocol):
    """What these steps need from an engine; see ``fwdllm.engine.Engine``.

    adapter: an ``Adapter``; must not be None, although an ``Engine``'s may be.
    """

    @property
    def adapter(self) -> Any: ...

    def head_step(self, batch: Batch) -> Gradient: ...

    def output_sensitivity(self, batch: Batch, seed: int, n_tangents: int) -> Gradient: ...

    def activation_gradient(self, batch: Batch, seed: int, n_tangents: int) -> Gradient: ...


@dataclass(frozen=True)
class Phases:
    """Lengths of the first two phases. head, measure: numbers of steps."""

    head: int
    measure: int

    @property
    def both(self) -> int:
        """Number of steps before A is trained."""
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
    """The gradient of one step. step: steps completed before it.

    In the second phase this also writes B into theta. ``Gradient.values`` is zero until the third
    phase, in which A is trained.
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
