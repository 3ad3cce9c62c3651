"""Families unlike Llama and BERT: against llama.cpp, and each way to a slope's another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from changed_models import changed
from family_models import ENCODERS, TARGETS, make_family
from llama_models import LABELS, SEEDS, correlation
from test_llama_lanes import assert_lanes_are_alone

from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.adapters.io import save_gguf, save_peft
from fwdllm.engine.adapters.peft import WEIGHTS_FILE
from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.errors import ModelError, UnsupportedError
from fwdllm.engine.llamacpp import generation

DECODERS = [name for name in TARGETS if name not in ENCODERS]
TEXTS = ["the cat sat on the mat", "a dog", "what is it that you do " * 5]
# Logits of random models are of about 1: float32 noise, and what a type's int8 activations cost.
NOISE = {"F32": 1e-3, "Q4_0": 0.15}
# Of embeddings of length 1; llama.cpp looks GELU up in a table of float16.
EMBEDDING_NOISE = {"F32": 1e-5, "Q4_0": 3e-3}
GELU_NOISE = {"F32": 1e-4, "Q4_0": 3e-3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture
def model(folder: Path) -> Any:
    def make(name: str, type: str = "F32") -> Path:
        path = folder / f"{name}.{type}.gguf"
        return path if path.exists() else make_family(path, name, type)

    return make


def token_ids(n: int) -> list[int]:
    return np.random.default_rng(n).integers(3, 500, n).tolist()


def some_batch(name: str, lengths: tuple[int, ...] = (40, 21, 33, 9)) -> Batch:
    encoder = name in ENCODERS
    labelled = [[not encoder] * n for n in lengths]
    return pack(
        [
            Tokens(token_ids(n), counts, k % 2 if encoder else None)
            for k, (n, counts) in enumerate(zip(lengths, labelled, strict=True))
        ]
    )


def tuned(path: Path, name: str, **options: Any) -> Engine:
    labels = LABELS if name in ENCODERS else ()
    config = LoRAConfig(3, targets=TARGETS[name])
    return half_trained(Engine.load(path, config, labels=labels, backend="fwdllm", **options))


@pytest.mark.parametrize("type", NOISE)
@pytest.mark.parametrize("name", DECODERS)
def test_logits_are_llama_cpps(model: Any, tmp_path: Path, name: str, type: str) -> None:
    """Without an adapter, and with one of all matrices that llama.cpp reads from a file."""
    path, ids = model(name, type), token_ids(120)
    plain = generation.logits(path, ids)
    engine = Engine.load(path)
    assert engine.backend.own
    assert np.abs(engine.logits(ids) - plain).max() < NOISE[type]
    engine = tuned(path, name)
    assert engine.adapter is not None
    save_gguf(engine.adapter, tmp_path / "a.gguf")
    want = generation.logits(path, ids, tmp_path / "a.gguf")
    assert np.abs(engine.logits(ids) - want).max() < NOISE[type]
    assert np.abs(want - plain).max() > 3 * NOISE["F32"]


@pytest.mark.parametrize("type", ["F32", "Q4_0"])
@pytest.mark.parametrize("name", ENCODERS)
def test_embeddings_are_llama_cpps(model: Any, tmp_path: Path, name: str, type: str) -> None:
    path = model(name, type)
    atol = (GELU_NOISE if name == "modern-bert" else EMBEDDING_NOISE)[type]
    plain = generation.embed(path, TEXTS)
    np.testing.assert_allclose(Engine.load(path).embed(TEXTS), plain, atol=atol)
    engine = tuned(path, name)
    assert engine.adapter is not None and engine.backend.own
    save_gguf(engine.adapter, tmp_path / "a.gguf")
    want = generation.embed(path, TEXTS, tmp_path / "a.gguf")
    np.testing.assert_allclose(engine.embed(TEXTS), want, atol=atol)
    assert np.abs(want - plain).max() > 3 * atol


@pytest.mark.parametrize("name", TARGETS)
def test_the_three_ways_to_a_slope(model: Any, name: str) -> None:
    """Differences, tangents and the way back, through all matrices."""
    engine, batch = tuned(model(name), name, exact=True), some_batch(name)
    seeds = SEEDS[:6]
    back, tangents, differences = (
        engine.directional_derivatives(batch, seeds, method, epsilon=1e-3).derivative
        for method in ("backprop", "forward-ad", "central")
    )
    scale = np.abs(tangents).max()
    np.testing.assert_allclose(back, tangents, atol=1e-4 * scale)
    np.testing.assert_allclose(differences, tangents, atol=0.03 * scale)
    fast = tuned(model(name, "Q4_0"), name)
    found = fast.directional_derivatives(batch, SEEDS, "backprop").derivative
    assert correlation(found, fast.directional_derivatives(batch, SEEDS).derivative) > 0.98


@pytest.mark.parametrize("name", TARGETS)
def test_bits_do_not_depend_on_company(
    model: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not on other lanes and examples; nor on blocks of rows, but for the sums of a gradient."""
    engine, batch = tuned(model(name, "Q4_0"), name), some_batch(name)
    for method in ("forward-ad", "central"):
        assert_lanes_are_alone(engine, batch, method)
    loss = engine.loss(batch)
    gradient = engine.gradient(batch).values
    monkeypatch.setattr("fwdllm.engine.memory.plan.default_block_rows", lambda _: 16)
    np.testing.assert_array_equal(engine.loss(batch), loss)
    blocks = engine.gradient(batch).values
    np.testing.assert_allclose(blocks, gradient, atol=1e-4 * np.abs(gradient).max())


def test_a_scale_of_0_is_none(tmp_path: Path) -> None:
    """As llama.cpp has it; and without the keys the same."""
    scales = ("embedding_scale", "residual_scale", "attention.scale")
    path = make_family(tmp_path / "m.gguf", "granite", **dict.fromkeys(scales, 0.0))
    found, ids = Engine.load(path).logits(token_ids(50)), token_ids(50)
    assert np.abs(found - generation.logits(path, ids)).max() < 2e-3
    keys = {"general.architecture": "granite", **{f"granite.{key}": None for key in scales}}
    without = changed(tmp_path / "none.gguf", path, keys)
    np.testing.assert_array_equal(Engine.load(without).logits(ids), found)


def test_granite_without_positions(tmp_path: Path) -> None:
    path = make_family(tmp_path / "m.gguf", "granite", **{"rope.scaling.finetuned": False})
    ids = token_ids(50)
    found = Engine.load(path).logits(ids)
    assert np.abs(found - generation.logits(path, ids)).max() < 2e-3


@pytest.mark.parametrize("name", ["phi3", "smollm3"])
def test_yarn(tmp_path: Path, name: str) -> None:
    metadata = {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}
    path, ids = make_family(tmp_path / "m.gguf", name, **metadata), token_ids(100)
    assert np.abs(Engine.load(path).logits(ids) - generation.logits(path, ids)).max() < 1e-3


# Of modern-bert: what metadata means, and what it is where it is not said.
ENCODINGS: list[dict[str, Any]] = [
    {"attention.sliding_window": 9},  # as 8: four on each side
    {"attention.sliding_window": 1},
    {"attention.sliding_window": 5000},
    {"attention.sliding_window": 0, "rope.freq_base_swa": 2.0},
    {"attention.sliding_window_pattern": 2, "rope.freq_base": 100.0},
    {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},  # not of layers with a window
    {"rope.dimension_count": 48},
    {"pooling_type": 2},
    {"hidden_activation": "gelu"},
    {"hidden_activation": "swish"},
]


@pytest.mark.parametrize("metadata", ENCODINGS, ids=str)
def test_what_metadata_of_modern_bert_means(tmp_path: Path, metadata: dict[str, Any]) -> None:
    metadata = {"hidden_activation": "silu", **metadata}  # which is not from a table
    path = make_family(tmp_path / "m.gguf", "modern-bert", **metadata)
    engine = Engine.load(path)
    assert engine.backend.own
    noise = GELU_NOISE if engine.args.gelu else EMBEDDING_NOISE
    want = generation.embed(path, TEXTS)
    np.testing.assert_allclose(engine.embed(TEXTS), want, atol=noise["F32"])


def test_layers_and_tensors_of_modern_bert(model: Any, tmp_path: Path) -> None:
    """A pattern of layers, a norm before all of them, a head for classes, and keys left out."""
    source, key = model("modern-bert"), "modern-bert.attention.sliding_window_pattern"
    names = {"general.architecture": "modern-bert", "modern-bert.rope.freq_base_swa": None}
    tensors = {
        "blk.0.attn_norm.weight": np.linspace(0.5, 1.5, 256, dtype=np.float32),
        "cls.weight": np.ones((256, 256), np.float32),
        "cls.norm.weight": np.ones(256, np.float32),
    }
    for pattern in ([True, False, False, True, False], [0, 1, 1, 0, 1]):
        keys = {**names, "modern-bert.pooling_type": None, key: pattern}
        path = changed(tmp_path / f"{pattern[0]}.gguf", source, keys, tensors)
        engine = Engine.load(path)
        assert [window > 0 for window in engine.args.windows] == [bool(i) for i in pattern]
        want = generation.embed(path, TEXTS)
        np.testing.assert_allclose(engine.embed(TEXTS), want, atol=GELU_NOISE["F32"])
    for bad in ([True, False], [3, 1, 0, 1, 0]):
        path = changed(tmp_path / f"{len(bad)}.gguf", source, {**names, key: bad})
        with pytest.raises(ModelError, match="is not a bool for each of 5 layers"):
            Engine.load(path)


@pytest.mark.parametrize("scaling", [{}, {"type": "longrope", "factor": 2.0}])
def test_factors_are_those_of_the_original_context(tmp_path: Path, scaling: dict) -> None:
    metadata = {f"rope.scaling.{key}": value for key, value in scaling.items()}
    path, ids = make_family(tmp_path / "m.gguf", "phi3", **metadata), token_ids(200)
    engine = Engine.load(path)
    assert engine.backend.own and engine.args.context == 256
    assert np.abs(engine.logits(ids) - generation.logits(path, ids)).max() < 1e-3
    # Asked for a longer context, llama.cpp takes the others for the first tokens too.
    long = generation.logits(path, ids + token_ids(100))[: len(ids)]
    assert np.abs(long - generation.logits(path, ids)).max() > 0.1


@pytest.mark.parametrize(
    ("name", "stack", "names"),
    [
        (
            "phi3",
            "model.layers",
            ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"),
        ),
        ("modern-bert", "layers", ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo")),
    ],
)
def test_fused_matrices_as_peft_names_them(
    model: Any, tmp_path: Path, name: str, stack: str, names: tuple[str, ...]
) -> None:
    engine = tuned(model(name), name)
    assert engine.adapter is not None
    save_peft(engine.adapter, tmp_path / "peft", 4, 2, "someone/model")
    tensors = safetensors.numpy.load_file(tmp_path / "peft" / WEIGHTS_FILE)
    layer = f"base_model.model.{stack}.1."
    modules = {key.removeprefix(layer) for key in tensors if key.startswith(layer)}
    assert modules == {f"{module}.lora_{half}.weight" for module in names for half in "AB"}
    again = Engine.load(model(name), adapter=tmp_path / "peft")
    assert again.adapter is not None
    np.testing.assert_array_equal(again.adapter.theta, engine.adapter.theta)


BAD: list[tuple[str, dict[str, Any], str]] = [
    *(
        ("granite", {key: value}, reason)
        for key in ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")
        for value, reason in ((-1.0, f"granite.{key}' is -1.0, below 0"), (float("nan"), "nan"))
    ),
    ("granite", {"logit_scale": 0.0}, "logit_scale', a divisor, is 0"),
    ("phi3", {"rope.scaling.attn_factor": 0.0}, "attention factor 0.0"),
    ("phi3", {"rope.scaling.attn_factor": float("inf")}, "not finite"),
    ("phi3", {"attention.head_count_kv": 4}, "attn_qkv.weight' has shape"),
    ("phi3", {"feed_forward_length": 256}, "ffn_up.weight' has shape"),
    ("phi3", {"rope.dimension_count": 50}, "does not fit"),
    ("nomic-bert", {"feed_forward_length": 256}, "has shape"),
    ("nomic-bert", {"rope.freq_base": 0.5}, "RoPE base"),
    ("modern-bert", {"feed_forward_length": 256}, "ffn_up.weight' has shape"),
    ("modern-bert", {"rope.freq_base_swa": 0.5}, "RoPE base 0.5 of layers with a window"),
    ("modern-bert", {"attention.sliding_window": 3.5}, "of type float, not an integer"),
    ("modern-bert", {"attention.sliding_window_pattern": -1.0}, "of type float, not an integer"),
    ("modern-bert", {"hidden_activation": 1}, "of type int, not a string"),
    ("modern-bert", {"attention.layer_norm_epsilon": float("nan")}, "nan, not finite"),
]


@pytest.mark.parametrize(("name", "metadata", "reason"), BAD)
def test_damaged_metadata(tmp_path: Path, name: str, metadata: dict[str, Any], reason: str) -> None:
    path = make_family(tmp_path / "m.gguf", name, **metadata)
    with pytest.raises(ModelError, match=reason):
        Engine.load(path)


OTHER: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("granite", {"granite.deepstack_mapping": [-1] * 5}, {}, "images"),
    ("granite", {"granite.expert_count": 4, "granite.expert_used_count": 2}, {}, "experts"),
    ("smollm3", {}, {"rope_freqs.weight": np.ones(32, np.float32)}, "rope_freqs.weight"),
    ("phi3", {}, {"rope_factors_long.weight": None}, "RoPE factors"),
    ("phi3", {"phi3.rope.scaling.original_context_length": 100}, {}, "RoPE factors"),
    ("phi3", {}, {"blk.1.ffn_gate.weight": np.ones((512, 256), np.float32)}, "ffn_gate"),
    ("nomic-bert", {}, {"blk.0.ffn_up.bias": np.ones(512, np.float32)}, "ffn_up.bias"),
    ("nomic-bert", {"nomic-bert.pooling_type": 3}, {}, "pooling type 3"),
    *(
        ("modern-bert", {f"modern-bert.{key}": value}, {}, reason)
        for key, value, reason in (
            ("pooling_type", 4, "pooling type 4"),
            ("attention.causal", True, "attention is causal"),
            ("attention.head_count_kv", 2, "share keys and values"),
            ("attention.key_length", 32, "'key_length' is not"),
            ("attention.value_length_swa", 32, "'value_length_swa' is not"),
            ("attention.sliding_window_pattern", 0, "all of its layers have a window"),
            ("attention.sliding_window_pattern", 1, "or none has"),
            ("hidden_activation", "relu", "activation 'relu'"),
            ("rope.dimension_count_swa", 32, "different numbers of dimensions"),
            ("rope.scaling.type", "yarn", "RoPE scaling"),
        )
    ),
    ("modern-bert", {}, {"rope_freqs.weight": np.ones(32, np.float32)}, "RoPE scaling"),
    ("modern-bert", {}, {"blk.1.ffn_norm.bias": np.ones(256, np.float32)}, "ffn_norm.bias"),
    ("modern-bert", {}, {"token_types.weight": np.ones((2, 256), np.float32)}, "token_types"),
]


@pytest.mark.parametrize(("name", "metadata", "tensors", "reason"), OTHER)
def test_what_our_graphs_do_not_know(
    model: Any, tmp_path: Path, name: str, metadata: dict, tensors: dict, reason: str
) -> None:
    keys = {"general.architecture": name, **metadata}
    path = changed(tmp_path / "m.gguf", model(name), keys, tensors)
    with pytest.raises(UnsupportedError, match=reason):
        Engine.load(path, backend="fwdllm")
