"""The settings of a training run, checked when they are made."""

from __future__ import annotations

from dataclasses import dataclass, field

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import METHODS, check, described, setting
from fwdllm.protocol.settings import (
    MAX_ROUNDS,
    EstimatorConfig,
    OptimizerConfig,
    ScheduleConfig,
)

TRAIN_METHODS = (*METHODS, "activation")
# What ``fwdllm.tune`` replaces by the method that suits the model and the device.
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class TrainConfig(EstimatorConfig, OptimizerConfig, ScheduleConfig):
    """Everything a run's numbers depend on besides the model and the data.

    Each field carries its own description, see ``engine.settings.settings_of``. The fields of the
    estimator, the optimizer and the schedule are inherited.
    per_example: every example has directions of its own.  eval_every, checkpoint_every: steps
    between evaluations and between checkpoints, with one more after the last step; 0: never.

    Raises ConfigError on a value that makes no sense.
    """

    steps: int = field(
        kw_only=False, metadata=described("Updates in all.", low=1, high=MAX_ROUNDS - 1)
    )
    method: str = setting(
        AUTO,
        f"{AUTO}, {', '.join(TRAIN_METHODS[:-1])} or {TRAIN_METHODS[-1]}.",
        choices=(AUTO, *TRAIN_METHODS),
        shown="auto: backprop, with llama.cpp readout or central",
    )
    per_example: bool = setting(False, "Directions of its own for each example.")
    max_gradient_norm: float | None = setting(
        None, "Scale a longer gradient down to this L2 norm.", low=0, open="l"
    )
    eval_every: int = setting(
        0,
        "Steps between evaluations; 0: only before and after.",
        low=0,
        high=MAX_ROUNDS - 1,
        shown="a tenth of the steps",
    )
    checkpoint_every: int = setting(50, "Steps between checkpoints.", low=0, high=MAX_ROUNDS - 1)

    def __post_init__(self) -> None:
        check(self)
        if self.method == "activation" and self.per_example:
            raise ConfigError("activation gives every example directions of its own already")
        if self.method == "activation" and self.steps < 3:
            raise ConfigError("activation needs at least 3 steps: head, measuring and training")
        if self.warmup > self.steps:
            raise ConfigError(f"warmup {self.warmup} is longer than the run of {self.steps} steps")
