"""The local trainer: a federation of one device, as a generator of events.

Seeds, data order and rates are functions of (config.seed, step) alone, so a run resumed from
a checkpoint of (theta, TrainState) continues to the same bits as an uninterrupted one. No I/O
happens here: the caller prints, saves and stops by consuming the events.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np

from fwdllm.engine.errors import DataError, NumericsError
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.contribution import Contribution, Rejection, accept
from fwdllm.protocol.optimizers import OptimizerState, apply
from fwdllm.protocol.schedule import lr_factor
from fwdllm.protocol.seeds import batch_indices, derive_seeds


class ForwardEngine(Protocol):
    """What the trainer needs of an engine; ``fwdllm.engine.Engine`` is one.

    adapter.theta: float32 [n_lora + n_head], updated in place; adapter.n_lora.
    ops: a kernel backend.
    """

    @property
    def adapter(self) -> Any: ...

    @property
    def ops(self) -> Any: ...

    def encode(self, examples: Any, max_tokens: int | None = None) -> Any: ...

    def evaluate(self, examples: Any, max_tokens: int | None = None) -> Any: ...

    def directional_derivatives(
        self,
        batch: Any,
        seeds: np.ndarray,
        method: str = ...,
        epsilon: float = ...,
        distribution: str = ...,
    ) -> Any: ...


@dataclass
class TrainState:
    """step: updates completed.  optimizer: its averages. With theta, all a run resumes from."""

    step: int
    optimizer: OptimizerState

    @staticmethod
    def initial(config: TrainConfig, n: int) -> TrainState:
        """The state before the first step of a theta of ``n`` elements."""
        return TrainState(0, OptimizerState.initial(config.optimizer_config(), n))


@dataclass(frozen=True)
class StepResult:
    """One update. step: completed ones, this included.  loss: of the batch before it, in nats.

    derivatives: of the accepted contributions.  lr: the adapter's rate.  gradient_norm: L2 of
    the forward gradient, head included.  n_tokens: lane-tokens forwarded.
    """

    step: int
    loss: float
    derivatives: tuple[float, ...]
    lr: float
    gradient_norm: float
    n_tokens: int
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True)
class EvalResult:
    """The held-out loss in nats after ``step`` updates; accuracy where examples have labels."""

    step: int
    loss: float
    n_tokens: int
    n_examples: int
    accuracy: float | None


@dataclass(frozen=True)
class CheckpointDue:
    """The state after ``step`` updates should be saved now."""

    step: int


Event: TypeAlias = StepResult | EvalResult | CheckpointDue


def train(
    engine: ForwardEngine,
    config: TrainConfig,
    examples: Sequence[Any],
    held_out: Sequence[Any],
    state: TrainState,
) -> Iterator[Event]:
    """Train from ``state`` to ``config.steps``, updating ``state`` and the adapter in place.

    At every event ``state`` and the adapter are those after ``state.step`` whole steps, so a
    caller may save them, or stop for good, at any of them. The held-out set is evaluated
    before the first step too, and again where a run resumes on an evaluation step: checkpoints
    come before evaluations, so the earlier result may not have been written.

    DataError without examples; NumericsError as ``train_step``.
    """
    if not examples:
        raise DataError("there are no training examples")
    start = state.step
    while True:
        if state.step > start and _due(config.checkpoint_every, state.step, config.steps):
            yield CheckpointDue(state.step)
        if held_out and _due(config.eval_every, state.step, config.steps):
            yield _evaluate(engine, config, held_out, state.step)
        if state.step >= config.steps:
            return
        yield train_step(engine, config, state, examples)


def train_step(
    engine: ForwardEngine, config: TrainConfig, state: TrainState, examples: Sequence[Any]
) -> StepResult:
    """One update of the adapter: estimate the gradient with forward passes, then descend.

    NumericsError if no contribution is usable or the update is not finite; theta may then be
    spoilt and must not be saved.
    """
    chosen = batch_indices(config.seed, state.step, len(examples), config.batch_size)
    seeds = derive_seeds(config.seed, state.step, config.perturbations)
    batch = engine.encode([examples[i] for i in chosen], max_tokens=config.max_tokens)
    probe = engine.directional_derivatives(
        batch,
        seeds,
        method=config.method,
        epsilon=config.epsilon,
        distribution=config.distribution,
    )
    accepted, rejected = accept(
        Contribution(int(seed), float(derivative), len(chosen), float(probe.loss))
        for seed, derivative in zip(seeds, probe.derivative, strict=True)
    )
    if not accepted:
        raise NumericsError(
            f"step {state.step + 1} has no usable perturbation ({rejected[0].reason}); "
            "lower the learning rate or epsilon, and check the data"
        )
    gradient = forward_gradient(engine, accepted, config.distribution)
    if probe.head_gradient is not None:
        gradient[engine.adapter.n_lora :] = probe.head_gradient
    norm = _norm(gradient)
    if not math.isfinite(norm):
        raise NumericsError(f"the gradient of step {state.step + 1} is not finite")
    lr = _update(engine, config, state, gradient)
    return StepResult(
        step=state.step,
        loss=float(probe.loss),
        derivatives=tuple(c.derivative for c in accepted),
        lr=lr,
        gradient_norm=norm,
        n_tokens=int(probe.n_tokens),
        rejected=tuple(rejected),
    )


def forward_gradient(
    engine: ForwardEngine, contributions: Sequence[Contribution], distribution: str
) -> np.ndarray:
    """mean_k derivative_k v(seed_k) over the adapter, zero over a head: float32, like theta.

    FwdLLM's estimator (arXiv 2308.13894): unbiased, as E[v v^T] = I for both distributions.
    """
    gradient = np.zeros(engine.adapter.theta.size, np.float32)
    seeds = np.array([c.seed for c in contributions], np.uint64)
    coefficients = np.array([c.derivative for c in contributions]) / len(contributions)
    engine.ops.seeded_axpy(
        gradient[: engine.adapter.n_lora],
        seeds,
        coefficients.astype(np.float32),
        distribution=distribution,
    )
    return gradient


def _update(
    engine: ForwardEngine, config: TrainConfig, state: TrainState, gradient: np.ndarray
) -> float:
    """Apply the gradient, advance the state and give the adapter's learning rate."""
    theta, n_lora = engine.adapter.theta, engine.adapter.n_lora
    optimizer = config.optimizer_config()
    factor = lr_factor(state.step, config.steps, config.warmup, config.schedule)
    lr = optimizer.learning_rate * factor
    rates: float | np.ndarray = lr
    if config.head_learning_rate is not None and theta.size > n_lora:
        rates = np.full(theta.size, lr, np.float32)
        rates[n_lora:] = config.head_learning_rate * factor
    apply(optimizer, state.optimizer, theta, gradient, rates)
    if not np.isfinite(theta).all():
        raise NumericsError(
            f"step {state.step + 1} made adapter weights infinite; lower the learning rate"
        )
    state.step += 1
    return lr


def _evaluate(
    engine: ForwardEngine, config: TrainConfig, held_out: Sequence[Any], step: int
) -> EvalResult:
    result = engine.evaluate(held_out, max_tokens=config.max_tokens)
    return EvalResult(step, float(result.loss), result.n_tokens, result.n_examples, result.accuracy)


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _norm(vector: np.ndarray) -> float:
    return math.sqrt(float(np.sum(np.square(vector, dtype=np.float64))))
