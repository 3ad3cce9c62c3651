"""Gemma, Gemma 2 and Gemma 3 by our own graph, on small models with windows and soft caps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from changed_models import changed
from gemma_models import GEMMAS, LINEAR, TINY, VOCAB, WINDOW, make_gemma
from llama_models import correlation, plain_losses
from test_parity import mean_kl

from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.backends import choose
from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.errors import ModelError, UnsupportedError
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.memory.plan import GradientPlan
from fwdllm.kernels import cpu
from fwdllm.kernels.types import QuantType

# llama.cpp has a table of GELU in float16, which is most of how far apart logits of about 1 are.
NOISE = 0.01
SEEDS = np.arange(32, dtype=np.uint64) + 1000
IDS = np.random.default_rng(1).integers(3, VOCAB, 70).tolist()
Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes the model of an architecture and a type, once."""
    folder = tmp_path_factory.mktemp("gemma")

    def made(architecture: str, type: str = "F32") -> Path:
        path = folder / f"{architecture}.{type}.gguf"
        return path if path.exists() else make_gemma(path, architecture, QuantType[type])

    return made


def some_batch(*lengths: int) -> Batch:
    rng = np.random.default_rng(0)
    return pack([Tokens(rng.integers(3, VOCAB, n).tolist(), [True] * n) for n in lengths])


BATCH = (40, 7, 25)


def load(path: Path, targets: tuple[str, ...] = LINEAR, **options: Any) -> Engine:
    engine = half_trained(Engine.load(path, LoRAConfig(3, targets=targets), **options))
    assert engine.backend.own
    return engine


def difference(path: Path) -> float:
    """Of logits from llama.cpp's, the largest."""
    return float(np.abs(Engine.load(path).logits(IDS) - generation.logits(path, IDS)).max())


@pytest.mark.parametrize("architecture", GEMMAS)
def test_logits_are_llama_cpps(make: Make, architecture: str) -> None:
    assert difference(make(architecture)) < NOISE


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("architecture", GEMMAS)
def test_logits_of_quantized_models(make: Make, architecture: str, type: str) -> None:
    path = make(architecture, type)
    want = generation.logits(path, IDS)
    for exact in (False, True):
        kl = mean_kl(want, Engine.load(path, exact=exact).logits(IDS))
        assert kl < 1e-3, f"KL {kl:.2e} nats a token with {exact=}"


# Metadata of files as they are, and what it is where it is not said.
VARIANTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "27B of Gemma 2": ("gemma2", TINY, 46),
    "27B of Gemma 3": ("gemma3", TINY, 62),
    "RoPE of windows in Gemma 2": (
        "gemma2",
        {"rope.freq_base_swa": 300.0, "rope.scaling.factor": 4.0},
        2,
    ),
    "caps of Gemma 2": (
        "gemma2",
        {"attn_logit_softcapping": None, "final_logit_softcapping": None},
        2,
    ),
    "windows of Gemma 3": (
        "gemma3",
        {"attention.sliding_window_pattern": None, "rope.freq_base_swa": None},
        7,
    ),
    "windows everywhere": (
        "gemma3",
        {"attention.sliding_window_pattern": 0, "attention.sliding_window": 1},
        2,
    ),
    "windows nowhere": (
        "gemma3",
        {"attention.sliding_window": 0, "final_logit_softcapping": 2.0},
        2,
    ),
}


@pytest.mark.parametrize(("architecture", "metadata", "n_layers"), VARIANTS.values(), ids=VARIANTS)
def test_what_metadata_means(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], n_layers: int
) -> None:
    path = make_gemma(tmp_path / "m.gguf", architecture, metadata=metadata, n_layers=n_layers)
    assert difference(path) < NOISE


def test_a_pattern_of_layers(make: Make, tmp_path: Path) -> None:
    source, key = make("gemma3"), "gemma3.attention.sliding_window_pattern"
    names = {"general.architecture": "gemma3"}
    path = changed(tmp_path / "m.gguf", source, {**names, key: [False, True, True, False]})
    assert Engine.load(path).args.windows == (0, WINDOW, WINDOW, 0)
    assert difference(path) < NOISE
    for bad in ([True, False], [3, 1, 0, 1]):
        path = changed(tmp_path / f"{len(bad)}.gguf", source, {**names, key: bad})
        with pytest.raises(ModelError, match="is not a bool for each of 4 layers"):
            Engine.load(path)


@pytest.mark.parametrize("architecture", GEMMAS)
def test_an_adapter_is_llama_cpps(make: Make, tmp_path: Path, architecture: str) -> None:
    engine, batch = load(make(architecture)), some_batch(*BATCH)
    assert engine.adapter is not None
    save_gguf(engine.adapter, tmp_path / "adapter.gguf")
    want = plain_losses(make(architecture), batch, tmp_path / "adapter.gguf")
    np.testing.assert_allclose(engine.loss(batch), want, atol=1e-3, rtol=0)
    assert np.abs(engine.loss(batch) - Engine.load(make(architecture)).loss(batch)).max() > 0.01


@pytest.mark.parametrize("architecture", GEMMAS)
def test_slopes(make: Make, architecture: str) -> None:
    """Of the way back, of tangents and of differences: each has code of its own."""
    engine, batch = load(make(architecture), exact=True), some_batch(*BATCH)
    found = {
        method: engine.directional_derivatives(batch, SEEDS[:8], method, epsilon=1e-3)
        for method in ("backprop", "forward-ad", "central")
    }
    back, forward, central = (probe.derivative for probe in found.values())
    assert found["backprop"].loss == pytest.approx(found["forward-ad"].loss, rel=1e-6)
    np.testing.assert_allclose(back, forward, atol=1e-4 * np.abs(forward).max())
    np.testing.assert_allclose(back, central, atol=0.02 * np.abs(central).max())


@pytest.mark.parametrize("architecture", GEMMAS)
def test_slopes_of_rounded_activations(make: Make, architecture: str) -> None:
    batch = some_batch(*BATCH)
    exact = load(make(architecture, "Q4_0"), exact=True)
    want = exact.directional_derivatives(batch, SEEDS, "backprop").derivative
    engine = load(make(architecture, "Q4_0"))
    for method, least in (("backprop", 0.999), ("forward-ad", 0.999), ("central", 0.98)):
        got = engine.directional_derivatives(batch, SEEDS, method).derivative
        assert correlation(got, want) > least, method


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_the_other_kernels_agree(make: Make, architecture: str) -> None:
    batch, slopes, gradients = some_batch(20, 12), [], []
    for device in ("cpu", "reference"):
        engine = load(make(architecture), ("attn_q", "ffn_down"), exact=True, device=device)
        slopes.append(engine.directional_derivatives(batch, SEEDS[:3]).derivative)
        gradients.append(engine.gradient(batch).values)
    np.testing.assert_allclose(*slopes, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(*gradients, rtol=1e-3, atol=1e-4 * np.abs(gradients[1]).max())


@pytest.mark.parametrize("method", ["backprop", "forward-ad", "central"])
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3"])
def test_a_seed_has_its_bits_in_any_company(make: Make, architecture: str, method: str) -> None:
    engine, batch, before = load(make(architecture, "Q4_0")), some_batch(*BATCH), cpu.num_threads()
    try:
        cpu.set_num_threads(3)
        together = engine.directional_derivatives(batch, SEEDS[:4], method).derivative
        losses = engine.loss(batch)
        cpu.set_num_threads(1)
        alone = [
            engine.directional_derivatives(batch, SEEDS[i : i + 1], method).derivative[0]
            for i in range(4)
        ]
    finally:
        cpu.set_num_threads(before)
    np.testing.assert_array_equal(together, alone)
    of_each = [engine.loss(batch.sequences(i, i + 1))[0] for i in range(len(BATCH))]
    np.testing.assert_array_equal(losses, of_each)


@pytest.mark.parametrize("plan", [(8, 1, 0, 0), (30, 1000, None, 2)])
def test_blocks_and_kept_layers_change_no_bit(
    make: Make, monkeypatch: pytest.MonkeyPatch, plan: tuple[int, int, int | None, int]
) -> None:
    engine, batch = load(make("gemma2", "Q8_0")), some_batch(*BATCH)
    want = engine.gradient(batch)
    monkeypatch.setattr(engine.graph, "plan_gradient", lambda batch, first: GradientPlan(*plan))
    np.testing.assert_array_equal(engine.gradient(batch).values, want.values)


@pytest.mark.parametrize(
    ("architecture", "metadata", "words"),
    [
        ("gemma2", {"attention.sliding_window": 0}, "'gemma2.attention.sliding_window' is 0"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "'gemma2.attn_logit_softcapping' is -1.0"),
        ("gemma2", {"final_logit_softcapping": float("nan")}, "nan, not finite"),
        ("gemma2", {"final_logit_softcapping": 0.0}, "a soft cap is 0"),
        ("gemma3", {"final_logit_softcapping": -2.0}, "below 0"),
        ("gemma3", {"attention.sliding_window": 3.5}, "of type float, not an integer"),
        ("gemma3", {"rope.freq_base_swa": 0.0}, "RoPE base 0.0 of layers with a window"),
        ("gemma3", {"attention.head_count_kv": 3}, "4 heads over 3 do not fit"),
    ],
)
def test_metadata_without_sense(
    tmp_path: Path, architecture: str, metadata: dict[str, Any], words: str
) -> None:
    path = make_gemma(tmp_path / "m.gguf", architecture, QuantType.Q8_0, metadata, n_layers=1)
    with pytest.raises(ModelError, match=words) as raised:
        Engine.load(path)
    assert not isinstance(raised.value, UnsupportedError)


def test_a_negative_window(make: Make, tmp_path: Path) -> None:
    keys = {"general.architecture": "gemma3", "gemma3.attention.sliding_window": -1.0}
    with pytest.raises(ModelError, match="sliding_window"):
        Engine.load(changed(tmp_path / "m.gguf", make("gemma3"), keys))


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope.scaling.type": "yarn"},
        {"attention.key_length_swa": 64},
        {"rope.dimension_count_swa": 32},
        {"attention.causal": False},
    ],
    ids=lambda metadata: next(iter(metadata)),
)
def test_what_our_graph_does_not_know(tmp_path: Path, metadata: dict[str, Any]) -> None:
    path = make_gemma(tmp_path / "m.gguf", "gemma3", QuantType.Q8_0, metadata, n_layers=1)
    backend = choose(GGUFFile.open(path))
    assert backend.name == "llama.cpp" and backend.reason


@pytest.mark.parametrize("name", ["post_attention_norm", "attn_q_norm", "post_ffw_norm"])
def test_a_norm_that_is_missing(make: Make, tmp_path: Path, name: str) -> None:
    tensor = f"blk.1.{name}.weight"
    names = {"general.architecture": "gemma3"}
    path = changed(tmp_path / "m.gguf", make("gemma3"), names, {tensor: None})
    with pytest.raises(ModelError, match=f"has no tensor '{tensor}'"):
        Engine.load(path)
    extra = {f"blk.1.{name}.bias": np.ones(4, np.float32)}
    path = changed(tmp_path / "n.gguf", make("gemma3"), names, extra)
    assert choose(GGUFFile.open(path)).name == "llama.cpp"
