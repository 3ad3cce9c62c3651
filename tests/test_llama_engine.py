"""The engine on llama.cpp: against our own graphs, against plain llama.cpp, and its invariances."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from fwdllm.bench.architectures import ARCHITECTURES, CONTEXT, VOCAB, make_small
from fwdllm.bench.inputs import half_trained
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder, write_model
from fwdllm.engine import Engine, Example, LoRAConfig, llama_cpp, llamacpp, read_jsonl
from fwdllm.engine.backends import Backend, choose
from fwdllm.engine.batch import Batch, Tokens, pack
from fwdllm.engine.directions import Dense, Directions, DirectionsConfig, Scope
from fwdllm.engine.errors import (
    ConfigError,
    FwdllmError,
    ModelError,
    NumericsError,
    UnsupportedError,
)
from fwdllm.engine.estimators import example_seeds, plan
from fwdllm.engine.forward import Variants
from fwdllm.engine.gguf_file import GGUFFile
from fwdllm.engine.llama_context import Context
from fwdllm.kernels import cpu
from fwdllm.kernels.types import Lanes, QuantType

SEEDS = np.arange(32, dtype=np.uint64) + 1000
LABELS = ("negative", "positive")
ENCODER = "modern-bert"
DECODERS = [name for name in ARCHITECTURES if name != ENCODER]
OWN_FAMILIES = ["llama", "qwen2", "qwen3"]
SHAPE = Shape(2, 256, 4, 2, 64, 512, 2048, context=1024)

# At least one matrix of each kind that a model multiplies with.
TARGETS = {
    "gemma2": ("attn_q", "attn_v", "ffn_down", "ffn_up"),
    "phi3": ("attn_qkv", "ffn_down", "ffn_up"),
    "gpt2": ("attn_output", "attn_qkv", "ffn_down"),
    "gptneox": ("attn_qkv", "ffn_down", "ffn_up"),
    "granite": ("attn_k", "attn_v", "ffn_down", "ffn_gate"),
    "stablelm": ("attn_output", "attn_q", "attn_v", "ffn_down"),
    "mixtral": ("attn_q", "attn_v", "ffn_gate_inp"),
    "qwen2moe": ("attn_q", "attn_v", "ffn_down_shexp", "ffn_gate_inp", "ffn_up_shexp"),
    "mamba": ("ssm_dt", "ssm_in", "ssm_out", "ssm_x"),
    ENCODER: ("attn_qkv", "ffn_down", "ffn_up"),
}

# How far apart losses of an example may be, in nats: llama.cpp rounds activations to int8 where
# weights are quantized, and the engine lets it keep keys and values in float16. Measured: at most
# 0.0015 (gemma2) and 0.014. Where a token goes to another expert for that, 0.0034 at once.
NOISE = {"F16": 3e-3, "Q8_0": 0.04}
EXPERT_NOISE = {"F16": 0.015, "Q8_0": 0.04}


def noise_of(name: str, type: str) -> float:
    return (EXPERT_NOISE if name in ("mixtral", "qwen2moe") else NOISE)[type]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model of an architecture, once."""
    folder = tmp_path_factory.mktemp("models")

    def make(name: str, type: str = "F16") -> Path:
        path = folder / f"{name}.{type}.gguf"
        if not path.exists():
            if name in OWN_FAMILIES:
                make_decoder(path, replace(SHAPE, architecture=name), QuantType[type], seed=1)
            else:
                make_small(path, name, QuantType[type])
        return path

    return make


Make = Callable[..., Path]


def tuned(path: Path, name: str, rank: int = 2, **options: Any) -> Engine:
    """An engine with a half trained adapter."""
    options.setdefault("labels", LABELS if name == ENCODER else ())
    return half_trained(Engine.load(path, LoRAConfig(rank, targets=TARGETS[name]), **options))


def random_batch(*lengths: int, labels: int | None = None, encoder: bool = False) -> Batch:
    """Sequences of random tokens. labels: how many last ones count, by default all."""
    rng = np.random.default_rng(len(lengths))
    return pack(
        [
            Tokens(
                rng.integers(3, VOCAB, n).tolist(),
                [not encoder and (labels is None or i >= n - labels) for i in range(n)],
                k % 2 if encoder else None,
            )
            for k, n in enumerate(lengths)
        ]
    )


def correlation(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.corrcoef(got, want)[0, 1])


def plain_losses(path: Path, batch: Batch, adapter: Path | None = None) -> np.ndarray:
    """Of each example, by llama.cpp alone: float64 [n_examples]."""
    losses = []
    for i in range(batch.n_sequences):
        one = batch.sequences(i, i + 1)
        logits = llamacpp.logits(path, one.ids.tolist(), adapter, n_threads=1)
        rows = logits[one.label_rows].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        losses.append(-rows[np.arange(one.n_labels), one.label_ids].mean())
    return np.array(losses)


# ---------------------------------------------------------------- against our own graphs


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
CLOSE = {"F16": (1e-3, 0.999), "Q8_0": (0.05, 0.995), "Q4_0": (0.05, 0.995)}


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
    assert got.loss == pytest.approx(float(other.lane_losses(batch)[0].mean()), abs=1e-12)


def test_what_layers_read(small: Make) -> None:
    """A tap sees the same inputs; it looks on at a plain pass with the adapter in it."""
    own, other = both(small("llama", "F32"))
    batch = random_batch(20, 33, 20, labels=2)
    want, got = own.input_mean_squares(batch), other.input_mean_squares(batch)
    assert want.keys() == got.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0.01)


# ------------------------------------------------------------------- against plain llama.cpp


@pytest.mark.parametrize(
    ("name", "type"),
    [
        *((name, "F16") for name in DECODERS),
        ("gemma2", "Q8_0"),
        ("gpt2", "Q8_0"),
        ("mamba", "Q8_0"),
    ],
)
def test_losses_are_llama_cpps(small: Make, tmp_path: Path, name: str, type: str) -> None:
    """Without an adapter and with one that llama.cpp reads from a file; few and all labels."""
    path = small(name, type)
    engine = Engine.load(path, LoRAConfig(4, targets=TARGETS[name]))
    assert engine.backend.name == "llama.cpp" and engine.backend.reason
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
    adapter.save(file)
    for batch, before in zip(batches, plain, strict=True):
        want = plain_losses(path, batch, file)
        np.testing.assert_allclose(engine.loss(batch), want, atol=noise, rtol=0)
        assert np.abs(want - before).max() > 2 * noise
    again = Engine.load(path, adapter=file)
    np.testing.assert_array_equal(again.loss(batches[0]), engine.loss(batches[0]))


@pytest.mark.parametrize("name", DECODERS)
def test_each_target_gets_its_term(small: Make, tmp_path: Path, name: str) -> None:
    """Alone, in the last layer, of which llama.cpp may compute the rows of labels only."""
    path = small(name)
    batch = random_batch(24, 24, 31, labels=3)
    plain = Engine.load(path).loss(batch)
    for target in TARGETS[name]:
        engine = Engine.load(path, LoRAConfig(4, targets=(target,), layers=(1,)))
        adapter = engine.adapter
        assert adapter is not None
        rng = np.random.default_rng(1)
        adapter.theta[:] = rng.normal(scale=0.15, size=adapter.theta.size)
        adapter.save(tmp_path / "adapter.gguf")
        want = plain_losses(path, batch, tmp_path / "adapter.gguf")
        np.testing.assert_allclose(engine.loss(batch), want, atol=noise_of(name, "F16"), rtol=0)
        assert np.abs(want - plain).max() > 2 * noise_of(name, "F16"), target


def test_an_encoder_is_llama_cpps(small: Make, tmp_path: Path) -> None:
    path = small(ENCODER, "Q8_0")
    texts = ["the cat sat on the mat", "a dog", "what is it that you do " * 5]
    engine = Engine.load(path, LoRAConfig(4, targets=TARGETS[ENCODER]), labels=LABELS)
    adapter = engine.adapter
    assert adapter is not None and engine.encoder and engine.backend.name == "llama.cpp"
    plain = llamacpp.embed(path, texts, n_threads=1)
    np.testing.assert_allclose(engine.embed(texts), plain, atol=1e-5)
    adapter.theta[:] = np.random.default_rng(0).normal(scale=0.05, size=adapter.theta.size)
    adapter.save(tmp_path / "adapter.gguf")
    want = llamacpp.embed(path, texts, tmp_path / "adapter.gguf", n_threads=1)
    np.testing.assert_allclose(engine.embed(texts), want, atol=1e-5)
    assert np.abs(want - plain).max() > 0.01


@pytest.mark.parametrize("labels", [None, 3])
def test_a_sequence_longer_than_a_call(small: Make, tmp_path: Path, labels: int | None) -> None:
    path = small("llama")
    engine = half_trained(Engine.load(path, LoRAConfig(), backend="llama.cpp"))
    batch = random_batch(1000, 30, 700, 30, labels=labels)
    assert engine.adapter is not None
    engine.adapter.save(tmp_path / "adapter.gguf")
    want = plain_losses(path, batch, tmp_path / "adapter.gguf")
    np.testing.assert_allclose(engine.loss(batch), want, atol=NOISE["F16"], rtol=0)
    own = half_trained(Engine.load(path, LoRAConfig()))
    np.testing.assert_allclose(own.loss(batch), want, atol=NOISE["F16"], rtol=0)
    ids = batch.ids[:1000].tolist()
    got = engine.logits(ids)
    assert got.shape == (1000, SHAPE.n_vocab)
    np.testing.assert_allclose(
        got, llamacpp.logits(path, ids, tmp_path / "adapter.gguf", n_threads=1), atol=0.02
    )


@pytest.mark.parametrize("name", ["gemma2", "mamba"])
def test_small_calls(small: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Sequences that are read piece by piece, as long ones or with a large vocabulary."""
    batch = random_batch(60, 20, 60, 33, labels=40)
    want = tuned(small(name), name).loss(batch)
    monkeypatch.setattr(llama_cpp, "_ROWS", 24)
    engine = tuned(small(name), name)
    np.testing.assert_allclose(engine.loss(batch), want, atol=noise_of(name, "F16"), rtol=0)
    assert_lanes_are_alone(engine, batch)


def test_a_context_grows_and_is_used_again(small: Make) -> None:
    engine = tuned(small("gemma2"), "gemma2")
    short, long = random_batch(10, 12), random_batch(CONTEXT, 300)
    first = engine.loss(short)
    after = [engine.loss(long), engine.loss(short), engine.loss(long)]
    np.testing.assert_array_equal(after[0], after[2])
    # More cells than a sequence needs do not change what it attends to.
    np.testing.assert_allclose(after[1], first, atol=1e-5)


# -------------------------------------------------------------------------- invariances


def assert_lanes_are_alone(
    engine: Engine, batch: Batch, method: str = "central", tolerance: float = 0.0
) -> None:
    """All seeds in one call, each seed's lanes alone, and each example alone: the same bits.

    Of an encoder those of the features, from which the head makes its losses.
    """

    def same(found: np.ndarray, want: np.ndarray) -> None:
        np.testing.assert_allclose(found, want, rtol=0, atol=tolerance)

    p = plan(SEEDS[:3], method, 1e-2)
    first, per_seed = int(p.plain), 2 if method == "central" else 1
    whole = outputs(engine, batch, p.lanes)
    assert len({row.tobytes() for row in whole}) == len(p.lanes)
    for k, lanes in enumerate(p.parts(1)):
        alone, at = outputs(engine, batch, lanes), first + k * per_seed
        same(alone[first:], whole[at : at + per_seed])
        same(alone[:first], whole[:first])
    for i in range(batch.n_sequences):
        alone = outputs(engine, batch.sequences(i, i + 1), p.lanes)
        mine = [i] if engine.encoder else batch.label_sequence == i
        same(alone, whole[:, mine])


def outputs(engine: Engine, batch: Batch, lanes: Lanes) -> np.ndarray:
    """Losses [n_lanes, n_labels], or an encoder's features [n_lanes, n_sequences, width]."""
    losses, features = engine.lane_losses(batch, Variants(lanes, engine.directions))
    return losses if features is None else features.reshape(len(lanes), batch.n_sequences, -1)


COMPANY = {
    "equal": ("central", (17, 17, 17)),
    "different": ("forward-difference", (17, 9, 40, 17)),
}


@pytest.mark.parametrize(("method", "lengths"), COMPANY.values(), ids=COMPANY)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bits_do_not_depend_on_company(
    small: Make, name: str, method: str, lengths: Sequence[int]
) -> None:
    engine = tuned(small(name, "Q8_0"), name)
    assert_lanes_are_alone(engine, random_batch(*lengths, encoder=engine.encoder), method)


# llama.cpp's own kernels for K-quants add in another order where there are less than 8 rows, and
# for Q4_K in rows left over from blocks of 4: 1e-7 was seen, and a rounding may follow.
TYPES = ["Q4_0", "Q4_1", "Q8_0", "BF16", "F32", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("lengths", [(5, 7), (17, 26)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("type", TYPES)
def test_bits_of_each_type(small: Make, type: str, lengths: Sequence[int]) -> None:
    config = LoRAConfig(2, targets=("attn_q", "ffn_down"))
    engine = half_trained(Engine.load(small("llama", type), config, backend="llama.cpp"))
    tolerance = 1e-3 if type.endswith("_K") else 0.0
    assert_lanes_are_alone(engine, random_batch(*lengths), tolerance=tolerance)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_bits_of_a_trained_decoder(shared: Path, type: str) -> None:
    """The output matrix of the Q4_0 file is Q6_K."""
    path = shared / "models" / f"tinymix-6m.{type}.gguf"
    engine = half_trained(Engine.load(path, LoRAConfig(2), backend="llama.cpp"))
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:4]
    texts = [Example(text=example.text) for example in examples]
    assert_lanes_are_alone(engine, engine.encode(texts))


def test_bits_of_a_trained_encoder(shared: Path) -> None:
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    engine = Engine.load(path, LoRAConfig(2), labels=LABELS, backend="llama.cpp")
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:4]
    assert_lanes_are_alone(half_trained(engine), engine.encode(examples))


@pytest.mark.parametrize("method", ["central", "forward-difference"])
@pytest.mark.parametrize("name", ["gemma2", "mixtral", "mamba", ENCODER])
def test_groups_do_not_depend_on_company(small: Make, name: str, method: str) -> None:
    engine = tuned(small(name, "Q8_0"), name)
    batch = random_batch(17, 9, 17, 30, 17, 9, encoder=engine.encoder)
    sizes, seeds = [2, 3, 1], np.arange(6, dtype=np.uint64).reshape(3, 2)
    together = engine.group_derivatives(batch, sizes, seeds, method)
    first = 0
    for size, mine, probe in zip(sizes, seeds, together, strict=True):
        group = batch.sequences(first, first + size)
        (alone,) = engine.group_derivatives(group, [size], mine[None], method)
        # A head's product in float64 may be off by its last bit.
        exact = 0 if name != ENCODER else 1e-12
        assert abs(alone.loss - probe.loss) <= exact
        np.testing.assert_allclose(alone.derivative, probe.derivative, atol=exact, rtol=0)
        usual = engine.directional_derivatives(group, mine, method)
        np.testing.assert_allclose(usual.derivative, probe.derivative, rtol=1e-9, atol=1e-9)
        first += size


# --------------------------------------------------------------------- kinds of directions

KINDS: dict[str, DirectionsConfig] = {
    "normal": DirectionsConfig(),
    "rademacher": DirectionsConfig("rademacher"),
    "one layer": DirectionsConfig(scope=Scope(layers=(1,))),
    "one target": DirectionsConfig(scope=Scope(targets=("attn_v",))),
    "sparse": DirectionsConfig("sparse", keep=0.2),
    "subzero": DirectionsConfig("subzero", dimension=4),
    "lora-xs": DirectionsConfig("lora-xs"),
    "lora-fa": DirectionsConfig("lora-fa"),
}
EPSILON = 1e-2


def materialized(
    engine: Engine, batch: Batch, seed: int, directions: Directions
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes of every label's loss, the adapter itself moved; and losses at the two ends."""
    assert engine.adapter is not None
    start = engine.adapter.theta.copy()
    ends = []
    for sign in (1, -1):
        engine.adapter.add([seed], [sign * EPSILON], directions)
        ends.append(engine.lane_losses(batch)[0][0])
        engine.adapter.theta[:] = start
    return (ends[0] - ends[1]) / (2 * EPSILON), np.array(ends)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_those_of_an_update(small: Make, name: str, kind: str) -> None:
    """Float noise, and keys and values in float16, leave 1% of a slope."""
    targets = ("attn_q", "attn_v", "ffn_down")
    config = LoRAConfig(4, targets=targets)
    engine = half_trained(Engine.load(small(name, "F32"), config, backend="llama.cpp"))
    engine.use_directions(KINDS[kind], 5, [Example(text="The cat sat on the mat.")])
    batch = random_batch(25, 14, 25)
    seeds = SEEDS[:3]
    want = [materialized(engine, batch, int(s), engine.directions)[0].mean() for s in seeds]
    got = engine.directional_derivatives(batch, seeds, "central", EPSILON)
    np.testing.assert_allclose(got.derivative, want, atol=0.01 * np.abs(want).max())
    assert len(set(np.round(want, 3))) == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", ENCODER])
@pytest.mark.parametrize("kind", ["rademacher", "subzero"])
def test_each_example_has_its_own_direction(small: Make, name: str, kind: str) -> None:
    path = small(name, "F32")
    targets = TARGETS.get(name, ("attn_q", "attn_v", "ffn_down"))
    labels = LABELS if name == ENCODER else ()
    config = LoRAConfig(4, targets=targets)
    engine = half_trained(Engine.load(path, config, labels=labels, backend="llama.cpp"))
    engine.use_directions(KINDS[kind], 5, [])
    batch = random_batch(25, 14, 25, encoder=engine.encoder)
    probe = engine.directional_derivatives(batch, SEEDS[:2], "central", EPSILON, per_example=True)
    own = example_seeds(SEEDS[:2], batch.n_sequences)
    np.testing.assert_array_equal(probe.seeds, own)
    for k in range(2):
        for i in range(batch.n_sequences):
            slopes, _ = materialized(engine, batch, int(own[k, i]), engine.directions)
            mine = np.array([i]) if engine.encoder else batch.label_sequence == i
            want = slopes[mine].sum() / batch.n_labels
            scale = np.abs(probe.derivative).max()
            assert probe.derivative[k, i] == pytest.approx(want, abs=0.01 * scale)


def test_per_example_and_shared_directions_agree_on_one_example(small: Make) -> None:
    engine = tuned(small("mixtral"), "mixtral")
    batch = random_batch(30)
    seeds = example_seeds(SEEDS[:3], 1)
    each = engine.directional_derivatives(batch, SEEDS[:3], "central", per_example=True)
    shared = engine.directional_derivatives(batch, seeds[:, 0], "central")
    np.testing.assert_allclose(each.derivative[:, 0], shared.derivative, rtol=1e-9)


# -------------------------------------------------------------------------------- training

# Targets and learning rates with which 12 steps lower a loss of 6.3 to 7 by 0.7 to 1.6 nats.
TRAINED = {
    "gemma2": (("attn_v", "ffn_down"), 0.05),
    "phi3": (("attn_qkv", "ffn_down"), 0.05),
    "gpt2": (("attn_qkv", "ffn_down"), 0.05),
    "gptneox": (("attn_qkv", "ffn_down"), 0.05),
    "granite": (("attn_v", "ffn_down"), 0.1),
    "stablelm": (("attn_v", "ffn_down"), 0.1),
    "mixtral": (("attn_output", "attn_v"), 0.1),
    "mamba": (("ssm_in", "ssm_out"), 0.01),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss_that_llama_cpp_sees(
    small: Make, tmp_path: Path, name: str
) -> None:
    targets, rate = TRAINED[name]
    path = small(name)
    engine = Engine.load(path, LoRAConfig(2, 4, targets))
    assert engine.adapter is not None
    examples = [
        Example(prompt="Question: Hi?\nAnswer:", completion=" Arr, matey!"),
        Example(prompt="Question: Who?\nAnswer:", completion=" Arr, a pirate!"),
    ]
    batch = engine.encode(examples)
    before = engine.loss(batch)
    for step in range(12):
        seeds = np.arange(8, dtype=np.uint64) + np.uint64(100 * step)
        probe = engine.directional_derivatives(batch, seeds, "central")
        engine.adapter.add(seeds, -rate * probe.derivative / len(seeds))
    after = engine.loss(batch)
    assert after.mean() < before.mean() - 0.4
    engine.adapter.save(tmp_path / "adapter.gguf")
    want = plain_losses(path, batch, tmp_path / "adapter.gguf")
    np.testing.assert_allclose(after, want, atol=2 * noise_of(name, "F16"), rtol=0)


# -------------------------------------------------------------------------------- refusals


def one_sentence(raised: pytest.ExceptionInfo[FwdllmError]) -> str:
    message = str(raised.value)
    assert message and "\n" not in message and len(message) < 400
    return message


def test_methods_that_need_tangents(small: Make) -> None:
    engine = tuned(small("gemma2"), "gemma2")
    batch = random_batch(9)
    with pytest.raises(ConfigError, match="use method central or forward-difference") as raised:
        engine.directional_derivatives(batch, SEEDS, "forward-ad")
    assert "gemma2" in one_sentence(raised)
    with pytest.raises(ConfigError, match="forward-ad"):
        engine.group_derivatives(batch, [1], SEEDS[None], "forward-ad")
    with pytest.raises(ConfigError, match="activation") as raised:
        engine.use_activations()
    one_sentence(raised)
    lanes = plan(SEEDS[:2], "forward-ad").lanes
    with pytest.raises(ConfigError, match="no tangents"):
        engine.lane_losses(batch, Variants(lanes, engine.directions))
    with pytest.raises(ConfigError):
        engine.activation_gradient(batch, 1, 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exact": True}, "exact arithmetic"),
        ({"memory_budget": 2**30}, "memory budget"),
        ({"device": "reference"}, "device reference"),
    ],
    ids=["exact", "memory_budget", "device"],
)
def test_what_only_our_own_graphs_do(small: Make, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=f"{words}.*llama.cpp.*'gemma2' is not one") as raised:
        Engine.load(small("gemma2"), **options)
    one_sentence(raised)
    with pytest.raises(ConfigError, match=words) as raised:
        Engine.load(small("llama"), backend="llama.cpp", **options)
    one_sentence(raised)
    Engine.load(small("llama"), **options)


def test_backends_that_do_not_fit(small: Make) -> None:
    with pytest.raises(UnsupportedError, match="'gemma2' is not one of llama") as raised:
        Engine.load(small("gemma2"), backend="fwdllm")
    assert isinstance(raised.value, ModelError)
    one_sentence(raised)
    with pytest.raises(ConfigError, match=r"auto, fwdllm, llama\.cpp, not 'llamacpp'") as raised:
        Engine.load(small("gemma2"), backend="llamacpp")
    one_sentence(raised)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mixtral", "ffn_up_exps"),
        ("qwen2moe", "ffn_down_exps"),
        ("mamba", "ssm_conv1d"),
        ("gemma2", "attn_qkv"),
        ("gemma2", "attn_norm"),
    ],
)
def test_targets_that_no_adapter_is_for(small: Make, name: str, target: str) -> None:
    with pytest.raises(ConfigError, match=f"'{target}'") as raised:
        Engine.load(small(name), LoRAConfig(targets=(TARGETS[name][-1], target)))
    one_sentence(raised)


def test_a_target_that_llama_cpp_passes_by(small: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It multiplies with the weight, but not with the factors of an adapter that it was given."""
    monkeypatch.setattr(Context, "apply", lambda *_: None)
    with pytest.raises(ConfigError, match=r"adapters to blk\.0\.ffn_down") as raised:
        Engine.load(small("gemma2"), LoRAConfig(targets=("ffn_down",)))
    one_sentence(raised)


def test_an_architecture_that_nobody_knows(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    metadata = {
        "context_length": 64,
        "embedding_length": 64,
        "block_count": 1,
        "feed_forward_length": 64,
        "attention.head_count": 1,
    }
    small = {"token_embd.weight": np.zeros((VOCAB, 64), np.float32)}
    rng = np.random.default_rng(0)
    write_model(path, "gpt-17", metadata, VOCAB, [], small, QuantType.F32, rng)
    for backend in ("auto", "llama.cpp"):
        with pytest.raises(ModelError, match="gpt-17") as raised:
            Engine.load(path, backend=backend)
        one_sentence(raised)


def test_outputs_that_a_model_does_not_have(small: Make) -> None:
    decoder, encoder = tuned(small("gemma2"), "gemma2"), tuned(small(ENCODER), ENCODER)
    with pytest.raises(ConfigError, match="predicts no tokens"):
        encoder.logits([1, 2, 3])
    with pytest.raises(ConfigError, match="pooled features"):
        decoder.embed(["a text"])
    with pytest.raises(ConfigError, match="labels"):
        Engine.load(small(ENCODER), LoRAConfig(targets=("attn_qkv",)))


# ---------------------------------------------------------------------------------- choice


def chosen(path: Path, name: str = "auto") -> Backend:
    return choose(GGUFFile.open(path), name)


@pytest.mark.parametrize("architecture", OWN_FAMILIES)
def test_own_graphs_come_first(small: Make, architecture: str) -> None:
    backend = chosen(small(architecture))
    assert (backend.name, backend.reason) == ("fwdllm", None)
    other = chosen(small(architecture), "llama.cpp")
    assert (other.name, other.reason, other.family) == ("llama.cpp", None, None)
    assert other.linear.items() >= backend.linear.items()
    assert (backend.method, other.method) == ("forward-ad", "central")
    for field in ("n_layers", "width", "n_heads", "n_kv_heads", "head_dim", "n_vocab", "context"):
        assert getattr(other.args, field) == getattr(backend.args, field)


def test_the_own_encoder_comes_first(shared: Path) -> None:
    path = shared / "models" / "minilm-l6-v2.F16.gguf"
    assert (chosen(path).name, chosen(path).encoder) == ("fwdllm", True)
    other = chosen(path, "llama.cpp")
    assert (other.name, other.encoder) == ("llama.cpp", True)
    assert other.linear.keys() == chosen(path).linear.keys()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(small: Make, name: str) -> None:
    backend = chosen(small(name))
    assert backend.name == "llama.cpp" and backend.family is None
    words = "mixture of experts" if name == "mixtral" else f"{name!r} is not one of llama"
    assert backend.reason and words in backend.reason
    assert backend.encoder == (name == ENCODER)


def test_a_type_without_kernels(small: Make, tmp_path: Path) -> None:
    """Q5_0, by llama.cpp; and losses are those of the same weights in another file."""
    path = tmp_path / "model.gguf"
    requantize(small("llama", "F32"), path, "blk.1.ffn_down.weight", "Q5_0")
    backend = chosen(path)
    assert backend.name == "llama.cpp" and backend.reason and "Q5_0" in backend.reason
    with pytest.raises(UnsupportedError, match="Q5_0"):
        Engine.load(path, backend="fwdllm")
    batch = random_batch(30, 20)
    engine = half_trained(Engine.load(path, LoRAConfig(targets=("attn_q", "ffn_down"))))
    assert engine.adapter is not None
    engine.adapter.save(tmp_path / "adapter.gguf")
    want = plain_losses(path, batch, tmp_path / "adapter.gguf")
    np.testing.assert_allclose(engine.loss(batch), want, atol=NOISE["Q8_0"], rtol=0)


def requantize(source: Path, path: Path, tensor: str, type: str) -> None:
    """Copy a file with one float32 tensor in another type."""
    reader = gguf.GGUFReader(source)
    architecture = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub)
    for one in reader.tensors:
        if one.name == tensor:
            kind = gguf.GGMLQuantizationType[type]
            data = gguf.quants.quantize(np.array(one.data), kind)
            writer.add_tensor(one.name, data, raw_dtype=kind)
        else:
            writer.add_tensor(one.name, np.array(one.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_rope_scaling_without_a_graph(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_decoder(path, SHAPE, QuantType.F16, metadata={"rope.scaling.type": "longrope"})
    backend = chosen(path)
    assert backend.name == "llama.cpp" and backend.reason and "longrope" in backend.reason
    batch = random_batch(40)
    loss = Engine.load(path).loss(batch)
    np.testing.assert_allclose(loss, plain_losses(path, batch), atol=NOISE["F16"], rtol=0)


# --------------------------------------------------------------------- memory and failures


def test_memory_is_given_back(small: Make) -> None:
    engine = tuned(small("gemma2"), "gemma2")
    batch = random_batch(20, 300)
    engine.directional_derivatives(batch, SEEDS[:2], "central")
    graph = engine._llama
    context = graph._context
    assert context is not None
    alive = [weakref.ref(thing) for thing in (engine, graph, context, graph.model)]
    del engine, graph, context
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_a_smaller_context_is_dropped_for_a_larger_one(small: Make) -> None:
    engine = tuned(small("gemma2"), "gemma2")
    engine.loss(random_batch(20))
    first = weakref.ref(engine._llama._context)
    engine.loss(random_batch(CONTEXT))
    gc.collect()
    assert first() is None and engine._llama._context is not None


@pytest.fixture(params=[KeyboardInterrupt, ValueError, MemoryError])
def failing(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bool], type[BaseException]]:
    """Lets the kernel raise at its third call, while on."""
    count = 0
    add_lora = cpu.add_lora

    def fail(*args: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise request.param("stopped here")
        add_lora(*args)

    def switch(on: bool) -> type[BaseException]:
        nonlocal count
        count = 0
        monkeypatch.setattr(cpu, "add_lora", fail if on else add_lora)
        return request.param

    return switch


@pytest.mark.parametrize("name", ["gemma2", "mamba", ENCODER])
def test_an_exception_in_the_callback(
    small: Make, failing: Callable[[bool], type[BaseException]], name: str
) -> None:
    """It reaches the caller, and what was half done leaves no trace."""
    engine = tuned(small(name), name)
    batch = random_batch(20, 20, 33, encoder=engine.encoder)

    def slopes() -> np.ndarray:
        return engine.directional_derivatives(batch, SEEDS[:3], "central").derivative

    want = slopes()
    with pytest.raises(failing(True), match="stopped here"):
        slopes()
    failing(False)
    np.testing.assert_array_equal(slopes(), want)


@pytest.mark.parametrize("name", ["gemma2", "mamba", "mixtral", ENCODER])
def test_numbers_that_are_not_finite(small: Make, name: str) -> None:
    """They are reported, and do not spoil the next call."""
    engine = tuned(small(name), name)
    batch = random_batch(20, 20, 33, encoder=engine.encoder)
    adapter = engine.adapter
    assert adapter is not None
    want, theta = engine.loss(batch), adapter.theta.copy()
    adapter.theta[: adapter.n_lora] = np.inf
    with pytest.raises(NumericsError):
        engine.directional_derivatives(batch, SEEDS[:2], "central")
    adapter.theta[:] = theta
    np.testing.assert_array_equal(engine.loss(batch), want)


def test_two_engines_do_not_meet(small: Make) -> None:
    """Each has its own model, context and callback."""
    names = ("gemma2", "gpt2")
    engines = [tuned(small(name), name) for name in names]
    batch = random_batch(20, 31)
    want = [engine.loss(batch) for engine in engines]
    for engine, loss in (*zip(engines, want, strict=True), *zip(engines, want, strict=True)):
        np.testing.assert_array_equal(engine.loss(batch), loss)


def test_nothing_is_printed(small: Make, capfd: pytest.CaptureFixture[str]) -> None:
    engine = tuned(small("gemma2"), "gemma2")
    engine.directional_derivatives(random_batch(20), SEEDS[:2], "central")
    with pytest.raises(ConfigError):
        Engine.load(small("mixtral"), LoRAConfig(targets=("ffn_up_exps",)))
    assert capfd.readouterr() == ("", "")


def test_directions_of_another_kind_can_be_given(small: Make) -> None:
    """Those of a call come before the engine's own."""
    engine = tuned(small("granite"), "granite")
    assert engine.adapter is not None
    batch = random_batch(25)
    signs = Dense(engine.adapter, "rademacher")
    got = engine.directional_derivatives(batch, SEEDS[:4], "central", directions=signs)
    engine.directions = signs
    want = engine.directional_derivatives(batch, SEEDS[:4], "central")
    np.testing.assert_array_equal(got.derivative, want.derivative)
