"""The exact gradient: against autograd and our own tangents, and what may not change its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_derivatives import LABELS, SEEDS
from torch_model import TorchModel, gradient

from fwdllm.bench.inputs import half_trained
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.errors import ConfigError, NumericsError
from fwdllm.engine.memory.plan import GradientPlan
from fwdllm.engine.settings import DIRECTIONS, DirectionsConfig
from fwdllm.kernels import cpu
from fwdllm.kernels.types import QuantType

LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
ENCODER_LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
TEXTS = (
    "The cat sat on the mat and thought about the weather.",
    "A dog ran.",
    "It rained for a week, and then it rained for another one.",
)
# Between float64 and our float32, of which attention keeps 16 bits on AMX's tiles; and what int8
# activations cost, of a small model.
EXACT, FAST = 5e-5 if cpu.isa == "amx" else 1e-5, 0.05


def relative_errors(engine: Engine, got: np.ndarray, want: np.ndarray) -> dict[str, float]:
    """Of each factor of each target."""
    assert engine.adapter is not None
    rank, found = engine.adapter.config.rank, {}
    for t in engine.adapter.targets:
        middle, end = t.offset + rank * t.n_in, t.offset + t.size(rank)
        for name, at in {"a": slice(t.offset, middle), "b": slice(middle, end)}.items():
            error = np.linalg.norm(got[at] - want[at]) / np.linalg.norm(want[at])
            found[f"{t.name} {name}"] = float(error)
    return found


def check_against_autograd(path: Path, config: LoRAConfig, examples: list[Example], **options: Any):
    exact = half_trained(Engine.load(path, config, exact=True, **options))
    assert exact.adapter is not None
    batch = exact.encode(examples, 64)
    want = gradient(TorchModel(exact), batch)
    found = exact.gradient(batch)
    n = exact.adapter.n_lora
    errors = relative_errors(exact, found.values, want)
    assert max(errors.values()) < EXACT, errors
    assert found.loss == pytest.approx(float(exact.loss(batch).mean()), rel=0.5)
    if found.head_gradient is not None:
        np.testing.assert_allclose(found.head_gradient, want[n:], atol=EXACT * abs(want[n:]).max())
    fast = half_trained(Engine.load(path, config, **options)).gradient(batch).values
    assert np.linalg.norm(fast - want[:n]) < FAST * np.linalg.norm(want[:n])


@pytest.fixture
def texts() -> list[Example]:
    return [Example(text=text) for text in TEXTS]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_every_family(tmp_path: Path, architecture: str, texts: list[Example]) -> None:
    path = tmp_path / "model.gguf"
    make_decoder(path, Shape(3, 128, 4, 2, 32, 160, 2048, architecture=architecture),
                 QuantType.Q8_0, seed=1)  # fmt: skip
    check_against_autograd(path, LoRAConfig(rank=3, targets=LINEAR), texts)


@pytest.mark.parametrize("type", list(QuantType))
def test_every_type(tmp_path: Path, type: QuantType, texts: list[Example]) -> None:
    path = tmp_path / "model.gguf"
    make_decoder(path, Shape(2, 256, 4, 2, 64, 512, 2048), type, seed=1)
    check_against_autograd(path, LoRAConfig(rank=3, targets=LINEAR), texts)


def test_real_text(bundled: Path) -> None:
    examples = read_jsonl(bundled.parent / "pirate.train.jsonl")[:4]
    check_against_autograd(bundled, LoRAConfig(), examples)


def test_an_encoder_with_a_head(shared: Path) -> None:
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:6]
    check_against_autograd(path, LoRAConfig(targets=ENCODER_LINEAR), examples, labels=LABELS)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    make_decoder(path, Shape(3, 256, 4, 2, 64, 512, 2048), QuantType.Q4_0)
    return path


def some_batch(lengths: tuple[int, ...] = (40, 33, 21, 40, 9)) -> Batch:
    rng = np.random.default_rng(0)
    return pack([Tokens(rng.integers(5, 300, n).tolist(), [True] * n) for n in lengths])


def load(model: Path, exact: bool = False, **options: Any) -> Engine:
    return half_trained(Engine.load(model, LoRAConfig(layers=(1, 2)), exact=exact, **options))


@pytest.mark.parametrize("kind", DIRECTIONS)
def test_slopes_are_those_of_tangents(model: Path, kind: str) -> None:
    engine, batch = load(model, exact=True), some_batch()
    engine.use_directions(DirectionsConfig(kind, dimension=4), 3, [Example(text=TEXTS[0])])
    got = engine.directional_derivatives(batch, SEEDS, "backprop")
    want = engine.directional_derivatives(batch, SEEDS, "forward-ad")
    assert got.loss == pytest.approx(want.loss, rel=1e-6)
    np.testing.assert_allclose(
        got.derivative, want.derivative, atol=1e-4 * abs(want.derivative).max()
    )


def test_slopes_of_examples_of_their_own(model: Path) -> None:
    engine, batch = load(model, exact=True), some_batch()
    got = engine.directional_derivatives(batch, SEEDS[:3], "backprop", per_example=True)
    want = engine.directional_derivatives(batch, SEEDS[:3], "forward-ad", per_example=True)
    assert got.loss == pytest.approx(want.loss, rel=1e-6)
    np.testing.assert_array_equal(got.seeds, want.seeds)
    np.testing.assert_allclose(
        got.derivative, want.derivative, atol=1e-4 * abs(want.derivative).max()
    )


def test_a_group_has_its_bits_in_any_company(model: Path) -> None:
    engine, batch = load(model), some_batch()
    seeds = np.arange(6, dtype=np.uint64).reshape(2, 3)
    first, second = engine.group_derivatives(batch, [2, 3], seeds, "backprop")
    alone = engine.directional_derivatives(batch.sequences(2, 5), seeds[1], "backprop")
    assert second.loss == alone.loss
    np.testing.assert_array_equal(second.derivative, alone.derivative)
    assert first.loss != second.loss


@pytest.mark.parametrize(
    "plan", [(8, 1, 0, 0), (300, 64, 0, 1), (30, 1000, None, 2), (300, 1000, None, 0)]
)
def test_blocks_parts_and_dropped_and_kept_layers_change_no_bit(
    model: Path, monkeypatch: pytest.MonkeyPatch, plan: tuple[int, int, int | None, int]
) -> None:
    engine, batch = load(model), some_batch()
    want = engine.gradient(batch)
    memory = GradientPlan(*plan)
    monkeypatch.setattr(engine.graph, "plan_gradient", lambda batch, first: memory)
    got = engine.gradient(batch)
    assert got.loss == want.loss
    np.testing.assert_array_equal(got.values, want.values)


def test_threads_change_no_bit(model: Path) -> None:
    engine, batch, before = load(model), some_batch(), cpu.num_threads()
    want = engine.gradient(batch).values
    try:
        for n in (1, 3):
            cpu.set_num_threads(n)
            np.testing.assert_array_equal(engine.gradient(batch).values, want)
    finally:
        cpu.set_num_threads(before)


def test_only_what_is_adapted_has_a_gradient(model: Path) -> None:
    """Layers before the first adapted one are not gone back through, nor do they matter."""
    engine = load(model)
    assert engine.adapter is not None
    assert min(t.layer for t in engine.adapter.targets) == 1
    found = engine.gradient(some_batch())
    assert found.values.shape == (engine.adapter.n_lora,)
    assert found.n_tokens == 3 * some_batch().n_rows


def test_what_is_not_finite_is_said(model: Path) -> None:
    engine = load(model)
    assert engine.adapter is not None
    engine.adapter.theta[:] = np.nan
    with pytest.raises(NumericsError, match="nan"):
        engine.gradient(some_batch())


def test_an_impossible_budget_is_one_sentence(model: Path) -> None:
    engine = load(model, memory_budget=30 * 2**20)
    with pytest.raises(ConfigError, match=r"needs about .* MiB .* shorter examples, or .* forward"):
        engine.gradient(some_batch())


def test_a_model_of_llama_cpp_has_no_way_back(model: Path) -> None:
    engine = Engine.load(model, LoRAConfig(), backend="llama.cpp")
    with pytest.raises(ConfigError, match="method backprop needs a graph of our own"):
        engine.gradient(some_batch())
    with pytest.raises(ConfigError, match="central or forward-difference"):
        engine.directional_derivatives(some_batch(), SEEDS[:1], "backprop")
