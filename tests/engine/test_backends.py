"""What computes with a file, what it refuses, and what becomes of failures."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from llama_models import (
    ENCODER,
    NOISE,
    OWN_FAMILIES,
    SEEDS,
    SHAPE,
    TARGETS,
    Make,
    plain_losses,
    random_batch,
    tuned,
)

from fwdllm.bench.architectures import ARCHITECTURES, CONTEXT, VOCAB
from fwdllm.bench.inputs import half_trained
from fwdllm.bench.synthetic import make_decoder, write_model
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.backends import Backend, choose
from fwdllm.engine.directions import Dense
from fwdllm.engine.errors import (
    ConfigError,
    FwdllmError,
    ModelError,
    NumericsError,
    UnsupportedError,
)
from fwdllm.engine.estimators.lanes import lane_losses
from fwdllm.engine.estimators.plan import plan
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.graph import Variants
from fwdllm.engine.llamacpp.context import Context
from fwdllm.engine.models import FAMILIES
from fwdllm.kernels import cpu
from fwdllm.kernels.types import QuantType


def one_sentence(raised: pytest.ExceptionInfo[FwdllmError]) -> str:
    message = str(raised.value)
    assert message and "\n" not in message and len(message) < 400
    return message


def test_methods_that_need_tangents(small: Make) -> None:
    engine = tuned(small("olmo2"), "olmo2")
    batch = random_batch(9)
    with pytest.raises(ConfigError, match="use method central or forward-difference") as raised:
        engine.directional_derivatives(batch, SEEDS, "forward-ad")
    assert "olmo2" in one_sentence(raised)
    with pytest.raises(ConfigError, match="forward-ad"):
        engine.group_derivatives(batch, [1], SEEDS[None], "forward-ad")
    with pytest.raises(ConfigError, match="activation") as raised:
        engine.use_activations()
    one_sentence(raised)
    lanes = plan(SEEDS[:2], "forward-ad").lanes
    with pytest.raises(ConfigError, match="no tangents"):
        lane_losses(engine.graph, batch, Variants(lanes, engine.directions))
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
    with pytest.raises(ConfigError, match=f"{words}.*llama.cpp.*'olmo2' is not one") as raised:
        Engine.load(small("olmo2"), **options)
    one_sentence(raised)
    with pytest.raises(ConfigError, match=words) as raised:
        Engine.load(small("llama"), backend="llama.cpp", **options)
    one_sentence(raised)
    Engine.load(small("llama"), **options)


def test_backends_that_do_not_fit(small: Make) -> None:
    with pytest.raises(UnsupportedError, match="'olmo2' is not one of llama") as raised:
        Engine.load(small("olmo2"), backend="fwdllm")
    assert isinstance(raised.value, ModelError)
    one_sentence(raised)
    with pytest.raises(ConfigError, match=r"auto, fwdllm, llama\.cpp, not 'generation'") as raised:
        Engine.load(small("olmo2"), backend="generation")
    one_sentence(raised)


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("mixtral", "ffn_up_exps"),
        ("qwen2moe", "ffn_down_exps"),
        ("mamba", "ssm_conv1d"),
        ("olmo2", "attn_qkv"),
        ("olmo2", "attn_q_norm"),
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
        Engine.load(small("olmo2"), LoRAConfig(targets=("ffn_down",)))
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
    decoder, encoder = tuned(small("olmo2"), "olmo2"), tuned(small(ENCODER), ENCODER)
    with pytest.raises(ConfigError, match="predicts no tokens"):
        encoder.logits([1, 2, 3])
    with pytest.raises(ConfigError, match="pooled features"):
        decoder.embed(["a text"])
    with pytest.raises(ConfigError, match="labels"):
        Engine.load(small(ENCODER), LoRAConfig(targets=("attn_qkv",)))


def chosen(path: Path, name: str = "auto") -> Backend:
    return choose(GGUFFile.open(path), name)


@pytest.mark.parametrize("architecture", OWN_FAMILIES)
def test_own_graphs_come_first(small: Make, architecture: str) -> None:
    backend = chosen(small(architecture))
    assert (backend.name, backend.reason) == ("fwdllm", None)
    other = chosen(small(architecture), "llama.cpp")
    assert (other.name, other.reason, other.own) == ("llama.cpp", None, False)
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


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name not in FAMILIES])
def test_other_architectures(small: Make, name: str) -> None:
    backend = chosen(small(name))
    assert backend.name == "llama.cpp" and not backend.own
    words = "mixture of experts" if name == "mixtral" else f"{name!r} is not one of llama"
    assert backend.reason and words in backend.reason
    assert not backend.encoder


def test_a_type_without_kernels(small: Make, tmp_path: Path) -> None:
    """TQ2_0, by llama.cpp; and losses are those of the same weights in another file."""
    path = tmp_path / "model.gguf"
    requantize(small("llama", "F32"), path, "blk.1.ffn_down.weight", "TQ2_0")
    backend = chosen(path)
    assert backend.name == "llama.cpp" and backend.reason and "TQ2_0" in backend.reason
    with pytest.raises(UnsupportedError, match="TQ2_0"):
        Engine.load(path, backend="fwdllm")
    batch = random_batch(30, 20)
    engine = half_trained(Engine.load(path, LoRAConfig(targets=("attn_q", "ffn_down"))))
    assert engine.adapter is not None
    save_gguf(engine.adapter, tmp_path / "adapter.gguf")
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


def test_memory_is_given_back(small: Make) -> None:
    engine = tuned(small("olmo2"), "olmo2")
    batch = random_batch(20, 300)
    engine.directional_derivatives(batch, SEEDS[:2], "central")
    graph = engine.graph
    context = graph._context
    assert context is not None
    alive = [weakref.ref(thing) for thing in (engine, graph, context, graph.model)]
    del engine, graph, context
    gc.collect()
    assert [ref() for ref in alive] == [None] * 4


def test_a_smaller_context_is_dropped_for_a_larger_one(small: Make) -> None:
    engine = tuned(small("olmo2"), "olmo2")
    engine.loss(random_batch(20))
    first = weakref.ref(engine.graph._context)
    engine.loss(random_batch(CONTEXT))
    gc.collect()
    assert first() is None and engine.graph._context is not None


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


@pytest.mark.parametrize("name", ["olmo2", "mamba", ENCODER])
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


@pytest.mark.parametrize("name", ["olmo2", "mamba", "mixtral", ENCODER])
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
    names = ("olmo2", "gpt2")
    engines = [tuned(small(name), name) for name in names]
    batch = random_batch(20, 31)
    want = [engine.loss(batch) for engine in engines]
    for engine, loss in (*zip(engines, want, strict=True), *zip(engines, want, strict=True)):
        np.testing.assert_array_equal(engine.loss(batch), loss)


def test_nothing_is_printed(small: Make, capfd: pytest.CaptureFixture[str]) -> None:
    engine = tuned(small("olmo2"), "olmo2")
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
