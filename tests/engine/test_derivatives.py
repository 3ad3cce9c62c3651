"""Directional derivatives against PyTorch autograd on decoded weights, and their invariances."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_model import TorchModel, gradient

from fwdllm.bench.inputs import half_trained
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.directions import Dense, Directions
from fwdllm.engine.errors import ConfigError, NumericsError
from fwdllm.engine.settings import SLOPE_METHODS
from fwdllm.kernels import cpu, reference
from fwdllm.kernels.types import QuantType

SEEDS = np.arange(64, dtype=np.uint64) + 1000
LABELS = ("negative", "positive")


def autograd_slopes(engine: Engine, batch) -> tuple[np.ndarray, np.ndarray]:
    assert engine.adapter is not None
    full = gradient(TorchModel(engine), batch)
    lora = full[: engine.adapter.n_lora].astype(np.float32)
    return reference.seeded_dot(lora, SEEDS), full[engine.adapter.n_lora :]


def correlation(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.corrcoef(got, want)[0, 1])


@pytest.mark.parametrize("method", [*SLOPE_METHODS, "backprop"])
def test_decoder_against_autograd(bundled: Path, method: str) -> None:
    assets = bundled.parent
    examples = read_jsonl(assets / "pirate.train.jsonl")[:3]
    exact = half_trained(Engine.load(bundled, LoRAConfig(), exact=True))
    batch = exact.encode(examples)
    want, _ = autograd_slopes(exact, batch)
    probe = exact.directional_derivatives(batch, SEEDS, method=method)
    assert correlation(probe.derivative, want) > 0.999
    assert probe.loss == pytest.approx(
        float(TorchModel(exact).loss(TorchModel(exact).theta(), batch).detach()), rel=1e-3
    )
    fast = half_trained(Engine.load(bundled, LoRAConfig()))
    probe = fast.directional_derivatives(batch, SEEDS, method=method)
    assert correlation(probe.derivative, want) > 0.99


def test_encoder_against_autograd(shared: Path) -> None:
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:6]
    exact = half_trained(Engine.load(path, LoRAConfig(), labels=LABELS, exact=True))
    batch = exact.encode(examples)
    want, want_head = autograd_slopes(exact, batch)
    probe = exact.directional_derivatives(batch, SEEDS)
    assert correlation(probe.derivative, want) > 0.999
    np.testing.assert_allclose(probe.head_gradient, want_head, atol=1e-5 * np.abs(want_head).max())
    fast = half_trained(Engine.load(path, LoRAConfig(), labels=LABELS))
    probe = fast.directional_derivatives(batch, SEEDS)
    assert correlation(probe.derivative, want) > 0.99


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_target_of_every_family(tmp_path: Path, architecture: str) -> None:
    path = tmp_path / "model.gguf"
    shape = Shape(2, 128, 4, 2, 32, 160, 2048, architecture=architecture)
    make_decoder(path, shape, QuantType.F32, seed=1)
    targets = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    config = LoRAConfig(rank=3, targets=targets, layers=(1,))
    engine = half_trained(Engine.load(path, config, exact=True))
    batch = engine.encode([Example(text="The cat sat on the mat."), Example(text="A dog ran.")])
    want, _ = autograd_slopes(engine, batch)
    probe = engine.directional_derivatives(batch, SEEDS)
    assert correlation(probe.derivative, want) > 0.999


def torch_slopes(engine: Engine, batch: Batch, directions: Directions) -> np.ndarray:
    """grad(L) . v(seed) in float64 for all SEEDS; of the first one torch.func.jvp agrees."""
    model = TorchModel(engine)
    theta = model.theta().detach()
    true = gradient(model, batch)
    slopes = []
    for seed in SEEDS:
        v = np.zeros(len(true))
        one = directions.combine(np.array([seed]), np.ones(1, np.float32))
        v[: len(directions.expand(one))] = directions.expand(one)
        slopes.append(true @ v)
        if seed == SEEDS[0]:
            tangent = (torch.tensor(v),)
            _, jvp = torch.func.jvp(lambda t: model.loss(t, batch), (theta,), tangent)
            assert float(jvp) == pytest.approx(slopes[0], rel=1e-9)
    return np.array(slopes)


def assert_jvps(load: Callable[[bool], Engine], examples: list[Example]) -> None:
    """Exact arithmetic to 1e-4, the fast path to 2%, against PyTorch."""
    exact = half_trained(load(True))
    batch = exact.encode(examples, 48)
    assert exact.adapter is not None
    want = torch_slopes(exact, batch, Dense(exact.adapter))
    for engine, tolerance in ((exact, 1e-4), (half_trained(load(False)), 0.02)):
        got = engine.directional_derivatives(batch, SEEDS, method="forward-ad").derivative
        assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)
        assert correlation(got, want) > 0.9995


@pytest.mark.parametrize("type", [QuantType.Q4_0, QuantType.Q4_K], ids=lambda t: t.name)
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_forward_ad_of_a_decoder(tmp_path: Path, architecture: str, type: QuantType) -> None:
    path = tmp_path / "model.gguf"
    make_decoder(path, Shape(2, 256, 4, 2, 64, 512, 2048, architecture=architecture), type, seed=1)
    config = LoRAConfig(rank=3, targets=("attn_k", "attn_output", "attn_q", "ffn_down", "ffn_up"))
    examples = [Example(text="The cat sat on the mat."), Example(text="A dog ran.")]
    assert_jvps(lambda exact: Engine.load(path, config, exact=exact), examples)


def test_forward_ad_of_the_bundled_model(bundled: Path) -> None:
    examples = read_jsonl(bundled.parent / "pirate.train.jsonl")[:3]
    assert_jvps(lambda exact: Engine.load(bundled, LoRAConfig(), exact=exact), examples)


@pytest.mark.parametrize("type", ["Q4_0", "F16"])
def test_forward_ad_of_an_encoder(shared: Path, type: str) -> None:
    path = shared / "models" / f"minilm-l6-v2.{type}.gguf"
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:6]
    config = LoRAConfig(targets=("attn_q", "attn_v", "ffn_down"))
    assert_jvps(lambda e: Engine.load(path, config, labels=LABELS, exact=e), examples)


def test_reference_backend_agrees(bundled: Path) -> None:
    examples = [Example(prompt="Question: Hi?\nAnswer:", completion=" Arr!")]
    slopes = []
    for device in ("cpu", "reference"):
        engine = half_trained(Engine.load(bundled, LoRAConfig(rank=2), exact=True, device=device))
        batch = engine.encode(examples)
        probe = engine.directional_derivatives(batch, SEEDS[:3], epsilon=1e-2)
        slopes.append(probe.derivative)
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", [*SLOPE_METHODS, "backprop"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_seed_gives_the_same_bits_in_any_company(bundled: Path, method: str, exact: bool) -> None:
    engine = half_trained(Engine.load(bundled, LoRAConfig(), exact=exact))
    examples = [Example(prompt="Question: Hi?\nAnswer:", completion=" Arr!")] * 3
    batch = engine.encode(examples)
    before = cpu.num_threads()
    try:
        cpu.set_num_threads(3)
        together = engine.directional_derivatives(batch, SEEDS[:5], method=method).derivative
        cpu.set_num_threads(1)
        alone = [
            engine.directional_derivatives(batch, SEEDS[i : i + 1], method=method).derivative[0]
            for i in range(5)
        ]
    finally:
        cpu.set_num_threads(before)
    np.testing.assert_array_equal(together, alone)


def test_an_example_gives_the_same_loss_in_any_batch(bundled: Path) -> None:
    engine = half_trained(Engine.load(bundled, LoRAConfig()))
    texts = ["The cat sat.", "A dog ran over the wet green hill.", "Rain fell all day long."]
    examples = [Example(text=text) for text in texts]
    together = engine.loss(engine.encode(examples))
    alone = [engine.loss(engine.encode([example]))[0] for example in examples]
    np.testing.assert_array_equal(together, alone)


def test_update_moves_the_loss_as_its_slope_says(bundled: Path) -> None:
    engine = half_trained(Engine.load(bundled, LoRAConfig(), exact=True))
    assert engine.adapter is not None
    batch = engine.encode([Example(text="The cat sat on the mat.")])
    probe = engine.directional_derivatives(batch, SEEDS[:1])
    step = 1e-3
    engine.adapter.add(SEEDS[:1], np.array([step]))
    above = engine.loss(batch)[0]
    engine.adapter.add(SEEDS[:1], np.array([-2 * step]))
    slope = (above - engine.loss(batch)[0]) / (2 * step)
    assert slope == pytest.approx(probe.derivative[0], rel=0.01)


def test_rademacher_directions(bundled: Path) -> None:
    engine = half_trained(Engine.load(bundled, LoRAConfig(), exact=True))
    assert engine.adapter is not None
    batch = engine.encode([Example(text="The cat sat on the mat.")])
    lora = gradient(TorchModel(engine), batch)[: engine.adapter.n_lora].astype(np.float32)
    want = reference.seeded_dot(lora, SEEDS, distribution="rademacher")
    signs = Dense(engine.adapter, "rademacher")
    probe = engine.directional_derivatives(batch, SEEDS, directions=signs)
    assert correlation(probe.derivative, want) > 0.999


@pytest.mark.parametrize("method", ["central", "forward-difference"])
def test_an_epsilon_that_is_lost_in_rounding_is_reported(bundled: Path, method: str) -> None:
    engine = Engine.load(bundled, LoRAConfig())
    batch = engine.encode(read_jsonl(bundled.parent / "pirate.train.jsonl")[:2])
    with pytest.raises(NumericsError, match="changes no loss at all"):
        engine.directional_derivatives(batch, SEEDS[:1], method, 1e-12)
    with pytest.raises(NumericsError, match="changes no loss at all"):
        engine.group_derivatives(batch, [1, 1], SEEDS[:2].reshape(2, 1), method, 1e-12)
    probes = engine.group_derivatives(batch, [1, 1], SEEDS[:2].reshape(2, 1), method)
    assert all(probe.derivative.all() for probe in probes)


def test_an_epsilon_that_is_lost_in_rounding_with_a_head(shared: Path) -> None:
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    engine = Engine.load(path, LoRAConfig(), labels=LABELS)
    assert engine.adapter is not None
    engine.adapter.theta[engine.adapter.n_lora :] = 0.1 * np.arange(engine.adapter.n_head)
    batch = engine.encode(read_jsonl(shared / "data" / "sst2.train.jsonl")[:4])
    with pytest.raises(NumericsError, match="changes no loss at all"):
        engine.directional_derivatives(batch, SEEDS, "central", 1e-12)
    groups = SEEDS[:4].reshape(2, 2)
    with pytest.raises(NumericsError, match="changes no loss at all"):
        engine.group_derivatives(batch, [2, 2], groups, "central", 1e-12)


def test_non_finite_losses_are_reported(bundled: Path) -> None:
    engine = half_trained(Engine.load(bundled, LoRAConfig()))
    assert engine.adapter is not None
    batch = engine.encode([Example(text="The cat sat.")])
    with pytest.raises(NumericsError, match="epsilon"):
        engine.directional_derivatives(batch, SEEDS[:2], "central", epsilon=1e30)
    engine.adapter.theta[0] = np.nan
    with pytest.raises(NumericsError, match="loss is nan"):
        engine.directional_derivatives(batch, SEEDS[:2])
    with pytest.raises(NumericsError):
        engine.evaluate([Example(text="The cat sat.")])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "exact"}, "method"),
        ({"epsilon": 0.0}, "epsilon"),
        ({"seeds": np.zeros(0, np.uint64)}, "at least one seed"),
    ],
)
def test_bad_options(bundled: Path, options: dict, message: str) -> None:
    engine = Engine.load(bundled, LoRAConfig())
    batch = engine.encode([Example(text="The cat sat.")])
    with pytest.raises(ConfigError, match=message):
        engine.directional_derivatives(batch, **({"seeds": SEEDS[:1]} | options))


def test_layers_before_the_first_adapted_one_run_once(bundled: Path) -> None:
    """Restricting layers gives the derivatives of the full adapter with the rest of v zero."""
    rows: list[int] = []
    engine = half_trained(Engine.load(bundled, LoRAConfig(layers=(5,))))
    batch = engine.encode([Example(text="The cat sat.")])
    real = engine.ops.matmul

    class Spy:
        def __getattr__(self, name: str):
            return getattr(cpu, name)

        def matmul(self, x: np.ndarray, *args, **kwargs) -> np.ndarray:
            rows.append(len(x))
            return real(x, *args, **kwargs)

    engine.graph.ops = Spy()  # type: ignore[assignment]
    engine.directional_derivatives(batch, SEEDS[:2])
    per_layer = 7
    assert rows[: 5 * per_layer] == [batch.n_rows] * (5 * per_layer)
    assert rows[5 * per_layer :] == [3 * batch.n_rows] * per_layer


def test_batches_do_not_change_an_evaluation(bundled: Path, monkeypatch) -> None:
    engine = Engine.load(bundled)
    examples = read_jsonl(bundled.parent / "pirate.valid.jsonl")[:12]
    whole = engine.evaluate(examples)
    monkeypatch.setattr("fwdllm.engine.evaluation.EVAL_ROWS", 1)
    parts = engine.evaluate(examples)
    assert parts.n_tokens == whole.n_tokens
    assert parts.loss == pytest.approx(whole.loss, rel=1e-12)
