"""The settings of a federated run, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.estimators.plan import DEFAULT_EPSILON, METHODS
from fwdllm.protocol.optimizers import OPTIMIZERS, OptimizerConfig
from fwdllm.protocol.schedule import SCHEDULES
from fwdllm.protocol.seeds import MAX_INDEX, MAX_ROUNDS, MAX_RUN_SEED

SEEDS = ("own", "shared", "pool")
UPLOADS = ("scalars", "steps", "weights")
AGGREGATES = ("mean", "trimmed", "median")
# The server has no weights of the model, so what needs them or data is left out.
FEDERATED_DIRECTIONS = ("normal", "rademacher", "lora-fa", "subzero")

MAX_PARTS = 64
MAX_CLIENTS = 1 << 22


@dataclass(frozen=True)
class FederationConfig:
    """Everything a run's numbers depend on besides the model, the clients and their data.

    rounds: updates in all.  per_round: clients asked in a part of a round.
    upload: what a client sends: "scalars", directional derivatives at the server's own adapter;
    "steps", those met on local_steps of SGD at client_learning_rate, which the server can follow;
    "weights", how far local_steps of client_optimizer moved its share of the adapter.
    seeds: "own", every client has directions of its own; "shared", all have the same; "pool", each
    local step draws from pool_size seeds fixed for the run (FedKSeed).
    perturbations: directions of a batch.  head_perturbations: of a classification head, which
    cost no forward pass as its gradient is exact.  batch_size: examples of a batch, all of a
    client's if it has fewer.  max_tokens: examples are cut to this many.
    method, epsilon: the estimator.  directions, dimension: see ``DirectionsConfig``.
    split: every client perturbs its share of the layers, and together they cover all (Spry).
    aggregate: "mean", or by coordinate "trimmed" (without the trim share at either end) or
    "median"; these two want shared seeds or weights.  weighted: clients count by their examples.
    pacing: ask for more perturbations of the same adapter, in at most max_parts parts, until the
    variance is at most variance_threshold; None is the median of the first calibration_rounds.
    candidates: of so many seeds the one along the last gradient is kept; 1 keeps all.
    clip, sigma, delta: differential privacy of a client (DPZero); clip bounds the L2 norm of its
    scalars, and their sum gets noise of deviation sigma * clip. sigma of 0 is none.
    optimizer, learning_rate, head_learning_rate, momentum, beta1, beta2, eps, weight_decay,
    warmup, schedule: the server's.
    max_derivative: a scalar beyond it is refused.  quorum: the share of those asked that a part
    needs to close at its deadline, in seconds.  eval_every, snapshot_every: rounds between them.
    seed: fixes clients, batches and directions.

    Raises ConfigError on a value that makes no sense.
    """

    rounds: int
    per_round: int = 10
    upload: str = "scalars"
    seeds: str = "own"
    pool_size: int = 4096
    perturbations: int = 8
    head_perturbations: int = 64
    batch_size: int = 8
    max_tokens: int | None = None
    method: str = "forward-ad"
    epsilon: float = DEFAULT_EPSILON
    directions: str = "normal"
    dimension: int = 8
    split: bool = False
    local_steps: int = 1
    client_optimizer: str = "sgd"
    client_learning_rate: float = 1e-3
    aggregate: str = "mean"
    trim: float = 0.1
    weighted: bool = True
    pacing: bool = False
    variance_threshold: float | None = None
    calibration_rounds: int = 20
    max_parts: int = 5
    candidates: int = 1
    clip: float = 1.0
    sigma: float = 0.0
    delta: float = 1e-5
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
    max_derivative: float = 1e4
    quorum: float = 0.5
    deadline: float = 600.0
    eval_every: int = 10
    snapshot_every: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (low, high) in _INTEGERS.items():
            self._check_integer(name, low, high)
        for name, (low_number, high_number, open_at) in _NUMBERS.items():
            self._check_number(name, low_number, high_number, open_at)
        for name in ("split", "weighted", "pacing"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be true or false, not {getattr(self, name)!r}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ConfigError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        for wrong, sentence in self._contradictions():
            if wrong:
                raise ConfigError(sentence)

    def _contradictions(self) -> list[tuple[bool, str]]:
        scalars, local = self.upload == "scalars", self.upload in ("steps", "weights")
        robust, private = self.aggregate != "mean", self.sigma > 0
        return [
            (
                scalars and self.local_steps != 1,
                "a client that uploads scalars makes one local step",
            ),
            (
                self.upload == "steps" and self.client_optimizer != "sgd",
                "the server can follow local steps of sgd alone; upload weights for "
                f"{self.client_optimizer}",
            ),
            (self.seeds == "pool" and not local, "a pool of seeds is for local steps"),
            (
                robust and not (self.upload == "weights" or (scalars and self.seeds == "shared")),
                f"{self.aggregate} compares clients, so it needs shared seeds or weights",
            ),
            (
                self.split and self.directions not in ("normal", "rademacher"),
                f"layers cannot be split among clients with directions {self.directions}",
            ),
            (
                self.pacing and not (scalars or self.upload == "steps"),
                "pacing compares scalars, which clients that upload weights do not send",
            ),
            (
                self.pacing and self.seeds == "shared" and self.perturbations < 2,
                "pacing compares two halves of the perturbations, so it needs two of them",
            ),
            (
                self.pacing and self.seeds == "shared" and local,
                "pacing cannot tell the halves of local steps along shared seeds apart",
            ),
            (
                self.candidates > 1 and self.seeds != "own",
                "seeds are chosen among candidates where clients have their own",
            ),
            (
                private and not (scalars and self.seeds == "shared" and not robust),
                "differential privacy adds clients' scalars, so it needs shared seeds and the mean",
            ),
            (private and self.weighted, "differential privacy counts all clients alike"),
            (private and self.split, "differential privacy needs clients with the same scope"),
            (
                private and self.pacing,
                "differential privacy fixes the number of releases, which pacing does not",
            ),
            (
                self.warmup > self.rounds,
                f"warmup {self.warmup} is longer than the run of {self.rounds} rounds",
            ),
        ]

    def _check_integer(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if name == "max_tokens" and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")

    def _check_number(self, name: str, low: float, high: float, open_at: str) -> None:
        value = getattr(self, name)
        if name in ("variance_threshold", "head_learning_rate") and value is None:
            return
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        inside = is_number and low <= value <= high and abs(value) < _LARGEST
        at_border = ("l" in open_at and value == low) or ("h" in open_at and value == high)
        if not inside or at_border:
            above = "above" if "l" in open_at else "at least"
            below = "" if high == math.inf else f" and {'below' if 'h' in open_at else 'at most'} "
            limit = "" if high == math.inf else f"{high:g}"
            raise ConfigError(f"{name} must be a number {above} {low:g}{below}{limit}")

    def optimizer_config(self) -> OptimizerConfig:
        """The server's optimizer."""
        return OptimizerConfig(
            name=self.optimizer,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.eps,
            weight_decay=self.weight_decay,
        )

    def client_optimizer_config(self) -> OptimizerConfig:
        """The clients' optimizer, for local steps; with the field's own usual constants."""
        return OptimizerConfig(self.client_optimizer, self.client_learning_rate)


_CHOICES: dict[str, Sequence[str]] = {
    "upload": UPLOADS,
    "seeds": SEEDS,
    "method": METHODS,
    "directions": FEDERATED_DIRECTIONS,
    "client_optimizer": OPTIMIZERS,
    "aggregate": AGGREGATES,
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
}

_INTEGERS: dict[str, tuple[int, int]] = {
    "rounds": (1, MAX_ROUNDS - 1),
    "per_round": (1, MAX_CLIENTS),
    "pool_size": (1, MAX_INDEX),
    "perturbations": (1, 4096),
    "head_perturbations": (1, (1 << 16) - 1),
    "batch_size": (1, MAX_INDEX),
    "max_tokens": (2, MAX_INDEX),
    "dimension": (1, MAX_INDEX),
    "local_steps": (1, 4096),
    "calibration_rounds": (1, MAX_ROUNDS - 1),
    "max_parts": (1, MAX_PARTS),
    "candidates": (1, 1000),
    "warmup": (0, MAX_ROUNDS - 1),
    "eval_every": (0, MAX_ROUNDS - 1),
    "snapshot_every": (1, MAX_ROUNDS - 1),
    "seed": (0, MAX_RUN_SEED),
}

# Beyond all floats.
_LARGEST = 2**1024

# Low, high, and which of the two are themselves outside.
_NUMBERS: dict[str, tuple[float, float, str]] = {
    "epsilon": (0, math.inf, "l"),
    "client_learning_rate": (0, math.inf, "l"),
    "trim": (0, 0.5, "h"),
    "variance_threshold": (0, math.inf, "l"),
    "clip": (0, math.inf, "l"),
    "sigma": (0, math.inf, ""),
    "delta": (0, 1, "lh"),
    "learning_rate": (0, math.inf, "l"),
    "head_learning_rate": (0, math.inf, "l"),
    "momentum": (0, 1, "h"),
    "beta1": (0, 1, "h"),
    "beta2": (0, 1, "h"),
    "eps": (0, math.inf, "l"),
    "weight_decay": (0, math.inf, ""),
    "max_derivative": (0, 3e38, "l"),
    "quorum": (0, 1, "l"),
    "deadline": (0, math.inf, "l"),
}
