"""The engine on llama.cpp, against our own graphs and against plain llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from llama_models import (
    DECODERS,
    ENCODER,
    LABELS,
    NOISE,
    OWN_FAMILIES,
    SEEDS,
    SHAPE,
    TARGETS,
    Make,
    correlation,
    noise_of,
    plain_losses,
    random_batch,
    tuned,
)

from fwdllm.bench.architectures import CONTEXT
from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.estimators.lanes import lane_losses
from fwdllm.engine.llamacpp import generation


def both(path: Path, new: bool = False, **options: Any) -> tuple[Engine, Engine]:
    """Our own graph and llama.cpp on one file with equal adapters of rank 8. new: B is zero."""
    engines = []
    for backend in ("fwdllm", "llama.cpp"):
        engine = half_trained(Engine.load(path, LoRAConfig(), backend=backend, **options))
        assert engine.adapter is not None and engine.backend.name == backend
        if new:
            for target in engine.adapter.targets:
                engine.adapter.factors(target).b[:] = 0
        engines.append(engine)
    return engines[0], engines[1]


def assert_agree(
    own: Engine, other: Engine, examples: list[Example], loss: float, central: float
) -> None:
    """loss: how far losses may be apart.  central: the correlation of slopes."""
    batch = own.encode(examples, 32)
    np.testing.assert_array_equal(other.encode(examples, 32).ids, batch.ids)
    np.testing.assert_allclose(other.loss(batch), own.loss(batch), atol=loss, rtol=0)
    want = own.directional_derivatives(batch, SEEDS)
    got = other.directional_derivatives(batch, SEEDS, "central")
    assert correlation(got.derivative, want.derivative) > central
    assert np.linalg.norm(got.derivative) == pytest.approx(np.linalg.norm(want.derivative), rel=0.1)
    assert got.loss == pytest.approx(want.loss, abs=0.02)
    if want.head_gradient is not None:
        np.testing.assert_allclose(got.head_gradient, want.head_gradient, atol=0.02)


# How far losses may be apart, and what slopes correlate by. Measured: 2e-4 of F16 files and 5e-3 of
# quantized ones, 0.02 of short texts; 0.9995 to 0.9999.
CLOSE = {"F16": (1e-3, 0.995), "Q8_0": (0.05, 0.995), "Q4_0": (0.05, 0.995)}


@pytest.mark.parametrize("type", ["F16", "Q4_0"])
@pytest.mark.parametrize("architecture", OWN_FAMILIES)
def test_synthetic_decoders(small: Make, bundled: Path, architecture: str, type: str) -> None:
    examples = read_jsonl(bundled.parent / "pirate.train.jsonl")[:3]
    new = architecture == "qwen2"  # a new adapter is as good, and once is enough
    assert_agree(*both(small(architecture, type), new), examples, *CLOSE[type])


def test_bundled_model(bundled: Path) -> None:
    """Its losses are large where it was not trained: 0.02 apart; slopes correlate by 0.998."""
    examples = read_jsonl(bundled.parent / "pirate.train.jsonl")[:4]
    assert_agree(*both(bundled), examples, 0.06, 0.99)


@pytest.mark.parametrize(
    ("type", "new", "n"), [("F16", False, 2), ("Q8_0", True, 3), ("Q4_0", False, 3)]
)
def test_trained_decoder(shared: Path, type: str, new: bool, n: int) -> None:
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[2 : 2 + n]
    examples = [Example(text=example.text) for example in examples]
    path = shared / "models" / f"tinymix-6m.{type}.gguf"
    assert_agree(*both(path, new), examples, *CLOSE[type])


@pytest.mark.parametrize(("type", "n"), [("F16", 2), ("Q4_0", 4)])
def test_trained_encoder(shared: Path, type: str, n: int) -> None:
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:n]
    engines = both(shared / "models" / f"minilm-l6-v2.{type}.gguf", labels=LABELS)
    assert_agree(*engines, examples, *{"F16": (5e-3, 0.999), "Q4_0": (0.1, 0.99)}[type])


@pytest.mark.parametrize(
    ("type", "epsilon", "least"), [("F16", 1e-2, 0.95), ("Q4_0", 1e-2, 0.95), ("Q4_0", 1e-3, 0.995)]
)
def test_forward_difference(
    small: Make, bundled: Path, type: str, epsilon: float, least: float
) -> None:
    """Measured: 0.999 and more with a small step; curvature leaves 0.97 to 0.99 with the other."""
    own, other = both(small("llama", type))
    batch = own.encode(read_jsonl(bundled.parent / "pirate.train.jsonl")[:3], 48)
    want = own.directional_derivatives(batch, SEEDS).derivative
    got = other.directional_derivatives(batch, SEEDS, "forward-difference", epsilon)
    assert correlation(got.derivative, want) > least
    assert got.loss == pytest.approx(float(lane_losses(other.graph, batch)[0].mean()), abs=1e-12)


def test_what_layers_read(small: Make) -> None:
    """A tap sees the same inputs; it looks on at a plain pass with the adapter in it."""
    own, other = both(small("llama", "F32"))
    batch = random_batch(20, 33, 20, labels=2)
    want, got = own.input_mean_squares(batch), other.input_mean_squares(batch)
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0.01)


@pytest.mark.parametrize(
    ("name", "type"),
    [
        *((name, "F16") for name in DECODERS),
        ("olmo2", "Q8_0"),
        ("gpt2", "Q8_0"),
        ("mamba", "Q8_0"),
    ],
)
def test_losses_are_llama_cpps(small: Make, tmp_path: Path, name: str, type: str) -> None:
    """Without an adapter and with one that llama.cpp reads from a file; few and all labels."""
    path = small(name, type)
    engine = Engine.load(path, LoRAConfig(4, targets=TARGETS[name]), backend="llama.cpp")
    adapter = engine.adapter
    assert adapter is not None
    noise = noise_of(name, type)
    sequences = (40, 40, 23, 70, 7)
    batches = [random_batch(*sequences), random_batch(*sequences, labels=2)]
    plain = [plain_losses(path, batch) for batch in batches]
    for batch, want in zip(batches, plain, strict=True):
        np.testing.assert_allclose(engine.loss(batch), want, atol=noise, rtol=0)

    rng = np.random.default_rng(0)
    adapter.theta[:] = rng.normal(scale=0.1, size=adapter.theta.size)
    file = tmp_path / "adapter.gguf"
    save_gguf(adapter, file)
    for batch, before in zip(batches, plain, strict=True):
        want = plain_losses(path, batch, file)
        np.testing.assert_allclose(engine.loss(batch), want, atol=noise, rtol=0)
        assert np.abs(want - before).max() > 2 * noise
    again = Engine.load(path, adapter=file, backend="llama.cpp")
    np.testing.assert_array_equal(again.loss(batches[0]), engine.loss(batches[0]))


@pytest.mark.parametrize("name", DECODERS)
def test_each_target_gets_its_term(small: Make, tmp_path: Path, name: str) -> None:
    """Alone, in the last layer, of which llama.cpp may compute the rows of labels only."""
    path = small(name)
    batch = random_batch(24, 24, 31, labels=3)
    plain = Engine.load(path, backend="llama.cpp").loss(batch)
    for target in TARGETS[name]:
        config = LoRAConfig(4, targets=(target,), layers=(1,))
        engine = Engine.load(path, config, backend="llama.cpp")
        adapter = engine.adapter
        assert adapter is not None
        rng = np.random.default_rng(1)
        adapter.theta[:] = rng.normal(scale=0.15, size=adapter.theta.size)
        save_gguf(adapter, tmp_path / "adapter.gguf")
        want = plain_losses(path, batch, tmp_path / "adapter.gguf")
        np.testing.assert_allclose(engine.loss(batch), want, atol=noise_of(name, "F16"), rtol=0)
        assert np.abs(want - plain).max() > 2 * noise_of(name, "F16"), target


def test_an_encoder_is_llama_cpps(small: Make, tmp_path: Path) -> None:
    path = small(ENCODER, "Q8_0")
    texts = ["the cat sat on the mat", "a dog", "what is it that you do " * 5]
    config = LoRAConfig(4, targets=TARGETS[ENCODER])
    engine = Engine.load(path, config, labels=LABELS, backend="llama.cpp")
    adapter = engine.adapter
    assert adapter is not None and engine.encoder
    plain = generation.embed(path, texts, n_threads=1)
    # Of features of about 0.04. Both are llama.cpp, in batches of other sizes: 1.5e-5 with AVX2.
    np.testing.assert_allclose(engine.embed(texts), plain, atol=5e-5)
    adapter.theta[:] = np.random.default_rng(0).normal(scale=0.05, size=adapter.theta.size)
    save_gguf(adapter, tmp_path / "adapter.gguf")
    want = generation.embed(path, texts, tmp_path / "adapter.gguf", n_threads=1)
    np.testing.assert_allclose(engine.embed(texts), want, atol=5e-5)
    assert np.abs(want - plain).max() > 0.01


@pytest.mark.parametrize("labels", [None, 3])
def test_a_sequence_longer_than_a_call(small: Make, tmp_path: Path, labels: int | None) -> None:
    path = small("llama")
    engine = half_trained(Engine.load(path, LoRAConfig(), backend="llama.cpp"))
    batch = random_batch(1000, 30, 700, 30, labels=labels)
    assert engine.adapter is not None
    save_gguf(engine.adapter, tmp_path / "adapter.gguf")
    want = plain_losses(path, batch, tmp_path / "adapter.gguf")
    np.testing.assert_allclose(engine.loss(batch), want, atol=NOISE["F16"], rtol=0)
    own = half_trained(Engine.load(path, LoRAConfig()))
    np.testing.assert_allclose(own.loss(batch), want, atol=NOISE["F16"], rtol=0)
    ids = batch.ids[:1000].tolist()
    got = engine.logits(ids)
    assert got.shape == (1000, SHAPE.n_vocab)
    np.testing.assert_allclose(
        got, generation.logits(path, ids, tmp_path / "adapter.gguf", n_threads=1), atol=0.02
    )


def test_a_context_grows_and_is_used_again(small: Make) -> None:
    engine = tuned(small("olmo2"), "olmo2")
    short, long = random_batch(10, 12), random_batch(CONTEXT, 300)
    first = engine.loss(short)
    after = [engine.loss(long), engine.loss(short), engine.loss(long)]
    np.testing.assert_array_equal(after[0], after[2])
    # More cells than a sequence needs do not change what it attends to.
    np.testing.assert_allclose(after[1], first, atol=1e-5)
