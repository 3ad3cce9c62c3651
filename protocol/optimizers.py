"""First-order optimizers over one flat float32 vector, with the semantics of torch.optim.

All array operations are elementwise in float32 and correctly rounded (IEEE 754), so an update
gives the same bits on every run. Weight decay is added to the gradient (L2), as in torch's
SGD and Adam; "adamw" shrinks the weights instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fwdllm.protocol.settings import OptimizerConfig


@dataclass
class OptimizerState:
    """step: updates applied.  slots: the running averages by name, float32 [n] each."""

    step: int
    slots: dict[str, np.ndarray]

    @staticmethod
    def initial(config: OptimizerConfig, n: int) -> OptimizerState:
        """The state before the first update of a vector of ``n`` elements."""
        slots = _SLOTS[config.optimizer]
        return OptimizerState(0, {slot: np.zeros(n, np.float32) for slot in slots})

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as plain arrays, fit for ``np.savez``."""
        return {"step": np.array(self.step, np.int64), **self.slots}

    @staticmethod
    def from_arrays(
        config: OptimizerConfig, n: int, arrays: dict[str, np.ndarray]
    ) -> OptimizerState:
        """The inverse of ``to_arrays``; ValueError if the arrays belong to another optimizer."""
        state = OptimizerState.initial(config, n)
        if set(arrays) != {"step", *state.slots}:
            raise ValueError(f"{config.optimizer} has no state of {', '.join(sorted(arrays))}")
        for slot in state.slots:
            if arrays[slot].dtype != np.float32 or arrays[slot].shape != (n,):
                raise ValueError(f"optimizer array {slot} is not float32 [{n}]")
            state.slots[slot] = arrays[slot].copy()
        state.step = int(arrays["step"])
        return state


def apply(
    config: OptimizerConfig,
    state: OptimizerState,
    theta: np.ndarray,
    gradient: np.ndarray,
    learning_rate: float | np.ndarray,
) -> None:
    """One descent step: updates ``theta`` float32 [n] and ``state`` in place.

    gradient: float32 [n], left as it is.  learning_rate: a number, or float32 [n] where parts
    of theta learn at different rates.
    """
    decay = config.weight_decay_in_use
    if decay and config.optimizer == "adamw":
        theta *= 1 - learning_rate * decay
    elif decay:
        gradient = gradient + decay * theta
    state.step += 1
    _RULES[config.optimizer](config, state, theta, gradient, learning_rate)


def sgd(
    config: OptimizerConfig,
    state: OptimizerState,
    theta: np.ndarray,
    gradient: np.ndarray,
    learning_rate: float | np.ndarray,
) -> None:
    """theta -= lr * g."""
    theta -= learning_rate * gradient


def momentum(
    config: OptimizerConfig,
    state: OptimizerState,
    theta: np.ndarray,
    gradient: np.ndarray,
    learning_rate: float | np.ndarray,
) -> None:
    """m = momentum * m + g; theta -= lr * m (torch's SGD, without dampening or Nesterov)."""
    velocity = state.slots["velocity"]
    velocity *= config.momentum
    velocity += gradient
    theta -= learning_rate * velocity


def adam(
    config: OptimizerConfig,
    state: OptimizerState,
    theta: np.ndarray,
    gradient: np.ndarray,
    learning_rate: float | np.ndarray,
) -> None:
    """Kingma & Ba 2015, algorithm 1, with eps added outside the root as torch does."""
    mean, square = state.slots["mean"], state.slots["square"]
    mean *= config.beta1
    mean += (1 - config.beta1) * gradient
    square *= config.beta2
    square += (1 - config.beta2) * gradient * gradient
    denominator = np.sqrt(square)
    denominator /= math.sqrt(1 - config.beta2**state.step)
    denominator += config.eps_in_use
    theta -= learning_rate / (1 - config.beta1**state.step) * mean / denominator


def yogi(
    config: OptimizerConfig,
    state: OptimizerState,
    theta: np.ndarray,
    gradient: np.ndarray,
    learning_rate: float | np.ndarray,
) -> None:
    """FedYogi (Reddi et al. 2021, algorithm 2).

    Unlike adam's, the second moment changes by (1 - beta2) g^2, up or down, whatever its size.

    eps: the paper's tau, the degree of adaptivity; the paper uses 1e-3.
    """
    mean, square = state.slots["mean"], state.slots["square"]
    mean *= config.beta1
    mean += (1 - config.beta1) * gradient
    new = gradient * gradient
    square -= (1 - config.beta2) * new * np.sign(square - new)
    theta -= learning_rate * mean / (np.sqrt(square) + config.eps_in_use)


Rule = Callable[
    [OptimizerConfig, OptimizerState, np.ndarray, np.ndarray, "float | np.ndarray"], None
]
_RULES: dict[str, Rule] = {
    "sgd": sgd,
    "momentum": momentum,
    "adam": adam,
    "adamw": adam,
    "yogi": yogi,
}
_SLOTS: dict[str, tuple[str, ...]] = {
    "sgd": (),
    "momentum": ("velocity",),
    "adam": ("mean", "square"),
    "adamw": ("mean", "square"),
    "yogi": ("mean", "square"),
}
