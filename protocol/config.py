"""The settings of a training run, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.estimators.plan import DEFAULT_EPSILON, METHODS
from fwdllm.protocol.optimizers import OPTIMIZERS, OptimizerConfig
from fwdllm.protocol.schedule import SCHEDULES
from fwdllm.protocol.seeds import MAX_INDEX, MAX_ROUNDS, MAX_RUN_SEED

TRAIN_METHODS = (*METHODS, "activation")


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run's numbers depend on besides the model and the data.

    steps: updates in all.  batch_size: examples per step (all of them if there are fewer).
    perturbations: K, random directions per step.  method: the estimator, one of
    ``fwdllm.engine.estimators.plan.METHODS`` or "activation"
    (``fwdllm.engine.estimators.activation``).
    epsilon: its step length along a direction.  per_example: every example has K directions of its
    own.
    max_tokens: examples are cut to this many; None leaves it to the engine.
    optimizer: "sgd", "momentum" or "adam", with its momentum, beta1, beta2, eps, weight_decay.
    learning_rate: base rate.  head_learning_rate: of a classification head; None is the same.
    warmup: steps of linear warmup.  schedule: "linear" (to zero) or "constant" after it.
    seed: fixes data order and directions.
    eval_every, checkpoint_every: steps between them, and after the last step; 0 is never.

    Raises ConfigError on a value that makes no sense.
    """

    steps: int
    batch_size: int = 8
    perturbations: int = 8
    method: str = "forward-ad"
    epsilon: float = DEFAULT_EPSILON
    per_example: bool = False
    max_tokens: int | None = None
    optimizer: str = "adam"
    learning_rate: float = 1e-3
    head_learning_rate: float | None = None
    momentum: float = 0.9
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: int = 0
    schedule: str = "linear"
    seed: int = 0
    eval_every: int = 0
    checkpoint_every: int = 50

    def __post_init__(self) -> None:
        self._check_integers()
        self._check_numbers()
        if not isinstance(self.per_example, bool):
            raise ConfigError(f"per_example must be true or false, not {self.per_example!r}")
        for name, choices in _CHOICES.items():
            _check_choice(name, getattr(self, name), choices)
        if self.method == "activation" and self.per_example:
            raise ConfigError("activation gives every example directions of its own already")
        if self.method == "activation" and self.steps < 3:
            raise ConfigError("activation needs at least 3 steps: head, measuring and training")
        if self.warmup > self.steps:
            raise ConfigError(f"warmup {self.warmup} is longer than the run of {self.steps} steps")

    def _check_integers(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            value = getattr(self, name)
            if name == "max_tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise ConfigError(
                    f"{name} must be a whole number from {low} to {high}, not {value!r}"
                )

    def _check_numbers(self) -> None:
        for name in ("learning_rate", "head_learning_rate", "epsilon", "eps"):
            value = getattr(self, name)
            if name == "head_learning_rate" and value is None:
                continue
            if not _is_number(value) or value <= 0:
                raise ConfigError(f"{name} must be a number above 0, not {value!r}")
        for name in ("momentum", "beta1", "beta2"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < 1:
                raise ConfigError(f"{name} must be a number from 0 to below 1, not {value!r}")
        if not _is_number(self.weight_decay) or self.weight_decay < 0:
            raise ConfigError(
                f"weight_decay must be 0 or a number above, not {self.weight_decay!r}"
            )

    def optimizer_config(self) -> OptimizerConfig:
        """The optimizer's share of the settings."""
        return OptimizerConfig(
            name=self.optimizer,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )


_CHOICES: dict[str, Sequence[str]] = {
    "method": TRAIN_METHODS,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}

# Upper bounds are those of the counter layout of protocol.seeds.
_INTEGERS: dict[str, tuple[int, int]] = {
    "steps": (1, MAX_ROUNDS - 1),
    "batch_size": (1, MAX_INDEX),
    "perturbations": (1, MAX_INDEX),
    "max_tokens": (2, MAX_INDEX),
    "warmup": (0, MAX_ROUNDS - 1),
    "seed": (0, MAX_RUN_SEED),
    "eval_every": (0, MAX_ROUNDS - 1),
    "checkpoint_every": (0, MAX_ROUNDS - 1),
}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
