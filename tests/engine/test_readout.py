"""The gradient of what the last layer writes: against autograd, with no way back, and for whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import make_family
from places import SHARED
from test_backprop import TEXTS, check_against_autograd

from fwdllm import ConfigError, recipe, tune
from fwdllm.bench.inputs import half_trained
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine, Example, LoRAConfig
from fwdllm.kernels import cpu
from fwdllm.kernels.types import QuantType
from fwdllm.protocol.config import TrainConfig

LAST = LoRAConfig(rank=3, alpha=6.0, targets=("ffn_down",), layers=(2,))
ENCODER = SHARED / "models" / "minilm-l6-v2.Q4_0.gguf"
EXAMPLES = [Example(text=text) for text in TEXTS]


@pytest.fixture(params=["llama", "qwen2", "qwen3"])
def decoder(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    path = tmp_path / "model.gguf"
    make_decoder(path, Shape(3, 128, 4, 2, 32, 160, 2048, architecture=request.param),
                 QuantType.Q8_0, seed=1)  # fmt: skip
    return path


def test_it_is_the_gradient(decoder: Path) -> None:
    check_against_autograd(decoder, LAST, EXAMPLES)
    engine = half_trained(Engine.load(decoder, LAST))
    batch = engine.encode(EXAMPLES)
    found, whole = engine.gradient(batch, "readout"), engine.gradient(batch)
    np.testing.assert_array_equal(found.values, whole.values)
    assert np.linalg.norm(found.values) > 0
    assert (found.loss, found.n_tokens) == (whole.loss, 2 * batch.n_rows)


def test_slopes_are_those_of_backprop(decoder: Path) -> None:
    """Of a batch, of its examples and of groups: the same bits, by less work."""
    engine = half_trained(Engine.load(decoder, LAST))
    batch, seeds = engine.encode(EXAMPLES), np.arange(6, dtype=np.uint64)
    for options in ({}, {"per_example": True}):
        exact, found = (
            engine.directional_derivatives(batch, seeds, method, **options)
            for method in ("backprop", "readout")
        )
        np.testing.assert_array_equal(found.derivative, exact.derivative)
        assert (found.loss, 3 * found.n_tokens) == (exact.loss, 2 * exact.n_tokens)
    groups = engine.group_derivatives(batch, [1, len(EXAMPLES) - 1], seeds.reshape(2, 3), "readout")
    alone = engine.directional_derivatives(engine.encode(EXAMPLES[:1]), seeds[:3], "readout")
    np.testing.assert_array_equal(groups[0].derivative, alone.derivative)


def test_slopes_agree_with_differences(tmp_path: Path) -> None:
    """Of a family with scales of its own, a bias and a fused matrix below."""
    for name in ("granite", "phi3", "smollm3"):
        path = make_family(tmp_path / f"{name}.gguf", name)
        last = Engine.load(path).args.n_layers - 1
        config = LoRAConfig(rank=3, targets=("ffn_down",), layers=(last,))
        engine = half_trained(Engine.load(path, config, exact=True))
        batch, seeds = engine.encode(EXAMPLES, 32), np.arange(4, dtype=np.uint64)
        gradient = engine.gradient(batch, "readout").values
        slopes = engine.directions.dot(engine.directions.project(gradient), seeds)
        probe = engine.directional_derivatives(batch, seeds, "central", 1e-3)
        np.testing.assert_allclose(slopes, probe.derivative, rtol=2e-2, atol=1e-4)


def test_no_product_goes_back(decoder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> np.ndarray:
        raise AssertionError("a layer's product was asked for its vjp")

    engine = half_trained(Engine.load(decoder, LAST))
    for name in ("matmul_vjp", "attention_vjp", "swiglu_vjp"):
        monkeypatch.setattr(cpu, name, refuse)
    engine.gradient(engine.encode(EXAMPLES), "readout")
    with pytest.raises(AssertionError, match="vjp"):
        half_trained(Engine.load(decoder, LoRAConfig())).gradient(engine.encode(EXAMPLES))


@pytest.mark.parametrize(
    "config",
    [
        LoRAConfig(),
        LoRAConfig(targets=("ffn_down",)),
        LoRAConfig(targets=("ffn_down",), layers=(1,)),
        LoRAConfig(targets=("ffn_down", "ffn_up"), layers=(2,)),
    ],
)
def test_other_adapters_are_refused(decoder: Path, tmp_path: Path, config: LoRAConfig) -> None:
    engine = Engine.load(decoder, config)
    with pytest.raises(ConfigError, match="--targets ffn_down --layers 2"):
        engine.gradient(engine.encode(EXAMPLES), "readout")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "It rained."}\n' * 8)
    train = TrainConfig(2, method="readout")
    with pytest.raises(ConfigError, match="--targets ffn_down --layers 2"):
        tune(decoder, data, tmp_path / "a.gguf", lora=config, train=train)
    assert not (tmp_path / "a.gguf").exists()


def test_its_recipe(decoder: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "It rained.", "label": "a"}\n{"text": "A dog.", "label": "b"}\n' * 8)
    lora, train = recipe(decoder, data, "readout")
    assert (lora.targets, lora.layers, train.method) == (("ffn_down",), (2,), "readout")
    result = tune(decoder, data, tmp_path / "a.gguf", train=TrainConfig(2, method="readout"))
    assert result.n_trainable == 32 * (160 + 128)
    if ENCODER.exists():
        with pytest.raises(ConfigError, match="a decoder's last layer"):
            recipe(ENCODER, data, "readout")
