"""Groups of settings that local runs and federated runs have in common, for them to inherit.

Nothing here is slow to import.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from fwdllm.engine.settings import DEFAULT_EPSILON, METHODS, setting

OPTIMIZERS = ("sgd", "momentum", "adam", "adamw", "yogi")
SCHEDULES = ("linear", "constant")

# Limits from the counter layout of ``protocol.seeds``.
MAX_RUN_SEED = 2**64 - 1
MAX_ROUNDS = 2**32
MAX_INDEX = 2**28

# Optimizers' own defaults: FedYogi's tau (Reddi et al. 2021), torch's weight decay of AdamW.
_EPS = {"yogi": 1e-3}
_WEIGHT_DECAY = {"adamw": 0.01}


_Config = TypeVar("_Config", bound="OptimizerConfig")


@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """How a gradient is estimated."""

    batch_size: int = setting(
        8,
        "Examples of each step; all of them if there are fewer.",
        low=1,
        high=MAX_INDEX,
        shown="8, activation 32",
    )
    perturbations: int = setting(
        8,
        "Random directions of each step.",
        low=1,
        high=MAX_INDEX,
        flags=("--perturbations", "-k"),
        shown="8, activation 62",
    )
    method: str = setting("forward-ad", f"{', '.join(METHODS)}.", choices=METHODS)
    epsilon: float = setting(DEFAULT_EPSILON, "Step length of differences.", low=0, open="l")
    max_tokens: int | None = setting(
        None, "Cut examples to this many tokens.", low=2, high=MAX_INDEX
    )
    literal: bool = setting(
        False, "Take names of special tokens in prompts, completions and texts as text."
    )
    seed: int = setting(0, "Fixes data order and directions.", low=0, high=MAX_RUN_SEED)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How a gradient becomes a step.

    learning_rate: the base rate, which the schedule multiplies.  head_learning_rate: the same for a
    classification head; None: learning_rate.  momentum: for "momentum".  beta1, beta2, eps: for
    "adam", "adamw" and "yogi".  weight_decay: for all.  An eps or weight_decay of None means the
    optimizer's default.
    """

    optimizer: str = setting(
        "adam", f"{', '.join(OPTIMIZERS[:-1])} or {OPTIMIZERS[-1]}.", choices=OPTIMIZERS
    )
    learning_rate: float = setting(
        1e-3,
        "Learning rate.",
        low=0,
        open="l",
        flags=("--lr", "--learning-rate"),
        shown="0.001, readout 0.005, activation 0.01",
    )
    head_learning_rate: float | None = setting(
        None,
        "Learning rate of a classification head.",
        low=0,
        open="l",
        flags=("--head-lr", "--head-learning-rate"),
        shown="as --lr",
    )
    momentum: float = setting(0.9, "Of momentum.", low=0, high=1, open="h")
    beta1: float = setting(0.9, "Decay of adam's mean.", low=0, high=1, open="h")
    beta2: float = setting(0.999, "Decay of adam's square.", low=0, high=1, open="h")
    eps: float | None = setting(
        None, "Added to adam's denominator.", low=0, open="l", shown="1e-8, yogi 1e-3"
    )
    weight_decay: float | None = setting(
        None, "Of adamw; with others L2.", low=0, shown="adamw 0.01, else 0"
    )

    @property
    def eps_in_use(self) -> float:
        """eps, or the optimizer's default."""
        return _EPS.get(self.optimizer, 1e-8) if self.eps is None else self.eps

    @property
    def weight_decay_in_use(self) -> float:
        """weight_decay, or the optimizer's default."""
        own = _WEIGHT_DECAY.get(self.optimizer, 0.0)
        return own if self.weight_decay is None else self.weight_decay

    def recorded(self) -> dict[str, Any]:
        """As JSON values, with defaults filled in, because another version's may differ.

        Without ``literal`` if it is true: older versions did not record it.
        """
        in_use = {"eps": self.eps_in_use, "weight_decay": self.weight_decay_in_use}
        fields = {**dataclasses.asdict(self), **in_use}
        return {name: x for name, x in fields.items() if name != "literal" or not x}

    @classmethod
    def from_recorded(cls: type[_Config], fields: Mapping[str, Any]) -> _Config:
        """The inverse of ``recorded``; TypeError for fields that do not exist."""
        return cls(**{"literal": True, **fields})


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the learning rate changes over a run."""

    warmup: int = setting(0, "Steps of linear warmup.", low=0, high=MAX_ROUNDS - 1)
    schedule: str = setting("linear", "linear (to zero) or constant.", choices=SCHEDULES)
