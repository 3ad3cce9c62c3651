"""The safetensors format, against its reference implementation and hostile files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from fwdllm.engine.adapters import safetensors as safetensors_file
from fwdllm.engine.errors import AdapterError
from fwdllm.kernels import reference


def safetensors_bytes(header: str, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header.encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def entry(dtype: object = "F32", shape: object = (1,), offsets: object = (0, 4)) -> str:
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "short"),
        (b"\1" * 7, "short"),
        (safetensors_bytes("{}", length=3), "claims"),
        (safetensors_bytes("{}", length=2**64 - 1), "claims"),
        (safetensors_bytes("[]"), "not a JSON object"),
        (safetensors_bytes("{"), "not valid JSON"),
        (safetensors_bytes('{"a":' * 100_000), "not valid JSON"),
        (safetensors_bytes('{"x":' + "9" * 5000 + "}"), "not valid JSON"),
        (safetensors_bytes(f'{{"x":{entry()},"x":{entry()}}}', bytes(4)), "twice"),
        (safetensors_bytes(f'{{"x":{entry(shape=[float("nan")])}}}', bytes(4)), "NaN"),
        (safetensors_bytes('{"x":[]}'), "malformed"),
        (safetensors_bytes('{"__metadata__":{"a":1}}'), "map of strings"),
        (safetensors_bytes('{"__metadata__":"a"}'), "map of strings"),
        (safetensors_bytes(f'{{"x":{entry("I64", [1], [0, 8])}}}', bytes(8)), "not of type"),
        (safetensors_bytes(f'{{"x":{entry(["F32"])}}}', bytes(4)), "not of type"),
        (safetensors_bytes(f'{{"x":{entry(shape=[-1])}}}', bytes(4)), "malformed"),
        (safetensors_bytes(f'{{"x":{entry(shape=[True])}}}', bytes(4)), "malformed"),
        (safetensors_bytes(f'{{"x":{entry(shape=[1] * 5)}}}', bytes(4)), "malformed"),
        (safetensors_bytes(f'{{"x":{entry(offsets=[0, 4, 8])}}}', bytes(4)), "malformed"),
        (safetensors_bytes(f'{{"x":{entry(offsets=[0, 8])}}}', bytes(8)), "does not match"),
        (safetensors_bytes(f'{{"x":{entry(offsets=[8, 4])}}}', bytes(8)), "does not match"),
        (safetensors_bytes(f'{{"x":{entry(offsets=[4, 8])}}}', bytes(8)), "overlap or leave"),
        (safetensors_bytes(f'{{"x":{entry()},"y":{entry()}}}', bytes(4)), "overlap or leave"),
        (safetensors_bytes(f'{{"x":{entry()}}}', bytes(3)), "4 bytes, but 3"),
        (safetensors_bytes(f'{{"x":{entry()}}}', bytes(5)), "4 bytes, but 5"),
        (safetensors_bytes('{"' + "x" * 9999 + '":1}'), "x{70,80}[.]{3}' is malformed"),
    ],
)
def test_unsound_safetensors(tmp_path: Path, content: bytes, told: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(AdapterError, match=told) as raised:
        safetensors_file.read(tmp_path / "x")
    assert len(str(raised.value)) < 1000


def test_safetensors_agree_with_the_reference_implementation(tmp_path: Path) -> None:
    arrays = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones((), np.float32)}
    safetensors_file.write(tmp_path / "ours", arrays, {"key": "v\u00e4lue"})
    assert int.from_bytes((tmp_path / "ours").read_bytes()[:8], "little") % 8 == 0
    found = safetensors.numpy.load_file(tmp_path / "ours")
    assert sorted(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"], arrays["b"])
    safetensors.numpy.save_file(arrays, tmp_path / "theirs", {"key": "v\u00e4lue"})
    file = safetensors_file.read(tmp_path / "theirs")
    assert file.metadata == {"key": "v\u00e4lue"}
    np.testing.assert_array_equal(reference.dequantize(file.tensors["b"].weight()), arrays["b"])


def test_bfloat16_safetensors(tmp_path: Path) -> None:
    values = np.float32([1.5, -2.0, 0.25, 3.0])
    header = b'{"x":{"dtype":"BF16","shape":[2,2],"data_offsets":[0,8]}}'
    assert len(header) % 2 == 1  # so that the data starts at an odd place
    data = (values.view(np.uint32) >> 16).astype("<u2").tobytes()
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + data)
    weight = safetensors_file.read(tmp_path / "x").tensors["x"].weight()
    np.testing.assert_array_equal(reference.dequantize(weight), values.reshape(2, 2))
    assert weight.data.ctypes.data % 4 == 0
