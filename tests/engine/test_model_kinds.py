"""Kinds of model files that people bring: each runs, or gets the same sentence everywhere."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_bytes
import numpy as np
import pytest
from changed_models import changed
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, quants

from fwdllm.engine import Engine
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.errors import FwdllmError, FwdllmWarning, ModelError, UnsupportedError
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.gguf.kinds import check_model
from fwdllm.inference import generate
from fwdllm.inspect import inspect_model

pytestmark = pytest.mark.usefixtures("one_thread")

TEXT = Example(text="The captain looked at the sea and said nothing for a while.")
LAYERS = 6


def loss(path: Path, backend: str = "auto") -> float:
    return Engine.load(path, backend=backend).evaluate([TEXT]).loss


def answers(path: Path) -> list[str]:
    """What inspecting, evaluating and generating say of a file: the same kinds of tries."""
    tries: list[Callable[[], object]] = [
        lambda: inspect_model(path),
        lambda: Engine.load(path),
        lambda: list(generate(path, "Hello", max_tokens=1)),
    ]
    found = []
    for attempt in tries:
        with pytest.raises(FwdllmError) as raised:
            attempt()
        found.append(str(raised.value))
    return found


def tokens_of(path: Path) -> list[str]:
    return list(GGUFReader(path).fields["tokenizer.ggml.tokens"].contents())


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, np.ndarray | None], str]] = {
    "adapter": ({"general.type": "adapter"}, {}, "is no model but an adapter: name its model"),
    "projector": ({"general.type": "mmproj"}, {}, "is no model but the projector of"),
    "old projector": ({"general.architecture": "clip"}, {}, "is no model but the projector of"),
    "imatrix": ({"general.type": "imatrix"}, {}, "is no model but an importance matrix"),
    "numbers for a type": ({"general.type": [1, 2]}, {}, "'general.type' is of type ndarray"),
    "words for a type": ({"general.type": ["adapter"]}, {}, "'general.type' is of type tuple"),
    "no merges": ({"tokenizer.ggml.merges": None}, {}, "cannot find tokenizer merges"),
    "splitter": ({"tokenizer.ggml.pre": "mine"}, {}, "unknown pre-tokenizer type: 'mine'"),
    "no vocabulary": ({"tokenizer.ggml.tokens": None}, {}, "has no vocabulary"),
    "layers differ": (
        {"llama.attention.head_count_kv": [4, 4, 4, 4, 4, 2]},
        {},
        "'llama.attention.head_count_kv' differs between layers",
    ),
    "experts unused": (
        {"llama.expert_count": 8},
        {},
        "'llama.expert_used_count' is not 1 to 8 experts",
    ),
    "layers that are said to be less": (
        {"llama.block_count": LAYERS - 1},
        {},
        "wrong number of tensors",
    ),
    "no norm": ({}, {"output_norm.weight": None}, "'output_norm.weight'"),
    "a tensor of another name": (
        {},
        {"output_norm.weight": None, "other.weight": np.ones(256, np.float32)},
        "'output_norm.weight'",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_every_command_gives_the_same_reason(bundled: Path, tmp_path: Path, kind: str) -> None:
    metadata, tensors, what = REFUSED[kind]
    path = changed(tmp_path / "m.gguf", bundled, metadata, tensors)
    inspected, evaluated, generated = answers(path)
    assert what in inspected
    assert evaluated == inspected
    assert what in generated


@pytest.mark.parametrize("found", [(gguf_bytes.U8, b"\0\1"), (gguf_bytes.BOOL, b"\1\0")])
def test_an_architecture_that_is_an_array(tmp_path: Path, found: tuple[int, bytes]) -> None:
    type, values = found
    array = gguf_bytes.array(type, len(values), values)
    pair = gguf_bytes.pair("general.architecture", gguf_bytes.ARRAY, array)
    path = tmp_path / "m.gguf"
    path.write_bytes(gguf_bytes.gguf((pair,)))
    file = GGUFFile.open(path)
    with pytest.raises(ModelError, match=r"'general\.architecture' is of type ndarray"):
        check_model(file)


def test_a_name_that_is_an_array(bundled: Path, tmp_path: Path) -> None:
    path = changed(tmp_path / "m.gguf", bundled, {"general.name": [1, 2]})
    assert GGUFFile.open(path).name is None


def test_a_token_twice_is_refused_before_llama_cpp_ends_the_process(
    bundled: Path, tmp_path: Path
) -> None:
    tokens = tokens_of(bundled)
    tokens[-1] = tokens[-2]
    path = changed(tmp_path / "m.gguf", bundled, {"tokenizer.ggml.tokens": tokens})
    first, *others = answers(path)
    assert f"has the token {tokens[-1]!r} twice" in first
    assert others == [first, first]


def test_fewer_tokens_than_rows(bundled: Path, tmp_path: Path) -> None:
    """llama.cpp refuses such a file: the tuned adapter could not be used."""
    fewer = {
        "tokenizer.ggml.tokens": tokens_of(bundled)[:2000],
        "tokenizer.ggml.token_type": [1] * 2000,
    }
    path = changed(tmp_path / "m.gguf", bundled, fewer)
    inspected, evaluated, generated = answers(path)
    assert "has 2000 tokens, but the embedding 2048 rows" in inspected
    assert evaluated == inspected
    assert "'token_embd.weight' has wrong shape" in generated


def test_a_vocabulary_alone_is_no_model(bundled: Path, tmp_path: Path) -> None:
    reader = GGUFReader(bundled)
    path = changed(
        tmp_path / "m.gguf", bundled, None, dict.fromkeys(t.name for t in reader.tensors)
    )
    first, *others = answers(path)
    assert "is no model but a vocabulary" in first
    assert others == [first, first]


READ: dict[str, tuple[dict[str, Any], dict[str, np.ndarray | None]]] = {
    "a file type that is not true": ({"general.file_type": 1}, {}),
    "heads for each layer": (
        {
            "llama.attention.head_count": [8] * LAYERS,
            "llama.attention.head_count_kv": [4] * LAYERS,
            "llama.feed_forward_length": [704] * LAYERS,
        },
        {},
    ),
    "norms of two dimensions": ({}, {"output_norm.weight": ones(1, 256)}),
    "factors of RoPE beside a tied output": (
        {},
        {"rope_freqs.weight": np.linspace(1, 8, 16).astype(np.float32)},
    ),
}


@pytest.mark.parametrize("kind", READ)
def test_it_is_read_as_by_llama_cpp(bundled: Path, tmp_path: Path, kind: str) -> None:
    path = changed(tmp_path / "m.gguf", bundled, *READ[kind])
    assert inspect_model(path)["backend"] == "fwdllm"
    assert loss(path, "fwdllm") == pytest.approx(loss(path, "llama.cpp"), rel=0.01)


def test_version_2_is_read(bundled: Path, tmp_path: Path) -> None:
    content = bytearray(bundled.read_bytes())
    content[4:8] = struct.pack("<I", 2)
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    assert loss(path) == loss(bundled)


@pytest.mark.parametrize(
    "name",
    ["output.bias", "blk.0.attn_q_norm.weight", "blk.0.post_attention_norm.weight"],
)
def test_a_tensor_is_never_left_out(bundled: Path, tmp_path: Path, name: str) -> None:
    """Our graphs would compute without it, and llama.cpp refuses what it does not know either."""
    path = changed(tmp_path / "m.gguf", bundled, None, {name: ones(256)})
    with pytest.raises(UnsupportedError, match=f"tensor '{name}' is none that our graph of llama"):
        Engine.load(path, backend="fwdllm")
    with (
        pytest.warns(FwdllmWarning, match=f"computed by llama.cpp.*'{name}'"),
        pytest.raises(FwdllmError, match="wrong number of tensors"),
    ):
        Engine.load(path)


def test_layers_beyond_the_last_are_not_left_out(bundled: Path, tmp_path: Path) -> None:
    path = changed(tmp_path / "m.gguf", bundled, {"llama.block_count": LAYERS - 1})
    with pytest.raises(UnsupportedError, match=r"tensor 'blk\.5\."):
        Engine.load(path, backend="fwdllm")


def of_type(path: Path, source: Path, type: Type) -> Path:
    """A copy whose ffn_up matrices are of a type; zeros where gguf cannot quantize to it."""
    matrices = {}
    for tensor in GGUFReader(source).tensors:
        if tensor.name.endswith("ffn_up.weight"):
            values = quants.dequantize(tensor.data, tensor.tensor_type)
            try:
                matrices[tensor.name] = quants.quantize(values, type)
            except NotImplementedError:
                shape = quants.quant_shape_to_byte_shape(values.shape, type)
                matrices[tensor.name] = np.zeros(shape, np.uint8)
    return changed(path, source, None, matrices, dict.fromkeys(matrices, type))


@pytest.mark.parametrize("type", [Type.TQ1_0, Type.TQ2_0])
def test_a_type_without_kernels_goes_to_llama_cpp(
    bundled: Path, tmp_path: Path, type: Type
) -> None:
    path = of_type(tmp_path / "m.gguf", bundled, type)
    report = inspect_model(path)
    assert report["backend"] == "llama.cpp"
    assert f"'blk.0.ffn_up.weight' has the unsupported type {type.name};" in report["reason"]
    with pytest.warns(FwdllmWarning, match=f"computed by llama.cpp.*type {type.name};"):
        found = loss(path)
    # These types hold these values with an error.
    assert found == pytest.approx(loss(bundled), rel=0.2)


@pytest.mark.parametrize("type", [Type.Q5_0, Type.Q5_1, Type.MXFP4])
def test_types_that_gguf_can_make_are_computed_here(
    bundled: Path, tmp_path: Path, type: Type
) -> None:
    path = of_type(tmp_path / "m.gguf", bundled, type)
    assert inspect_model(path)["backend"] == "fwdllm"
    assert loss(path) == pytest.approx(loss(bundled), rel=0.2 if type == Type.MXFP4 else 0.01)


@pytest.mark.parametrize("type", [Type.IQ3_S, Type.IQ2_XS])
def test_of_types_that_gguf_cannot_make(bundled: Path, tmp_path: Path, type: Type) -> None:
    path = of_type(tmp_path / "m.gguf", bundled, type)
    assert inspect_model(path)["backend"] == "llama.cpp"
    with pytest.warns(FwdllmWarning, match=f"type {type.name};"):
        assert np.isfinite(loss(path))


def test_a_type_that_llama_cpp_has_given_up(bundled: Path, tmp_path: Path) -> None:
    content = bytearray(bundled.read_bytes())
    name = b"blk.0.ffn_up.weight"
    place = content.index(name) + len(name) + 4 + 2 * 8
    content[place : place + 4] = struct.pack("<I", 31)
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    first, *others = answers(path)
    assert "has the type Q4_0_4_4, which llama.cpp has given up; use a file of type Q4_0" in first
    assert others == [first, first]


def test_an_unknown_splitter_is_told(bundled: Path, tmp_path: Path) -> None:
    path = changed(tmp_path / "m.gguf", bundled, {"tokenizer.ggml.pre": None})
    with pytest.warns(FwdllmWarning, match="does not say how a text is split"):
        Engine.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FwdllmWarning)
        Engine.load(bundled)


def test_a_mixture_goes_to_llama_cpp(small: Callable[..., Path]) -> None:
    path = small("mixtral")
    report = inspect_model(path)
    why = "a mixture of experts has no graph here"
    assert (report["backend"], report["reason"]) == ("llama.cpp", why)
    with pytest.warns(FwdllmWarning, match=f"computed by llama.cpp.*{why}"):
        Engine.load(path)
    with pytest.raises(UnsupportedError, match=why):
        Engine.load(path, backend="fwdllm")


def test_a_vector_in_blocks_is_refused(bundled: Path, tmp_path: Path) -> None:
    name = "output_norm.weight"
    blocks = {name: quants.quantize(ones(256), Type.Q8_0)}
    path = changed(tmp_path / "m.gguf", bundled, None, blocks, {name: Type.Q8_0})
    first, *others = answers(path)
    assert f"tensor '{name}' is a vector of type Q8_0" in first
    assert others == [first, first]
