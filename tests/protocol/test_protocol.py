"""Seeds, data order, contributions, schedule, settings and the local trainer."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_engine import N_HEAD, N_LORA, Probe, ToyDirections, ToyEngine, make_examples

from fwdllm.engine.errors import ConfigError, DataError, NumericsError
from fwdllm.kernels import reference
from fwdllm.protocol import seeds as seeds_module
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.contribution import Contribution, accept
from fwdllm.protocol.local import (
    CheckpointDue,
    EvalResult,
    StepResult,
    TrainState,
    forward_gradient,
    train,
    train_step,
)
from fwdllm.protocol.schedule import lr_factor
from fwdllm.protocol.seeds import MAX_INDEX, MAX_ROUNDS, MAX_RUN_SEED, batch_indices, derive_seeds

SGD = TrainConfig(
    steps=10,
    method="forward-ad",
    batch_size=4,
    perturbations=5,
    optimizer="sgd",
    learning_rate=0.1,
    schedule="constant",
)


# Seeds


def test_seeds_are_the_documented_philox_words() -> None:
    words = reference.philox(5, 3 << 28, 4).astype(object)
    expected = [int(w[0]) + int(w[1]) * 2**32 for w in words]
    seeds = derive_seeds(5, 3, 4)
    assert seeds.dtype == np.uint64
    assert [int(s) for s in seeds] == expected


def test_seeds_do_not_change_between_versions() -> None:
    # A change would make old runs resume to other numbers.
    assert [hex(s) for s in derive_seeds(1, 2, 2)] == ["0x7d893231de42d781", "0xce7daebbaff212b4"]
    assert batch_indices(1, 2, 10, 4).tolist() == [0, 5, 5, 3]


def test_longer_draws_extend_shorter_ones() -> None:
    assert np.array_equal(derive_seeds(5, 3, 9)[:4], derive_seeds(5, 3, 4))


def test_seeds_of_rounds_and_runs_are_distinct() -> None:
    drawn = [derive_seeds(run, r, 1000) for run in (0, 1, MAX_RUN_SEED) for r in range(50)]
    assert len(np.unique(np.concatenate(drawn))) == 3 * 50 * 1000


def test_no_two_draws_share_a_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = []

    def record(seed: int, start: int, count: int) -> np.ndarray:
        starts.append(start)
        return np.zeros((count, 4), np.uint32)

    monkeypatch.setattr(seeds_module, "philox", record)
    for step in (0, 1, 2, MAX_ROUNDS - 1):
        derive_seeds(0, step, 1)
        batch_indices(0, step, 1, 1)
    assert np.diff(sorted(starts)).min() >= MAX_INDEX
    assert max(starts) + MAX_INDEX < 2**63


@pytest.mark.parametrize(
    ("run_seed", "round", "count"),
    [(-1, 0, 1), (2**64, 0, 1), (0, -1, 1), (0, MAX_ROUNDS, 1), (0, 0, -1), (0, 0, MAX_INDEX + 1)],
)
def test_seeds_outside_the_counter_are_refused(run_seed: int, round: int, count: int) -> None:
    with pytest.raises(ValueError, match="no seeds"):
        derive_seeds(run_seed, round, count)


# Data order


@settings(max_examples=40, deadline=None)
@given(st.integers(0, MAX_RUN_SEED), st.integers(1, 12), st.integers(1, 15), st.integers(0, 9))
def test_every_epoch_is_a_permutation(run: int, n: int, batch_size: int, epoch: int) -> None:
    size = min(n, batch_size)
    last_step = (n * (epoch + 1) - 1) // size
    stream = np.concatenate([batch_indices(run, s, n, batch_size) for s in range(last_step + 1)])
    assert sorted(stream[n * epoch : n * (epoch + 1)]) == list(range(n))
    assert len(stream) == size * (last_step + 1)


def test_epochs_and_run_seeds_shuffle_differently() -> None:
    orders = {tuple(batch_indices(run, step, 50, 50)) for run in (0, 1) for step in range(5)}
    assert len(orders) == 10
    assert tuple(range(50)) not in orders


@pytest.mark.parametrize(("step", "n", "batch_size"), [(-1, 5, 2), (0, 0, 2), (0, 5, 0)])
def test_impossible_batches_are_refused(step: int, n: int, batch_size: int) -> None:
    with pytest.raises(ValueError, match="no batch"):
        batch_indices(0, step, n, batch_size)


# Contributions


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (Contribution(1, math.nan, 4, 1.0), "derivative is nan"),
        (Contribution(1, -math.inf, 4, 1.0), "derivative is -inf"),
        (Contribution(1, 1e39, 4, 1.0), "float32"),
        (Contribution(1, 0.5, 4, math.inf), "loss is inf"),
        (Contribution(1, 0.5, 0, 1.0), "0 examples"),
    ],
)
def test_unusable_contributions_are_rejected_with_a_reason(bad: Contribution, reason: str) -> None:
    good = [Contribution(2, 0.0, 4, 1.0), Contribution(3, -3e38, 1, 0.0)]
    accepted, rejected = accept([good[0], bad, good[1]])
    assert accepted == good
    assert [r.contribution for r in rejected] == [bad]
    assert reason in rejected[0].reason


# Schedule


def test_linear_schedule() -> None:
    factors = [lr_factor(step, 7, 3) for step in range(7)]
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, 1, 3 / 4, 2 / 4, 1 / 4])


def test_constant_schedule_keeps_its_warmup() -> None:
    assert [lr_factor(s, 5, 2, "constant") for s in range(5)] == [0.5, 1, 1, 1, 1]


def test_warmup_may_fill_the_run_or_be_absent() -> None:
    assert [lr_factor(s, 2, 2) for s in range(2)] == [0.5, 1]
    assert [lr_factor(s, 2, 0) for s in range(2)] == [1, 0.5]


def test_unknown_schedule() -> None:
    with pytest.raises(ValueError, match="cosine"):
        lr_factor(0, 1, 0, "cosine")


# Settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 1.0),
        ("steps", MAX_ROUNDS),
        ("batch_size", 0),
        ("perturbations", True),
        ("perturbations", "8"),
        ("method", "forward"),
        ("epsilon", 0.0),
        ("epsilon", math.nan),
        ("per_example", 1),
        ("max_tokens", 1),
        ("optimizer", "adagrad"),
        ("learning_rate", -1e-3),
        ("learning_rate", math.inf),
        ("head_learning_rate", 0),
        ("momentum", 1.0),
        ("beta1", -0.1),
        ("beta2", 1.0),
        ("eps", "1e-8"),
        ("weight_decay", -1.0),
        ("warmup", 11),
        ("warmup", -1),
        ("schedule", ["linear"]),
        ("seed", -1),
        ("seed", 2**64),
        ("eval_every", -1),
        ("checkpoint_every", None),
    ],
)
def test_senseless_settings_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        replace(SGD, **{name: value})


def test_settings_at_their_limits_are_accepted() -> None:
    replace(SGD, warmup=10, seed=MAX_RUN_SEED, head_learning_rate=None, momentum=0, weight_decay=0)


# One step


def start(engine: ToyEngine, config: TrainConfig) -> TrainState:
    return TrainState.initial(config, engine)


@pytest.mark.parametrize("distribution", ["normal", "rademacher"])
def test_step_descends_along_the_mean_forward_gradient(distribution: str) -> None:
    engine, config = ToyEngine(), replace(SGD, method="central")
    engine.directions = ToyDirections(distribution)
    before, examples = engine.adapter.theta.copy(), make_examples(10)
    batch = [examples[i] for i in batch_indices(config.seed, 0, 10, 4)]
    slope = engine.gradient(batch).astype(np.float64)
    directions = [
        getattr(reference, distribution)(int(seed), 0, N_LORA).astype(np.float64)
        for seed in derive_seeds(config.seed, 0, 5)
    ]
    gradient = sum((slope @ v) * v for v in directions) / 5

    result = train_step(engine, config, start(engine, config), examples)

    np.testing.assert_allclose(engine.adapter.theta, before - 0.1 * gradient, rtol=0, atol=1e-5)
    assert result.derivatives == pytest.approx([slope @ v for v in directions], abs=1e-5)
    assert result.gradient_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-5)
    assert (result.step, result.lr, result.n_tokens, result.rejected) == (1, 0.1, 24, ())


def test_many_perturbations_give_the_gradient() -> None:
    engine, batch = ToyEngine(), make_examples(10)
    seeds = derive_seeds(0, 0, 2000)
    derivative = engine.directional_derivatives(batch, seeds).derivative
    pairs = zip(seeds, derivative, strict=True)
    contributions = [Contribution(int(s), float(d), 10, 1.0) for s, d in pairs]
    estimate, truth = forward_gradient(engine, contributions), engine.gradient(batch)
    assert np.linalg.norm(estimate - truth) < 0.15 * np.linalg.norm(truth)


@pytest.mark.parametrize(("head_rate", "expected"), [(None, 0.1), (0.7, 0.7)])
def test_head_follows_its_own_gradient_and_rate(head_rate: float | None, expected: float) -> None:
    engine = ToyEngine(N_HEAD)
    config = replace(SGD, head_learning_rate=head_rate, schedule="linear", warmup=2)
    before, examples = engine.adapter.theta.copy(), make_examples(10)
    batch = [examples[i] for i in batch_indices(config.seed, 0, 10, 4)]
    head_gradient = engine.gradient(batch)[N_LORA:]
    result = train_step(engine, config, start(engine, config), examples)
    moved = engine.adapter.theta[N_LORA:] - before[N_LORA:]
    np.testing.assert_allclose(moved, -expected / 2 * head_gradient, rtol=1e-5, atol=1e-6)
    assert result.lr == 0.05


def test_settings_reach_the_engine() -> None:
    engine = ToyEngine()
    config = replace(
        SGD,
        method="forward-difference",
        epsilon=0.25,
        per_example=True,
        max_tokens=99,
    )
    state = start(engine, config)
    events = train(engine, replace(config, eval_every=1), make_examples(4), make_examples(2), state)
    assert isinstance(next(events), EvalResult)
    assert isinstance(next(events), StepResult)
    assert engine.options == {
        "evaluate_max_tokens": 99,
        "method": "forward-difference",
        "epsilon": 0.25,
        "per_example": True,
        "max_tokens": 99,
    }


class Recording(ToyEngine):
    """Keeps the seeds and the batch of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[list[int], list[float]]] = []

    def directional_derivatives(self, batch: list, seeds: np.ndarray, **options: object) -> Probe:
        self.seen.append((seeds.tolist(), [example.y for example in batch]))
        return super().directional_derivatives(batch, seeds, **options)


def test_every_step_has_its_own_seeds_and_batch() -> None:
    engine, config, examples = Recording(), replace(SGD, seed=3), make_examples(10)
    for _ in train(engine, config, examples, [], start(engine, config)):
        pass
    expected = [
        (derive_seeds(3, step, 5).tolist(), [examples[i].y for i in batch_indices(3, step, 10, 4)])
        for step in range(10)
    ]
    assert engine.seen == expected


class Spoilt(ToyEngine):
    """Derivatives replaced where ``fault`` is not zero."""

    def __init__(self, fault: np.ndarray, head: float | None = None) -> None:
        super().__init__(N_HEAD)
        self.fault, self.head = fault, head

    def directional_derivatives(self, *args: object, **options: object) -> Probe:
        probe = super().directional_derivatives(*args, **options)
        derivative = np.where(self.fault != 0, self.fault, probe.derivative)
        head = probe.head_gradient if self.head is None else np.full(N_HEAD, self.head, np.float32)
        return replace(probe, derivative=derivative, head_gradient=head)


def test_rejected_contributions_do_not_count_in_the_mean() -> None:
    engine, clean = Spoilt(np.array([0, math.nan, 0, math.inf, 0])), ToyEngine(N_HEAD)
    examples, seeds = make_examples(10), derive_seeds(SGD.seed, 0, 5)
    batch = [examples[i] for i in batch_indices(SGD.seed, 0, 10, 4)]
    derivative = clean.directional_derivatives(batch, seeds).derivative
    usable = [Contribution(int(seeds[k]), float(derivative[k]), 4, 1.0) for k in (0, 2, 4)]
    expected = clean.adapter.theta - 0.1 * forward_gradient(clean, usable)

    result = train_step(engine, SGD, start(engine, SGD), examples)

    assert [r.contribution.seed for r in result.rejected] == [int(seeds[1]), int(seeds[3])]
    assert len(result.derivatives) == 3
    np.testing.assert_array_equal(engine.adapter.theta[:N_LORA], expected[:N_LORA])


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Spoilt(np.full(5, math.nan)), "no usable perturbation"),
        (Spoilt(np.zeros(5), head=math.inf), "gradient of step 1 is not finite"),
    ],
)
def test_unusable_steps_leave_everything_as_it_was(engine: Spoilt, message: str) -> None:
    before, state = engine.adapter.theta.copy(), start(engine, SGD)
    with pytest.raises(NumericsError, match=message):
        train_step(engine, SGD, state, make_examples(4))
    np.testing.assert_array_equal(engine.adapter.theta, before)
    assert (state.step, state.optimizer.step) == (0, 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_exploding_weights_are_reported() -> None:
    engine, config = ToyEngine(), replace(SGD, learning_rate=1e38)
    with pytest.raises(NumericsError, match="lower the learning rate"):
        for _ in train(engine, config, make_examples(4), [], start(engine, config)):
            pass


def test_a_long_gradient_is_scaled_down() -> None:
    engine = ToyEngine()
    config = replace(SGD, max_gradient_norm=0.5)
    before, state = engine.adapter.theta.copy(), start(engine, config)
    result = train_step(engine, config, state, make_examples(4))
    assert result.gradient_norm > 0.5
    moved = np.linalg.norm(engine.adapter.theta - before)
    assert moved == pytest.approx(0.5 * config.learning_rate, rel=1e-5)


# The whole run


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_training_learns(optimizer: str) -> None:
    rate = {"sgd": 0.03, "momentum": 0.005, "adam": 0.05}[optimizer]
    engine = ToyEngine(N_HEAD)
    config = TrainConfig(
        steps=150,
        method="forward-ad",
        optimizer=optimizer,
        learning_rate=rate,
        eval_every=150,
        warmup=5,
    )
    events = train(engine, config, make_examples(64), make_examples(20, 1), start(engine, config))
    losses = [event.loss for event in events if isinstance(event, EvalResult)]
    assert losses[-1] < losses[0] / 10


def trace(engine: ToyEngine, config: TrainConfig, state: TrainState) -> list[tuple[type, int]]:
    events = train(engine, config, make_examples(10), make_examples(3, 1), state)
    return [(type(event), event.step) for event in events]


def test_events_come_in_order() -> None:
    config = replace(SGD, steps=5, eval_every=2, checkpoint_every=3)
    engine = ToyEngine()
    assert trace(engine, config, start(engine, config)) == [
        (EvalResult, 0),
        (StepResult, 1),
        (StepResult, 2),
        (EvalResult, 2),
        (StepResult, 3),
        (CheckpointDue, 3),
        (StepResult, 4),
        (EvalResult, 4),
        (StepResult, 5),
        (CheckpointDue, 5),
        (EvalResult, 5),
    ]


def test_no_evaluations_or_checkpoints_unless_asked() -> None:
    config = replace(SGD, steps=3, eval_every=0, checkpoint_every=0)
    engine = ToyEngine()
    steps = [(StepResult, 1), (StepResult, 2), (StepResult, 3)]
    assert trace(engine, config, start(engine, config)) == steps


def test_finished_run_only_evaluates() -> None:
    config = replace(SGD, steps=4, eval_every=2, checkpoint_every=2)
    engine = ToyEngine()
    state = start(engine, config)
    trace(engine, config, state)
    theta = engine.adapter.theta.copy()
    assert trace(engine, config, state) == [(EvalResult, 4)]
    np.testing.assert_array_equal(engine.adapter.theta, theta)


def test_no_examples() -> None:
    engine = ToyEngine()
    with pytest.raises(DataError, match="no training examples"):
        next(train(engine, SGD, [], [], start(engine, SGD)))
