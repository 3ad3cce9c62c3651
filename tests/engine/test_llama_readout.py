"""The gradient of the last ffn_down on llama.cpp, against our own graphs and differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_models import TARGETS, make_family
from llama_models import ENCODER, LABELS, OWN_FAMILIES, SEEDS, Make, random_batch
from real_models import smollm2

from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, Example, LoRAConfig
from fwdllm.engine.backends import choose
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.llamacpp import context, readout
from fwdllm.engine.llamacpp import graph as llama_graph
from fwdllm.engine.llamacpp.ggml import layout

__all__ = ["smollm2"]  # a fixture

LENGTHS = (40, 33, 21, 40, 9)
FAMILIES = [*OWN_FAMILIES, "phi3", "granite", "smollm3"]
# How far the gradient may be from our own, relative to its length, and the cosine of the two.
# llama.cpp keeps keys and values in float16, and rounds activations where weights are quantized.
# Measured: 0.0002 to 0.001 of F32 files, 0.003 to 0.007 of Q4_0 ones.
CLOSE = {"F32": (0.004, 0.99998), "Q4_0": (0.03, 0.9995)}
# Architectures that have no graph of ours, with all that the last layers have in some: a norm of
# the mean, too, biases, a parallel residual, a norm behind ffn_down, no gate.
OTHERS = ["gpt2", "gptneox", "stablelm", "olmo2"]


def load(path: Path, rank: int = 4, seed: int = 0, **options: Any) -> Engine:
    """An engine, by default on llama.cpp, with random factors of the last ffn_down."""
    options.setdefault("backend", "llama.cpp")
    n_layers = choose(GGUFFile.open(path)).args.n_layers
    config = LoRAConfig(rank, targets=("ffn_down",), layers=(n_layers - 1,))
    engine = Engine.load(path, config, **options)
    assert engine.adapter is not None
    target, theta = engine.adapter.targets[0], engine.adapter.theta
    rng = np.random.default_rng(seed)
    theta[:] = rng.normal(size=theta.size) / target.n_in**0.5
    theta[rank * target.n_in :] *= 2
    return engine


def model_of(small: Make, folder: Path, name: str, type: str) -> Path:
    if name in TARGETS:
        return make_family(folder / "model.gguf", name, type)
    return small(name, type)


def distance(got: np.ndarray, want: np.ndarray) -> tuple[float, float]:
    """The difference relative to ``want``, and the cosine."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    length = np.linalg.norm(want)
    return float(np.linalg.norm(got - want) / length), float(
        got @ want / length / np.linalg.norm(got)
    )


def assert_close(got: np.ndarray, want: np.ndarray, error: float, cosine: float) -> None:
    found = distance(got, want)
    assert found[0] < error and found[1] > cosine, found


@pytest.mark.parametrize("type", CLOSE)
@pytest.mark.parametrize("name", FAMILIES)
def test_our_own_gradient(small: Make, tmp_path: Path, name: str, type: str) -> None:
    """Of B, which gets most of it, and of A alone."""
    path = model_of(small, tmp_path, name, type)
    own = load(path, backend="fwdllm", exact=type == "F32")
    other = load(path)
    assert own.adapter is not None and other.adapter is not None
    batch = random_batch(*LENGTHS, labels=6)
    want_losses, want = own.graph.token_gradient(batch)
    losses, got = other.graph.token_gradient(batch)
    np.testing.assert_array_equal(losses, other.graph.token_losses(batch)[0])
    np.testing.assert_allclose(losses, want_losses, atol=0.2)
    assert got.dtype == np.float32 and got.shape == other.adapter.theta.shape
    n = 4 * own.adapter.targets[0].n_in
    for part in (slice(0, n), slice(n, None)):
        assert_close(got[part], want[part], *CLOSE[type])


@pytest.mark.parametrize("type", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", OTHERS)
def test_differences(small: Make, name: str, type: str) -> None:
    """Slopes along random directions. Measured: 0.0005 apart, and 0.006 of Q4_0 files."""
    engine = load(small(name, type))
    batch = random_batch(*LENGTHS, labels=6)
    _, found = engine.graph.token_gradient(batch)
    got = engine.directions.dot(engine.directions.project(found), SEEDS[:8])
    want = engine.directional_derivatives(batch, SEEDS[:8], "central", 1e-3).derivative
    assert_close(got, want, 0.003 if type == "F32" else 0.03, 0.9995)


def test_the_small_number_in_a_norm(tmp_path: Path) -> None:
    """It is large in none of the other models."""
    path = make_family(tmp_path / "model.gguf", "phi3", **{"attention.layer_norm_rms_epsilon": 0.5})
    engine, batch = load(path), random_batch(*LENGTHS, labels=6)
    got = engine.graph.token_gradient(batch)[1]
    want = load(path, backend="fwdllm", exact=True).graph.token_gradient(batch)[1]
    assert_close(got, want, *CLOSE["F32"])


@pytest.mark.parametrize("labels", [2, None])
def test_rows_in_several_calls(
    small: Make, monkeypatch: pytest.MonkeyPatch, labels: int | None
) -> None:
    """Of long sequences by pieces, some of which have no labels."""
    batch = random_batch(60, 20, 60, 33, 7, labels=labels)
    want_losses, want = load(small("llama", "F32")).graph.token_gradient(batch)
    monkeypatch.setattr(llama_graph, "_ROWS", 24)
    losses, got = load(small("llama", "F32")).graph.token_gradient(batch)
    np.testing.assert_allclose(losses, want_losses, atol=2e-3)
    assert_close(got, want, 0.003, 0.9999)


def test_a_batch_is_the_mean_of_its_labels(small: Make) -> None:
    """Sequences of different lengths, and with other numbers of labels, one after the other."""
    engine = load(small("olmo2", "F32"))
    batch = random_batch(50, 9, 50, 21)
    losses, whole = engine.graph.token_gradient(batch)
    alone = [batch.sequences(i, i + 1) for i in range(batch.n_sequences)]
    found = [engine.graph.token_gradient(part) for part in alone]
    np.testing.assert_allclose(losses, np.concatenate([nll for nll, _ in found]), atol=1e-4)
    mean = sum(g * part.n_labels for (_, g), part in zip(found, alone, strict=True))
    assert_close(whole, mean / batch.n_labels, 1e-3, 0.99999)


def test_micro_batches_in_any_order(small: Make) -> None:
    """What the ways of two micro-batches add up to does not depend on how their rows are mixed."""
    engine = load(small("llama", "F32"))
    reader = readout.Readout(engine.file, engine.adapter, layout(), engine.ops)  # type: ignore
    rng, n = np.random.default_rng(0), 6
    logits = rng.normal(size=(n, engine.args.n_vocab)).astype(np.float32)
    labels = rng.integers(0, engine.args.n_vocab, n).astype(np.int32)
    m = rng.normal(size=(n, reader.target.n_in)).astype(np.float32)
    x = rng.normal(size=(n, engine.args.width)).astype(np.float32)
    rows, found = np.array([3, 4, 8, 9, 11, 20]), []
    for order in ([range(n)], [[1, 0], [5, 2, 4, 3]]):
        reader.gradient[:] = 0
        reader.follower.ways = [
            readout.Way(
                rows[list(some)],
                m[list(some)],
                [
                    readout.Step("MUL_MAT", 1, (), "output.weight"),
                    readout.Step("RMS_NORM", 2, (1e-5,), None, x[list(some)]),
                ],
            )
            for some in order
        ]
        losses = reader.add(logits.copy(), labels)
        found.append((losses, reader.gradient.copy()))
    np.testing.assert_allclose(found[1][0], found[0][0], rtol=1e-6)
    assert_close(found[1][1], found[0][1], 1e-5, 0.99999)


@pytest.mark.parametrize("labels", [3, None])
def test_real_micro_batches(
    small: Make, monkeypatch: pytest.MonkeyPatch, labels: int | None
) -> None:
    """llama.cpp splits equal sequences side by side, so its rows are not in a call's order."""
    batch = random_batch(20, 20, 20, 31, labels=labels)
    want_losses, want = load(small("llama", "F32")).graph.token_gradient(batch)
    opened = context.open_context

    def in_small_ones(model: Any, **options: Any) -> Any:
        return opened(model, **options | {"n_ubatch": 16})

    monkeypatch.setattr(context, "open_context", in_small_ones)
    engine = load(small("llama", "F32"))
    losses, got = engine.graph.token_gradient(batch)
    np.testing.assert_allclose(losses, want_losses, atol=2e-3)
    assert_close(got, want, 0.003, 0.9999)
    orders = [shape.orders for shape in engine.graph._context._shapes.values()]  # type: ignore
    assert any(len(some) > 1 and (np.diff(np.concatenate(some)) < 0).any() for some in orders)


def gradient(engine: Engine, batch: Batch | None = None) -> np.ndarray:
    return engine.graph.token_gradient(batch or random_batch(12, 20))[1]


def test_other_adapters(small: Make) -> None:
    path = small("llama")
    for targets, layers, why in (
        (("ffn_down",), (0, 1), "alone, without blk.0.ffn_down"),
        (("ffn_down",), (0,), "alone, without blk.0.ffn_down"),
        (("attn_q", "ffn_down"), (1,), "alone, without blk.1.attn_q"),
        (("ffn_up",), (1,), "alone, without blk.1.ffn_up"),
    ):
        config = LoRAConfig(2, targets=targets, layers=layers)
        engine = half_trained(Engine.load(path, config, backend="llama.cpp"))
        with pytest.raises(ConfigError, match=why):
            gradient(engine)
    with pytest.raises(ConfigError, match="needs an adapter"):
        gradient(Engine.load(path, backend="llama.cpp"))


@pytest.mark.parametrize(
    ("name", "target"),
    [("mixtral", "attn_q"), ("qwen2moe", "ffn_down_shexp"), ("mamba", "ssm_out")],
)
def test_layers_without_the_matrix(small: Make, name: str, target: str) -> None:
    config = LoRAConfig(2, targets=(target,), layers=(1,))
    engine = half_trained(Engine.load(small(name), config, backend="llama.cpp"))
    with pytest.raises(ConfigError, match=r"has no blk\.1\.ffn_down"):
        gradient(engine)


def test_encoders(small: Make) -> None:
    config = LoRAConfig(2, targets=("ffn_down",), layers=(1,))
    engine = Engine.load(small(ENCODER), config, labels=LABELS, backend="llama.cpp")
    with pytest.raises(ConfigError, match="encoder"):
        gradient(engine)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        ("llama", "ADD"),
        ("llama", "MUL"),
        ("llama", "RMS_NORM"),
        ("gpt2", "NORM"),
        ("gemma2", "UNARY"),
        ("gemma2", "SCALE"),
    ],
)
def test_an_operation_that_is_unknown(
    small: Make, monkeypatch: pytest.MonkeyPatch, name: str, operation: str
) -> None:
    """The engine goes on afterwards."""
    known = layout()
    engine = load(small(name, "F32"))
    batch = random_batch(12, 20)
    want = engine.graph.token_losses(batch)
    fewer = {n: found for n, found in known.operations.items() if found != operation}
    with monkeypatch.context() as changed:
        changed.setattr(llama_graph, "layout", lambda: replace(known, operations=fewer))
        with pytest.raises(ConfigError, match="has the operation number"):
            gradient(engine, batch)
    np.testing.assert_array_equal(engine.graph.token_losses(batch), want)
    gradient(engine, batch)


@pytest.mark.parametrize("name", ["llama", "gptneox", "mamba"])
def test_a_layer_before_the_last(small: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The way itself is refused: around the next layer, and through it."""
    target = "ssm_out" if name == "mamba" else "ffn_down"
    config = LoRAConfig(2, targets=(target,), layers=(0,))
    engine = half_trained(Engine.load(small(name), config, backend="llama.cpp"))
    monkeypatch.setattr(readout, "target_of", lambda _, adapter: adapter.targets[0])
    with pytest.raises(ConfigError, match="two ways from it"):
        gradient(engine)


def test_a_product_that_is_not_computed(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load(small("llama"))
    asked = readout.Follower._is_product
    monkeypatch.setattr(readout.Follower, "_is_product", lambda self, node: False)
    with pytest.raises(ConfigError, match="does not lead to logits"):
        gradient(engine)
    monkeypatch.setattr(readout.Follower, "_is_product", asked)
    gradient(engine)


def test_another_function_than_tanh(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    known = layout()
    engine = load(small("gemma2", "F32"))
    monkeypatch.setattr(llama_graph, "layout", lambda: replace(known, tanh=known.tanh + 1))
    with pytest.raises(ConfigError, match="has the operation UNARY"):
        gradient(engine)


def test_a_gradient_that_is_wrong(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences tell, once for an engine."""
    engine, batch = load(small("gemma2", "Q4_0")), random_batch(12, 20)
    through = readout.Readout._through

    def wrong(self: readout.Readout, step: readout.Step, dy: np.ndarray) -> np.ndarray:
        return dy if step.name == "RMS_NORM" else through(self, step, dy)

    with monkeypatch.context() as changed:
        changed.setattr(readout.Readout, "_through", wrong)
        for _ in range(2):
            with pytest.raises(ConfigError, match="does not change along"):
                gradient(engine, batch)
    gradient(engine, batch)
    monkeypatch.setattr(readout.Readout, "_through", wrong)
    gradient(engine, batch)


def test_nothing_to_check_by(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient of zero says nothing; the next one is checked."""
    engine = load(small("llama", "F32"))
    assert engine.adapter is not None
    theta = engine.adapter.theta.copy()
    engine.adapter.theta[:] = 0
    assert not gradient(engine).any()
    engine.adapter.theta[:] = theta
    monkeypatch.setattr(llama_graph, "slope_agrees", lambda *_: False)
    with pytest.raises(ConfigError, match="does not change along"):
        gradient(engine)


def test_smollm2(smollm2: Path) -> None:
    """Q4_1. Measured: 0.06 apart, a cosine of 0.998; of longer texts 0.03 and 0.9998."""
    text = "The cat sat on the mat and thought about the weather of the week before."
    own, other = load(smollm2, 8, backend="fwdllm"), load(smollm2, 8)
    batch = own.encode([Example(text=text), Example(text=text[:40])])
    want, got = (engine.graph.token_gradient(batch)[1] for engine in (own, other))
    assert_close(got, want, 0.15, 0.99)
