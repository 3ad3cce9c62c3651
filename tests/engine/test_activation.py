"""Activation perturbation against autograd, and a run by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shallow import first_layers
from torch_model import TorchModel, by_sequence, gradient

from fwdllm.bench.inputs import half_trained
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine, Example, LoRAConfig
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.directions import frozen_b
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.estimators.activation import scaled
from fwdllm.engine.settings import Scope
from fwdllm.kernels.types import QuantType
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import StepResult, TrainState, train, train_step
from fwdllm.protocol.seeds import batch_indices, derive_seeds

TARGETS = ("attn_v", "attn_output", "ffn_up", "ffn_down")
TEXTS = ["The cat sat on the mat.", "A dog ran.", "Rain fell all day long over the green hills."]
LABELS = ("bad", "fair", "good")


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    make_decoder(path, Shape(2, 128, 4, 2, 32, 160, 2048), QuantType.F32, seed=1)
    return path


@pytest.fixture(scope="module")
def encoder(shared: Path) -> Path:
    return shared / "models" / "minilm-l6-v2.Q4_0.gguf"


@pytest.fixture(scope="module")
def shallow_encoder(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return first_layers(encoder, 2, tmp_path_factory.mktemp("model") / "minilm-l2.gguf")


def load(
    path: Path, rank: int = 1, texts: Sequence[str] = TEXTS, **options
) -> tuple[Engine, Batch]:
    """An engine in the middle of training, and a batch."""
    labels = LABELS if "minilm" in path.name else ()
    lora = LoRAConfig(rank=rank, alpha=3.0 * rank, targets=TARGETS)
    engine = half_trained(Engine.load(path, lora, labels=labels, exact=True, **options))
    assert engine.adapter is not None
    engine.directions = frozen_b(engine.adapter)
    return engine, engine.encode(labelled(texts, labels))


def labelled(texts: Sequence[str], labels: Sequence[str]) -> list[Example]:
    return [
        Example(text=text, label=labels[i % len(labels)] if labels else None)
        for i, text in enumerate(texts)
    ]


def part(engine: Engine, theta: np.ndarray, factor: str) -> np.ndarray:
    """theta with only the As or only the Bs, float64 [n_lora]."""
    adapter = engine.adapter
    assert adapter is not None
    kept = np.zeros(adapter.n_lora)
    for t in adapter.targets:
        middle = t.offset + adapter.config.rank * t.n_in
        end = t.offset + t.size(adapter.config.rank)
        at = slice(t.offset, middle) if factor == "a" else slice(middle, end)
        kept[at] = theta[at]
    return kept


def close(got: np.ndarray, want: np.ndarray, tolerance: float) -> bool:
    return bool(np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want))


@pytest.mark.parametrize("rank", [1, 3])
def test_as_many_tangents_as_numbers_are_exact(decoder: Path, rank: int) -> None:
    engine, batch = load(decoder, rank)
    enough = int(np.diff(batch.starts).max()) * 8 * rank
    want = part(engine, gradient(TorchModel(engine), batch), "a")
    found = engine.activation_gradient(batch, seed=4, n_tangents=enough)
    assert close(found.values, want, 1e-5)
    assert found.head_gradient is None
    assert found.n_tokens == (2 + enough) * batch.n_rows
    # One less, and at least two numbers meet in a tangent.
    assert not close(engine.activation_gradient(batch, 4, enough - 1).values, want, 1e-5)


def test_an_encoder_and_its_head(encoder: Path) -> None:
    engine, batch = load(encoder)
    assert engine.adapter is not None
    enough = int(np.diff(batch.starts).max()) * 24
    want = gradient(TorchModel(engine), batch)
    found = engine.activation_gradient(batch, 4, enough)
    assert close(found.values, part(engine, want, "a"), 1e-5)
    assert found.head_gradient is not None
    assert close(found.head_gradient, want[engine.adapter.n_lora :], 1e-4)
    assert close(engine.head_step(batch).head_gradient, want[engine.adapter.n_lora :], 1e-4)


def test_few_tangents_are_unbiased(decoder: Path) -> None:
    engine, batch = load(decoder)
    want = part(engine, gradient(TorchModel(engine), batch), "a")
    rounds, k = 300, 8
    seeds = range(rounds)
    estimates = [engine.activation_gradient(batch, seed, k).values for seed in seeds]
    errors = np.array([np.sum(np.square(e - want)) for e in estimates]) / np.sum(np.square(want))
    # The mean's error is a single one's over sqrt(rounds), give or take.
    assert close(np.mean(estimates, axis=0), want, 1.5 * np.sqrt(errors.mean() / rounds))
    assert errors.mean() > 1  # there is noise to average


def test_the_reference_agrees(decoder: Path) -> None:
    engine, batch = load(decoder)
    other, _ = load(decoder, device="reference")
    ours = engine.activation_gradient(batch, 9, 7).values
    assert close(other.activation_gradient(batch, 9, 7).values, ours, 1e-4)


def test_only_the_scope_gets_a_gradient(decoder: Path) -> None:
    engine, batch = load(decoder)
    assert engine.adapter is not None
    engine.directions = frozen_b(engine.adapter, Scope(layers=(1,), targets=("ffn_up",)))
    want = part(engine, gradient(TorchModel(engine), batch), "a")
    [t] = engine.directions.targets
    outside = np.r_[0 : t.offset, t.offset + t.n_in : len(want)]
    want[outside] = 0
    found = engine.activation_gradient(batch, 4, int(np.diff(batch.starts).max()))
    assert close(found.values, want, 1e-5)


@pytest.mark.parametrize("kind", ["decoder", "shallow_encoder"])
def test_work_in_pieces_changes_no_bit(
    kind: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, batch = load(request.getfixturevalue(kind), texts=[*TEXTS, 5 * TEXTS[2]])
    want = engine.activation_gradient(batch, 4, 9), engine.output_sensitivity(batch, 4, 9)
    plan = type(engine.graph.plan(batch, 4))(30, 4, 0)  # few rows and lanes at a time
    monkeypatch.setattr(engine.graph, "plan", lambda batch, n_lanes: plan)
    got = engine.activation_gradient(batch, 4, 9), engine.output_sensitivity(batch, 4, 9)
    for one, other in zip(want, got, strict=True):
        np.testing.assert_array_equal(other.values, one.values)
        assert other.loss == pytest.approx(one.loss, rel=1e-12)


def with_biases(engine: Engine, names: list[str]) -> tuple[TorchModel, dict[str, torch.Tensor]]:
    """The model with a leaf added to the outputs of each target."""
    model, leaves = TorchModel(engine), {}
    assert engine.adapter is not None
    for t in engine.adapter.targets:
        if t.name in names:
            leaves[t.name] = torch.zeros(t.n_out, dtype=torch.float64, requires_grad=True)
            present = model.tensors.get(f"{t.name}.bias", 0)
            model.tensors[f"{t.name}.bias"] = leaves[t.name] + present
    return model, leaves


def test_sensitivity_of_the_loss(decoder: Path) -> None:
    engine, batch = load(decoder)
    assert engine.adapter is not None
    name = "blk.1.attn_v"
    engine.directions = frozen_b(engine.adapter, Scope((1,), ("attn_v",)))
    model, leaves = with_biases(engine, [name])
    model.loss(model.theta(), batch).backward()
    found = engine.output_sensitivity(batch, 4, 64)  # all the outputs it has
    [t] = engine.directions.targets
    b = found.values[t.offset + t.n_in :][: t.n_out]
    assert close(b, leaves[name].grad.numpy(), 1e-5)
    assert not found.values[: t.offset + t.n_in].any()


def test_sensitivities_of_contrasts_of_scores(encoder: Path) -> None:
    engine, batch = load(encoder, rank=2)
    assert engine.adapter is not None
    name = "blk.4.attn_output"
    engine.directions = frozen_b(engine.adapter, Scope((4,), ("attn_output",)))
    found = engine.output_sensitivity(batch, 4, 384)
    [t] = engine.directions.targets
    b = found.values[t.offset + 2 * t.n_in :][: 2 * t.n_out].reshape(t.n_out, 2)
    jacobian = []
    for label in range(3):
        model, leaves = with_biases(engine, [name])
        hidden = by_sequence(model.hidden(model.theta(), batch), batch)
        model.head_scores(model.theta(), hidden)[:, label].mean().backward()
        jacobian.append(leaves[name].grad.numpy())
    centered = np.array(jacobian) - np.mean(jacobian, axis=0)
    # Two orthonormal contrasts of three scores keep all there is but their mean.
    np.testing.assert_allclose(b @ b.T, centered.T @ centered, atol=1e-5 * np.abs(b @ b.T).max())


def test_scaled_columns_move_by_one(decoder: Path) -> None:
    engine, _ = load(decoder)
    adapter = engine.adapter
    assert adapter is not None
    m = part(engine, np.random.default_rng(0).normal(size=adapter.n_lora), "b").astype(np.float32)
    b = scaled(adapter, m)
    for t in adapter.targets:
        at = slice(t.offset + t.n_in, t.offset + t.size(1))
        assert adapter.config.scale * (m[at] @ b[at]) == pytest.approx(1, rel=1e-5)
    assert not scaled(adapter, np.zeros_like(m)).any()


CONFIG = TrainConfig(
    steps=40,
    batch_size=3,
    perturbations=16,
    method="activation",
    learning_rate=0.03,
    checkpoint_every=0,
)


def new_run(path: Path, config: TrainConfig = CONFIG) -> tuple[Engine, list[Example], TrainState]:
    labels = LABELS if "minilm" in path.name else ()
    lora = LoRAConfig(rank=2 if labels else 1, targets=TARGETS)
    engine = Engine.load(path, lora, labels=labels, seed=3)
    engine.use_activations()
    return engine, labelled(TEXTS, labels), TrainState.initial(config, engine)


@pytest.mark.parametrize("kind", ["decoder", "shallow_encoder"])
def test_training_learns_its_examples(kind: str, request: pytest.FixtureRequest) -> None:
    engine, examples, state = new_run(request.getfixturevalue(kind))
    before = engine.evaluate(examples).loss
    phases = []
    for event in train(engine, CONFIG, examples, [], state):
        assert isinstance(event, StepResult)
        assert event.derivatives == ()
        phases.append(event.n_tokens // engine.encode(examples).n_rows)
    after_head = before
    heads = [1, 1] if kind == "shallow_encoder" else []
    assert phases == heads + [17, 17] + [18] * (40 - len(heads) - 2)
    if kind == "shallow_encoder":
        alone, _, _ = new_run(request.getfixturevalue(kind))
        config = replace(CONFIG, method="forward-ad", learning_rate=1e-30, perturbations=1)
        config = replace(config, head_learning_rate=CONFIG.learning_rate)
        for _ in train(alone, config, examples, [], TrainState.initial(config, alone)):
            pass
        after_head = alone.evaluate(examples).loss
    assert engine.evaluate(examples).loss < 0.9 * after_head


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 20])
def test_any_step_may_be_the_last_before_a_resume(shallow_encoder: Path, stop: int) -> None:
    whole, examples, state = new_run(shallow_encoder)
    assert whole.adapter is not None
    saved = None
    for _ in range(22):
        train_step(whole, CONFIG, state, examples)
        if state.step == stop:
            slots = {name: slot.copy() for name, slot in state.optimizer.slots.items()}
            optimizer = replace(state.optimizer, slots=slots)
            saved = whole.adapter.theta.copy(), TrainState(stop, optimizer)
    assert saved is not None
    resumed, _, _ = new_run(shallow_encoder)
    assert resumed.adapter is not None
    resumed.adapter.theta[:] = saved[0]
    while saved[1].step < 22:
        train_step(resumed, CONFIG, saved[1], examples)
    np.testing.assert_array_equal(resumed.adapter.theta, whole.adapter.theta)


def test_b_stays_once_it_is_measured(shallow_encoder: Path) -> None:
    engine, examples, state = new_run(shallow_encoder)
    assert engine.adapter is not None
    seen = []
    for _ in range(10):
        train_step(engine, CONFIG, state, examples)
        theta = engine.adapter.theta[: engine.adapter.n_lora]
        seen.append((part(engine, theta, "a"), part(engine, theta, "b")))
    assert not seen[3][0].any() and seen[5][0].any()  # A learns from step 5 on
    assert not seen[1][1].any() and seen[2][1].any()  # B is measured in steps 3 and 4
    np.testing.assert_array_equal(seen[3][1], seen[-1][1])


def test_b_is_the_scaled_mean_of_what_was_measured(decoder: Path) -> None:
    config = replace(CONFIG, steps=60)
    engine, examples, state = new_run(decoder, config)
    adapter = engine.adapter
    assert adapter is not None
    found = []
    for step in range(3):  # 5% of the run
        chosen = batch_indices(config.seed, step, len(examples), config.batch_size)
        seed = int(derive_seeds(config.seed, step, 1)[0])
        batch = engine.encode([examples[i] for i in chosen])
        found.append(engine.output_sensitivity(batch, seed, config.perturbations).values)
    for _ in found:
        train_step(engine, config, state, examples)
    want = scaled(adapter, np.mean(found, axis=0, dtype=np.float64).astype(np.float32))
    np.testing.assert_allclose(adapter.theta, want, rtol=1e-4, atol=1e-4 * np.abs(want).max())


def test_what_makes_no_sense_is_said(decoder: Path, encoder: Path) -> None:
    with pytest.raises(ConfigError, match="rank 1 here, not 2"):
        Engine.load(decoder, LoRAConfig(2, targets=TARGETS)).use_activations()
    with pytest.raises(ConfigError, match="rank 2 here, not 3: one less than there are labels"):
        Engine.load(encoder, LoRAConfig(3), labels=LABELS).use_activations()
    with pytest.raises(ConfigError, match="directions of its own already"):
        TrainConfig(steps=9, method="activation", per_example=True)
    with pytest.raises(ConfigError, match="at least 3 steps"):
        TrainConfig(steps=2, method="activation")
    engine, batch = load(decoder)
    with pytest.raises(ConfigError, match="method must be one of"):
        engine.directional_derivatives(batch, np.arange(2), method="activation")
