"""The header of a GGUF file, versions 2 and 3, little-endian: metadata and tensor table.

The file may come from anywhere, so nothing in it is trusted: every count and length is
checked against the file's size before it is used, and whatever is wrong is a ModelError.
Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from fwdllm.engine.errors import ModelError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32

# From the specification.
MAX_KEY_BYTES = 65535
MAX_TENSOR_NAME_BYTES = 64
MAX_DIMS = 4
MAX_ELEMENTS = 2**63 - 1  # ggml counts in int64

# Our own limits, so that a hostile file costs seconds at worst. A vocabulary of 262k tokens with
# its merges takes 17 MB, and models have some thousands of tensors.
MAX_HEADER_BYTES = 1 << 26
MAX_ENTRIES = 1 << 17

# Rows interleaved for a processor, which is now done when a file is loaded.
REMOVED_TYPES = {
    31: "Q4_0_4_4",
    32: "Q4_0_4_8",
    33: "Q4_0_8_8",
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

# Format characters that struct and NumPy share. A bool is stored as a byte.
FORMATS: dict[int, str] = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<B",
}
LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file.

    type: any that ggml has, whether there are kernels for it or not.  shape: in NumPy order,
    (n_out, n_in) for a matrix.  offset, nbytes: where its data lies in the file, in bytes from the
    file's start.  part: which of the files it is in, from 0, if the model is split.
    """

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    part: int = 0

    @property
    def n_elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class _Array:
    """An array not decoded yet: its element type, element count and bytes in the file."""

    type: int
    count: int
    start: int
    stop: int


class Metadata(Mapping[str, Any]):
    """The key-value pairs of a GGUF file, read-only and in file order.

    Scalars are int, float, bool or str. Arrays are decoded at the first access, because a
    vocabulary takes longer to decode than the rest of the file to open: arrays of strings
    to tuple[str, ...], others to read-only NumPy arrays of the stored type.

    Raises ModelError on access to an array with a string that is not UTF-8 or a bool that is
    neither 0 nor 1.
    """

    def __init__(self, path: Path, buffer: mmap.mmap, values: dict[str, Any]) -> None:
        self._path = path
        self._buffer = buffer
        self._values = values

    def __getitem__(self, key: str) -> Any:
        value = self._values[key]
        if isinstance(value, _Array):
            value = self._values[key] = self._decode(key, value)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, key: object) -> bool:
        return key in self._values  # the inherited one would decode the value

    def _decode(self, key: str, array: _Array) -> tuple[str, ...] | np.ndarray:
        raw = self._buffer[array.start : array.stop]
        if array.type == GGUFValueType.STRING:
            return self._strings(key, raw, array.count)
        numbers = np.frombuffer(raw, FORMATS[array.type])
        if array.type == GGUFValueType.BOOL:
            if np.any(numbers > 1):
                raise _damaged(self._path, f"array {_quoted(key)} has a bool other than 0 and 1")
            numbers = numbers.astype(np.bool_)
        numbers = numbers.astype(numbers.dtype.newbyteorder("="))
        numbers.setflags(write=False)
        return numbers

    def _strings(self, key: str, raw: bytes, count: int) -> tuple[str, ...]:
        strings = []
        position = 0
        try:
            for _ in range(count):
                start = position + LENGTH.size
                position = start + LENGTH.unpack_from(raw, position)[0]
                strings.append(raw[start:position].decode())
        except UnicodeDecodeError:
            what = f"string {len(strings)} of array {_quoted(key)}"
            raise _damaged(self._path, f"{what} is not valid UTF-8") from None
        return tuple(strings)


class _Cursor:
    """Reads one value after another and refuses to pass the end of the file."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.position = 0
        self.end = min(len(buffer), MAX_HEADER_BYTES)

    def skip(self, n_bytes: int, what: str) -> int:
        """Pass over ``n_bytes`` and return where they start."""
        start = self.position
        self.require(n_bytes, what)
        self.position += n_bytes
        return start

    def require(self, n_bytes: int, what: str) -> None:
        missing = self.position + n_bytes - self.end
        if missing <= 0:
            return
        if self.end < len(self.buffer):
            limit = MAX_HEADER_BYTES >> 20
            raise _damaged(self.path, f"its header is over {limit} MiB, in {what}")
        raise ModelError(
            f"{self.path} is truncated or damaged: {what} ends {missing} bytes past the end of "
            "the file; download or copy it again"
        )

    def number(self, format: str, what: str) -> Any:
        start = self.skip(struct.calcsize(format), what)
        return struct.unpack_from(format, self.buffer, start)[0]

    def string(self, what: str, max_bytes: int = MAX_HEADER_BYTES) -> str:
        length = self.number(LENGTH.format, what)
        if length > max_bytes:
            raise _damaged(self.path, f"{what} has {length} bytes, more than {max_bytes}")
        start = self.skip(length, what)
        try:
            return self.buffer[start : self.position].decode()
        except UnicodeDecodeError:
            raise _damaged(self.path, f"{what} is not valid UTF-8") from None

    def skip_strings(self, count: int, what: str) -> None:
        self.require(count * LENGTH.size, what)
        position, last = self.position, self.end - LENGTH.size
        for _ in range(count):  # merges can number half a million: keep this loop bare
            if position > last:  # no room for another length, so skip() below refuses
                position += LENGTH.size
                break
            position += LENGTH.size + LENGTH.unpack_from(self.buffer, position)[0]
        self.skip(position - self.position, what)


def _damaged(path: Path, problem: str) -> ModelError:
    return ModelError(f"{path} is damaged or not made to the GGUF specification: {problem}")


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def read_header(path: Path, buffer: mmap.mmap) -> tuple[int, Metadata, dict[str, TensorInfo]]:
    """Version, metadata and tensors of a mapped GGUF file.

    Raises ModelError, naming ``path``, for anything that does not follow the specification
    or reaches past the end of the file.
    """
    cursor = _Cursor(path, buffer)
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensors")
    n_keys = _read_count(cursor, "metadata keys")
    values: dict[str, Any] = {}
    for index in range(n_keys):
        key = cursor.string(f"metadata key {index}", MAX_KEY_BYTES)
        if key in values:
            raise _damaged(path, f"metadata key {_quoted(key)} appears twice")
        values[key] = _read_value(cursor, f"the value of {_quoted(key)}")
    tensors = [_read_tensor(cursor, index) for index in range(n_tensors)]
    alignment = _alignment(path, values)
    data_start = -(-cursor.position // alignment) * alignment
    placed = _place(path, tensors, data_start, alignment)
    _check_complete(path, placed, len(buffer))
    return version, Metadata(path, buffer, values), placed


def metadata_bytes(path: Path) -> tuple[int, bytes]:
    """The metadata of a GGUF file as it is there: the number of keys, and their bytes.

    Errors: as ``read_header``.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as buffer:
        cursor = _Cursor(path, buffer)
        _read_version(cursor)
        _read_count(cursor, "tensors")
        n_keys = _read_count(cursor, "metadata keys")
        start = cursor.position
        for index in range(n_keys):
            _read_value(cursor, cursor.string(f"metadata key {index}", MAX_KEY_BYTES))
        return n_keys, buffer[start : cursor.position]


def _read_version(cursor: _Cursor) -> int:
    path = cursor.path
    start = cursor.buffer[:24]
    if start.startswith(b"version https://git-lfs"):
        raise ModelError(f"{path} is a Git LFS pointer, not the model; run git lfs pull")
    if start[:4] != MAGIC:
        raise ModelError(
            f"{path} is not a GGUF file: it starts with {start[:4]!r}, not {MAGIC!r}; llama.cpp's "
            "convert_hf_to_gguf.py converts models of other formats"
        )
    cursor.skip(len(MAGIC), "the magic")
    version: int = cursor.number("<I", "the version")
    if version & 0xFFFF == 0 and version:
        raise ModelError(f"{path} is a big-endian GGUF file; only little-endian is supported")
    if version not in VERSIONS:
        raise ModelError(
            f"{path} is GGUF version {version}, but only versions 2 and 3 are supported; "
            "convert the model again with a current llama.cpp"
        )
    return version


def _read_count(cursor: _Cursor, what: str) -> int:
    count: int = cursor.number("<Q", f"the number of {what}")
    if count > MAX_ENTRIES:
        raise _damaged(cursor.path, f"it claims {count} {what}, more than {MAX_ENTRIES}")
    return count


def _read_value(cursor: _Cursor, what: str) -> Any:
    type: int = cursor.number("<I", what)
    if type == GGUFValueType.STRING:
        return cursor.string(what)
    if type == GGUFValueType.ARRAY:
        return _read_array(cursor, what)
    if type not in FORMATS:
        raise _damaged(cursor.path, f"{what} has the unknown type {type}")
    value = cursor.number(FORMATS[type], what)
    if type != GGUFValueType.BOOL:
        return value
    if value > 1:
        raise _damaged(cursor.path, f"{what} is a bool other than 0 and 1")
    return bool(value)


def _read_array(cursor: _Cursor, what: str) -> _Array:
    type: int = cursor.number("<I", what)
    count: int = cursor.number("<Q", what)
    start = cursor.position
    if type == GGUFValueType.STRING:
        cursor.skip_strings(count, what)
    elif type in FORMATS:
        cursor.skip(count * struct.calcsize(FORMATS[type]), what)
    elif type == GGUFValueType.ARRAY:
        raise _damaged(cursor.path, f"{what} is an array of arrays")
    else:
        raise _damaged(cursor.path, f"{what} is an array of the unknown type {type}")
    return _Array(type, count, start, cursor.position)


def _read_tensor(cursor: _Cursor, index: int) -> TensorInfo:
    """Entry ``index`` of the tensor table; its offset counts from the data section's start."""
    name = cursor.string(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
    what = f"tensor {name!r}"
    n_dims: int = cursor.number("<I", what)
    if n_dims > MAX_DIMS:
        raise _damaged(cursor.path, f"{what} has {n_dims} dimensions, more than {MAX_DIMS}")
    shape = tuple(cursor.number("<Q", what) for _ in range(n_dims))[::-1]
    code: int = cursor.number("<I", what)
    offset: int = cursor.number("<Q", what)
    nbytes = _tensor_bytes(cursor.path, what, code, shape)
    return TensorInfo(name, GGMLQuantizationType(code), shape, offset, nbytes)


def _tensor_bytes(path: Path, what: str, code: int, shape: tuple[int, ...]) -> int:
    if code in REMOVED_TYPES:
        raise ModelError(
            f"{path}: {what} has the type {REMOVED_TYPES[code]}, which llama.cpp has given up; "
            f"use a file of type {REMOVED_TYPES[code][:-4]}"
        )
    if code not in GGML_QUANT_SIZES:
        raise ModelError(
            f"{path}: {what} has type number {code}, which is not known; the file is damaged or "
            "newer than the installed gguf package"
        )
    n_elements = math.prod(shape)
    if not 0 < n_elements <= MAX_ELEMENTS:
        raise _damaged(path, f"{what} has the impossible shape {shape}")
    type = GGMLQuantizationType(code)
    block, block_bytes = GGML_QUANT_SIZES[type]
    n_in = shape[-1] if shape else 1
    if n_in % block:
        raise _damaged(path, f"{what} has rows of {n_in}, not whole {type.name} blocks of {block}")
    nbytes: int = n_elements // block * block_bytes
    return nbytes


def _alignment(path: Path, values: dict[str, Any]) -> int:
    alignment = values.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise _damaged(path, "general.alignment is not a power of two of at least 8")
    return alignment


def _place(
    path: Path, tensors: list[TensorInfo], data_start: int, alignment: int
) -> dict[str, TensorInfo]:
    """Tensors by name, with offsets from the start of the file."""
    placed: dict[str, TensorInfo] = {}
    for tensor in tensors:
        if tensor.name in placed:
            raise _damaged(path, f"tensor {tensor.name!r} appears twice")
        if tensor.offset % alignment:
            raise _damaged(path, f"tensor {tensor.name!r} is not aligned to {alignment} bytes")
        offset = data_start + tensor.offset
        placed[tensor.name] = TensorInfo(
            tensor.name, tensor.type, tensor.shape, offset, tensor.nbytes
        )
    return placed


def _check_complete(path: Path, tensors: dict[str, TensorInfo], size: int) -> None:
    needed = max((tensor.offset + tensor.nbytes for tensor in tensors.values()), default=0)
    if needed > size:
        raise ModelError(
            f"{path} is truncated: it has {size} bytes, but its tensors need {needed}, "
            f"{needed - size} more; download or copy it again"
        )
