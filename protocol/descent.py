"""One step of an optimizer on an adapter, in the coordinates of directions."""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions import Directions
from fwdllm.protocol.optimizers import OptimizerState, apply
from fwdllm.protocol.settings import OptimizerConfig


def descend(
    adapter: Adapter,
    directions: Directions,
    config: OptimizerConfig,
    state: OptimizerState,
    gradient: np.ndarray,
    lr: float,
    head_lr: float,
) -> None:
    """Move ``adapter.theta`` against ``gradient`` and advance ``state``, both in place.

    gradient: float32 [directions.size + n_head], by the directions' coordinates first, then by the
    head's parameters.  lr, head_lr: learning rates of the coordinates and of the head.
    """
    theta, n_lora = adapter.theta, adapter.n_lora
    rates: float | np.ndarray = lr
    if head_lr != lr:
        rates = np.full(gradient.size, lr, np.float32)
        rates[directions.size :] = head_lr
    before = np.concatenate([directions.project(theta[:n_lora]), theta[n_lora:]])
    after = before.copy()
    apply(config, state, after, gradient, rates)
    theta[:n_lora] += directions.expand((after - before)[: directions.size])
    theta[n_lora:] = after[directions.size :]
