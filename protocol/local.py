"""The local trainer: a federation of one device, as a generator of events.

Seeds, data order and rates are functions of (config.seed, step) alone, so a run resumed from
a checkpoint of (theta, TrainState) continues to the same bits as an uninterrupted one. No I/O
happens here: the caller prints, saves and stops by consuming the events.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np

from fwdllm.engine.directions import Directions, Sparse
from fwdllm.engine.errors import DataError, NumericsError
from fwdllm.engine.settings import EXACT_METHODS
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.contribution import Contribution, Rejection, accept
from fwdllm.protocol.descent import descend
from fwdllm.protocol.optimizers import OptimizerState
from fwdllm.protocol.phases import ActivationEngine, Phases, activation_step
from fwdllm.protocol.schedule import lr_factor
from fwdllm.protocol.seeds import batch_indices, derive_seeds
from fwdllm.protocol.selection import Selection

if TYPE_CHECKING:
    from fwdllm.engine.data.batch import Batch
    from fwdllm.engine.data.jsonl import Example
    from fwdllm.engine.estimators.activation import Gradient
    from fwdllm.engine.estimators.plan import Probe
    from fwdllm.engine.evaluation import Evaluation


# In the names of a checkpoint's arrays.
_SELECTION = "selection."


class TrainingEngine(ActivationEngine, Protocol):
    """What the trainer needs of an engine; ``fwdllm.engine.Engine`` is one.

    adapter: has theta, float32 [n_lora + n_head], updated in place, and n_lora.
    directions: which direction a seed stands for, see ``fwdllm.engine.directions``.
    """

    @property
    def directions(self) -> Directions: ...

    def encode(self, examples: Sequence[Example], max_tokens: int | None = None) -> Batch: ...

    def evaluate(
        self, examples: Sequence[Example], max_tokens: int | None = None
    ) -> Evaluation: ...

    def directional_derivatives(
        self,
        batch: Batch,
        seeds: np.ndarray,
        method: str = ...,
        epsilon: float = ...,
        *,
        per_example: bool = ...,
    ) -> Probe: ...

    def gradient(self, batch: Batch, method: str = ...) -> Gradient: ...


@dataclass
class TrainState:
    """What a run resumes from, together with theta.

    step: updates completed.  optimizer: the optimizer's running averages.  selection: what of a
    sparse adapter is trained, None of others.
    """

    step: int
    optimizer: OptimizerState
    selection: Selection | None = None

    @staticmethod
    def initial(config: TrainConfig, engine: TrainingEngine) -> TrainState:
        """The state before the first step."""
        optimizer = OptimizerState.initial(config, n_trainable(engine))
        selection = Selection.of(engine.directions, config.steps, config.seed)
        return TrainState(0, optimizer, selection)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps beside theta and the step, as plain arrays."""
        chosen = {} if self.selection is None else self.selection.to_arrays()
        names = {_SELECTION + name: array for name, array in chosen.items()}
        return {**self.optimizer.to_arrays(), **names}

    @staticmethod
    def from_arrays(
        config: TrainConfig, engine: TrainingEngine, step: int, arrays: Mapping[str, np.ndarray]
    ) -> TrainState:
        """The state after ``step`` updates from ``to_arrays``; ValueError if it does not fit."""
        state = TrainState.initial(config, engine)
        chosen = {n.removeprefix(_SELECTION): a for n, a in arrays.items() if _SELECTION in n}
        others = {name: a for name, a in arrays.items() if _SELECTION not in name}
        state.optimizer = OptimizerState.from_arrays(config, n_trainable(engine), others)
        if state.selection is not None:
            state.selection.load_arrays(step, chosen)
        elif chosen:
            raise ValueError("it is of a sparse adapter")
        state.step = step
        return state


@dataclass(frozen=True)
class StepResult:
    """One update.

    derivatives: of the accepted contributions; empty, as there are too many to keep, where every
    example or activation has its own, or none.  lr: the adapter's rate.  gradient_norm: L2 of
    what is trained of the gradient, head included, before it is scaled down.  n_tokens: lane-tokens
    forwarded.
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
    engine: TrainingEngine,
    config: TrainConfig,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    state: TrainState,
) -> Iterator[Event]:
    """Train from ``state`` to ``config.steps``, updating ``state`` and the adapter in place.

    At every event, ``state`` and the adapter are as they are after ``state.step`` complete steps,
    so a caller may save them, or stop, at any event. The held-out set is also evaluated before the
    first step, and again if a run resumes at an evaluation step: checkpoints come before
    evaluations, so the earlier result may not have been written.

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
    engine: TrainingEngine, config: TrainConfig, state: TrainState, examples: Sequence[Example]
) -> StepResult:
    """One update of the adapter: find or estimate the gradient, then descend.

    NumericsError if no contribution is usable or the update is not finite; theta may then hold
    non-finite values and must not be saved.
    """
    chosen = batch_indices(config.seed, state.step, len(examples), config.batch_size)
    seeds = derive_seeds(config.seed, state.step, config.perturbations)
    batch = engine.encode([examples[i] for i in chosen], max_tokens=config.max_tokens)
    if config.method == "activation":
        found = _by_activations(engine, config, state, batch, int(seeds[0]))
    elif config.method in EXACT_METHODS:
        found = _of_gradient(engine, engine.gradient(batch, config.method))
    else:
        found = _by_perturbations(engine, config, state, batch, seeds, len(chosen))
    selection = state.selection
    gradient = found.gradient if selection is None else selection.of_trained(found.gradient)
    norm = _norm(gradient)
    if not math.isfinite(norm):
        raise NumericsError(f"the gradient of step {state.step + 1} is not finite")
    most = config.max_gradient_norm
    if most is not None and norm > most:
        gradient = gradient * np.float32(most / norm)
    lr = _update(engine, config, state, gradient)
    if selection is not None:
        selection.advance(state.step - 1, found.gradient, engine.adapter.theta, state.optimizer)
    return StepResult(
        step=state.step,
        loss=found.loss,
        derivatives=found.derivatives,
        lr=lr,
        gradient_norm=norm,
        n_tokens=found.n_tokens,
        rejected=found.rejected,
    )


@dataclass(frozen=True)
class _Found:
    """A step's estimate. gradient: float32 [n_trainable].  Other fields: as in StepResult."""

    loss: float
    gradient: np.ndarray
    n_tokens: int
    derivatives: tuple[float, ...] = ()
    rejected: tuple[Rejection, ...] = ()


def _by_activations(
    engine: TrainingEngine, config: TrainConfig, state: TrainState, batch: Batch, seed: int
) -> _Found:
    phases = Phases.of(config, engine.adapter.head is not None)
    if state.step == phases.both:  # averages over zero gradients of A: too long first steps
        state.optimizer = TrainState.initial(config, engine).optimizer
    return _of_gradient(engine, activation_step(engine, config, phases, state.step, batch, seed))


def _of_gradient(engine: TrainingEngine, found: Gradient) -> _Found:
    gradient = [engine.directions.project(found.values)]
    if found.head_gradient is not None:
        gradient.append(found.head_gradient)
    return _Found(found.loss, np.concatenate(gradient), found.n_tokens)


def _by_perturbations(
    engine: TrainingEngine,
    config: TrainConfig,
    state: TrainState,
    batch: Batch,
    seeds: np.ndarray,
    n_examples: int,
) -> _Found:
    probe = engine.directional_derivatives(
        batch,
        seeds,
        method=config.method,
        epsilon=config.epsilon,
        per_example=config.per_example,
    )
    share = 1 if config.per_example else n_examples
    accepted, rejected = accept(
        Contribution(int(seed), float(derivative), share, float(probe.loss))
        for seed, derivative in zip(probe.seeds.flat, probe.derivative.flat, strict=True)
    )
    if not accepted:
        raise NumericsError(
            f"step {state.step + 1} has no usable perturbation ({rejected[0].reason}); "
            "lower the learning rate or epsilon, and check the data"
        )
    gradient = forward_gradient(engine, accepted, probe.derivative.size // len(seeds))
    if probe.head_gradient is not None:
        gradient[engine.directions.size :] = probe.head_gradient
    return _Found(
        loss=float(probe.loss),
        gradient=gradient,
        n_tokens=int(probe.n_tokens),
        derivatives=() if config.per_example else tuple(c.derivative for c in accepted),
        rejected=tuple(rejected),
    )


def n_trainable(engine: TrainingEngine) -> int:
    """What the optimizer sees: coordinates of the directions, then the head's parameters."""
    adapter = engine.adapter
    return engine.directions.size + adapter.theta.size - adapter.n_lora


def n_trained(engine: TrainingEngine) -> int:
    """As ``n_trainable``, without coordinates that sparse directions leave alone."""
    directions, n = engine.directions, n_trainable(engine)
    return n - directions.size + directions.n_trained if isinstance(directions, Sparse) else n


def forward_gradient(
    engine: TrainingEngine, contributions: Sequence[Contribution], per_perturbation: int = 1
) -> np.ndarray:
    """mean_k derivative_k z(seed_k) in the coordinates, zero for a head: float32 [n_trainable].

    FwdLLM's estimator (arXiv 2308.13894) in the coordinates of ``engine.directions``: unbiased, as
    E[z z^T] = I for both distributions.  per_perturbation: contributions that together make one
    perturbation: 1, or the number of examples if each has directions of its own.
    """
    directions = engine.directions
    seeds = np.array([c.seed for c in contributions], np.uint64)
    weight = per_perturbation / len(contributions)
    coefficients = np.array([c.derivative for c in contributions]) * weight
    gradient = np.zeros(n_trainable(engine), np.float32)
    gradient[: directions.size] = directions.combine(seeds, coefficients.astype(np.float32))
    return gradient


def _update(
    engine: TrainingEngine, config: TrainConfig, state: TrainState, gradient: np.ndarray
) -> float:
    """Apply the gradient, advance the state and return the adapter's learning rate."""
    factor = lr_factor(state.step, config.steps, config.warmup, config.schedule)
    lr = config.learning_rate * factor
    head_lr = lr if config.head_learning_rate is None else config.head_learning_rate * factor
    descend(engine.adapter, engine.directions, config, state.optimizer, gradient, lr, head_lr)
    if not np.isfinite(engine.adapter.theta).all():
        raise NumericsError(
            f"step {state.step + 1} made adapter weights infinite; lower the learning rate"
        )
    state.step += 1
    return lr


def _evaluate(
    engine: TrainingEngine, config: TrainConfig, held_out: Sequence[Example], step: int
) -> EvalResult:
    result = engine.evaluate(held_out, max_tokens=config.max_tokens)
    return EvalResult(step, float(result.loss), result.n_tokens, result.n_examples, result.accuracy)


def _due(every: int, step: int, steps: int) -> bool:
    return every > 0 and (step % every == 0 or step == steps)


def _norm(vector: np.ndarray) -> float:
    return math.sqrt(float(np.sum(np.square(vector, dtype=np.float64))))
