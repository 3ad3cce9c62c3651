"""The GGUF reader: equal to the gguf package's reader, views without copies, typed getters."""

from __future__ import annotations

import gc
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U8,
    U32,
    array,
    gguf,
    open_bytes,
    pair,
    tensor,
    text,
)
from places import SHARED

from fwdllm.engine.errors import ModelError
from fwdllm.engine.gguf.file import GGUFFile, _open

__all__ = ["open_bytes"]  # a fixture

MODELS = sorted((SHARED / "models").glob("*.gguf"))


def assert_same_value(mine: Any, theirs: Any) -> None:
    if isinstance(theirs, list):
        assert list(mine) == theirs
    else:
        assert type(mine) is type(theirs)
        assert mine == theirs


@pytest.mark.parametrize("path", MODELS or [None], ids=lambda p: p.name if p else "none")
def test_equals_the_gguf_package(path: Path | None) -> None:
    if path is None:
        pytest.skip("shared/models is not here")
    mine, theirs = GGUFFile.open(path), GGUFReader(path)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(mine.metadata) == list(fields)
    for key, field in fields.items():
        assert_same_value(mine.metadata[key], field.contents())
    assert list(mine.tensors) == [t.name for t in theirs.tensors]
    for expected in theirs.tensors:
        info = mine.tensors[expected.name]
        assert (info.type, info.offset) == (expected.tensor_type, expected.data_offset)
        assert info.shape == tuple(int(n) for n in expected.shape[::-1])
        assert (info.nbytes, info.n_elements) == (expected.n_bytes, expected.n_elements)
        if len(info.shape) == 1:
            np.testing.assert_array_equal(mine.vector(info.name), expected.data)
        else:
            data = mine.weight(info.name).data
            np.testing.assert_array_equal(data, expected.data.view(np.uint8))


def test_every_metadata_type(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    writer = GGUFWriter(path, "llama")
    scalars = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1,
        "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.5,
        "float64": 0.1, "bool": True, "string": "ünï\U0001f600",
    }  # fmt: skip
    for name, value in scalars.items():
        getattr(writer, f"add_{name}")(f"x.{name}", value)
    arrays: dict[str, tuple[GGUFValueType, list[Any]]] = {
        "u8": (GGUFValueType.UINT8, [0, 255]),
        "i64": (GGUFValueType.INT64, [-(2**63), 2**63 - 1]),
        "f32": (GGUFValueType.FLOAT32, [0.5, -2.0, float("inf")]),
        "bool": (GGUFValueType.BOOL, [True, False, True]),
        "string": (GGUFValueType.STRING, ["", "ä", "a\nb"]),
    }
    for name, (element, values) in arrays.items():
        writer.add_key_value(f"a.{name}", values, GGUFValueType.ARRAY, sub_type=element)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = GGUFFile.open(path)
    for name, value in scalars.items():
        assert file.metadata[f"x.{name}"] == value
        assert type(file.metadata[f"x.{name}"]) is type(value)
    for name, (_, values) in arrays.items():
        assert list(file.metadata[f"a.{name}"]) == values
    assert file.metadata["a.bool"].dtype == np.bool_
    assert file.metadata["a.i64"].dtype == np.int64
    assert file.metadata["a.string"] is file.metadata["a.string"]  # decoded once
    with pytest.raises(ValueError, match="read-only"):
        file.metadata["a.f32"][0] = 1


def test_version_2_empty_arrays_and_scalar_tensors(open_bytes: Callable) -> None:
    pairs = (pair("s", ARRAY, array(STRING, 0, b"")), pair("n", ARRAY, array(F32, 0, b"")))
    file = open_bytes(gguf(pairs, (tensor("t", ()),), data=b"\0\0\x80?", version=2))
    assert file.version == 2
    assert file.strings("s") == ()
    assert file.numbers("n").tolist() == []
    assert file.tensors["t"].shape == ()
    assert file.tensors["t"].nbytes == 4


def write_tensors(path: Path, alignment: int | None = None) -> dict[str, np.ndarray]:
    """A file with an F32, F16 and BF16 vector, an F32 matrix and a Q8_0 matrix."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal(5).astype(np.float32)
    tensors = {
        "f32": values,
        "f16": values.astype(np.float16),
        "bf16": (values.view(np.uint32) >> 16).astype(np.uint16),
        "matrix": rng.standard_normal((3, 4)).astype(np.float32),
        "q8": rng.integers(0, 256, (2, 3 * 34), dtype=np.uint8),
    }
    raw = {"bf16": GGMLQuantizationType.BF16, "q8": GGMLQuantizationType.Q8_0}
    writer = GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, data in tensors.items():
        bytes_of = data.view(np.uint8) if name in raw else data
        writer.add_tensor(name, bytes_of, raw_dtype=raw.get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize("alignment", [None, 8, 4096])
def test_weights_and_vectors(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "m.gguf"
    tensors = write_tensors(path, alignment)
    file = GGUFFile.open(path)
    np.testing.assert_array_equal(file.vector("f32"), tensors["f32"])
    np.testing.assert_array_equal(file.vector("f16"), tensors["f16"].astype(np.float32))
    bf16 = (tensors["bf16"].astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(file.vector("bf16"), bf16)
    assert {file.vector(n).dtype for n in ("f32", "f16", "bf16")} == {np.dtype(np.float32)}
    matrix = file.weight("matrix")
    assert (matrix.n_out, matrix.n_in) == (3, 4)
    np.testing.assert_array_equal(matrix.data.view("<f4"), tensors["matrix"])
    q8 = file.weight("q8")
    assert (q8.n_out, q8.n_in, q8.type) == (2, 96, GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(q8.data, tensors["q8"])


def test_weight_is_a_read_only_view_that_outlives_the_file(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tensors = write_tensors(path)
    file = GGUFFile.open(path)
    data, again = file.weight("q8").data, file.weight("q8").data
    assert np.shares_memory(data, again)
    with pytest.raises(ValueError, match="read-only"):
        data[0, 0] = 1
    del file, again
    gc.collect()
    os.unlink(path)
    np.testing.assert_array_equal(data, tensors["q8"])


def test_vector_is_a_copy(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m.gguf")
    file = GGUFFile.open(tmp_path / "m.gguf")
    file.vector("f32")[0] = 99
    assert file.vector("f32")[0] != 99


def test_a_vocabulary_of_128k_tokens_opens_fast(open_bytes: Callable) -> None:
    # As large as Llama 3's: 128,256 tokens, scores, 280,147 merges.
    n_tokens, n_merges = 128_256, 280_147
    tokens = b"".join(text(f"token{i}") for i in range(n_tokens))
    merges = b"".join(text(f"left{i} right{i}") for i in range(n_merges))
    scores = np.arange(n_tokens, dtype="<f4").tobytes()
    pairs = (
        pair("tokens", ARRAY, array(STRING, n_tokens, tokens)),
        pair("merges", ARRAY, array(STRING, n_merges, merges)),
        pair("scores", ARRAY, array(F32, n_tokens, scores)),
    )
    content = gguf(pairs, (tensor("t", (1,)),), data=bytes(4))
    file = open_bytes(content)
    _open.cache_clear()
    calls = 0

    def count(_frame: object, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        GGUFFile.open(file.path)
    finally:
        sys.setprofile(None)
    # One call reads the length of a string; nothing is decoded before it is asked for.
    n_strings = n_tokens + n_merges
    assert n_strings < calls < 1.01 * n_strings
    assert file.strings("tokens") == tuple(f"token{i}" for i in range(n_tokens))
    assert file.metadata["merges"][-1] == f"left{n_merges - 1} right{n_merges - 1}"
    assert file.numbers("scores")[-1] == n_tokens - 1


def test_containment_does_not_decode(open_bytes: Callable) -> None:
    file = open_bytes(gguf((pair("bad", ARRAY, array(STRING, 1, text(b"\xff"))),)))
    assert "bad" in file.metadata
    assert "good" not in file.metadata


def test_tensors_that_cannot_be_used(open_bytes: Callable) -> None:
    tensors = (
        tensor("iq2", (256, 2), GGMLQuantizationType.IQ2_S),
        tensor("int", (4,), GGMLQuantizationType.I32, 192),
        tensor("cube", (2, 2, 2), 0, 224),
        tensor("vector", (4,), 0, 256),
        tensor("nan", (2,), GGMLQuantizationType.F16, 288),
    )
    file = open_bytes(gguf((), tensors, data=b"\xff" * 292))
    assert (file.tensors["iq2"].shape, file.tensors["iq2"].nbytes) == ((2, 256), 164)
    with pytest.raises(ModelError, match="tensor 'iq2' has the unsupported type IQ2_S"):
        file.weight("iq2")
    with pytest.raises(ModelError, match="tensor 'int' has the unsupported type I32"):
        file.vector("int")
    with pytest.raises(ModelError, match=r"tensor 'cube' has shape \(2, 2, 2\), but 2 dim"):
        file.weight("cube")
    weight = file.weight("vector")  # a matrix of one row, whose dimension of 1 is left out
    assert (weight.n_out, weight.n_in) == (1, 4)
    with pytest.raises(ModelError, match=r"tensor 'iq2' has shape .* but 1 dim"):
        file.vector("iq2")
    with pytest.raises(ModelError, match="tensor 'nan' has non-finite values"):
        file.vector("nan")
    for get in (file.weight, file.vector):
        with pytest.raises(ModelError, match="has no tensor 'absent'"):
            get("absent")


@pytest.fixture
def typed(open_bytes: Callable) -> GGUFFile:
    pairs = (
        pair("int", U32, struct.pack("<I", 7)),
        pair("negative", 5, struct.pack("<i", -1)),
        pair("float", F32, struct.pack("<f", 0.5)),
        pair("inf", F32, struct.pack("<f", float("inf"))),
        pair("bool", BOOL, b"\1"),
        pair("string", STRING, text("s")),
        pair("strings", ARRAY, array(STRING, 1, text("s"))),
        pair("numbers", ARRAY, array(U8, 2, b"\1\2")),
    )
    return open_bytes(gguf(pairs))  # type: ignore[no-any-return]


def test_typed_getters(typed: GGUFFile) -> None:
    assert typed.integer("int") == 7
    assert typed.number("int") == 7.0
    assert typed.number("float") == 0.5
    assert typed.boolean("bool") is True
    assert typed.string("string") == "s"
    assert typed.strings("strings") == ("s",)
    assert typed.numbers("numbers").tolist() == [1, 2]
    assert typed.integer("absent", 0) == 0
    assert typed.boolean("absent", False) is False
    assert typed.strings("absent", ()) == ()


@pytest.mark.parametrize(
    ("getter", "key", "found"),
    [
        ("integer", "float", "float"),
        ("integer", "bool", "bool"),
        ("number", "bool", "bool"),
        ("number", "string", "str"),
        ("boolean", "int", "int"),
        ("string", "int", "int"),
        ("string", "strings", "tuple"),
        ("strings", "string", "str"),
        ("strings", "numbers", "ndarray"),
        ("numbers", "strings", "tuple"),
    ],
)
def test_typed_getters_refuse_other_types(
    typed: GGUFFile, getter: str, key: str, found: str
) -> None:
    with pytest.raises(ModelError, match=f"metadata '{key}' is of type {found}, not a"):
        getattr(typed, getter)(key)


@pytest.mark.parametrize("name", ["integer", "number", "boolean", "string", "strings", "numbers"])
def test_typed_getters_name_the_missing_key(typed: GGUFFile, name: str) -> None:
    with pytest.raises(ModelError, match=r"has no metadata 'llama\.absent'"):
        getattr(typed, name)("llama.absent")


def test_typed_getters_check_the_range(typed: GGUFFile) -> None:
    with pytest.raises(ModelError, match="metadata 'negative' is -1, not 0 to"):
        typed.integer("negative")
    with pytest.raises(ModelError, match="metadata 'int' is 7, not 0 to 6"):
        typed.integer("int", maximum=6)
    with pytest.raises(ModelError, match="metadata 'inf' is inf, not finite"):
        typed.number("inf")
