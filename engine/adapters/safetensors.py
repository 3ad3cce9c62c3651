"""The safetensors format: 8 bytes of header length, a JSON header, tensor data.

Reading follows the format's own rules (https://github.com/huggingface/safetensors#format):
offsets cover the data once, without gaps and overlaps. The file may come from anywhere, so
every claim is checked before it is used, and whatever is wrong is an AdapterError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.errors import AdapterError
from fwdllm.kernels.types import QuantType, Weight

# The types LoRA factors come in.
TYPES = {"F32": QuantType.F32, "F16": QuantType.F16, "BF16": QuantType.BF16}
ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}

LENGTH_BYTES = 8
ALIGNMENT = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the reference implementation
MAX_DIMS = 4  # LoRA factors have two; this bounds the arithmetic on a hostile shape


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor: dtype "F32", "F16" or "BF16", its shape, its bytes (uint8, one dimension)."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: np.ndarray

    def weight(self) -> Weight:
        """The tensor as a matrix for the kernels; AdapterError if it is not a matrix."""
        if len(self.shape) != 2 or 0 in self.shape:
            raise AdapterError(f"tensor {self.name!r} has shape {self.shape}, not a matrix")
        rows = self.data.reshape(self.shape[0], -1)
        return Weight(rows, TYPES[self.dtype], *self.shape)


@dataclass(frozen=True, eq=False)
class SafetensorsFile:
    """The tensors of a file by name, and its free-form metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def read(path: Path) -> SafetensorsFile:
    """Read a whole safetensors file into memory.

    Errors: AdapterError if it is missing, does not follow the format, or has a tensor of a
    type other than F32, F16 and BF16.
    """
    try:
        if not path.is_file():
            raise AdapterError(f"{path} does not exist or is not a regular file")
        content = np.fromfile(path, np.uint8)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AdapterError(f"cannot read {path}: {error}") from error
    try:
        return _parse(content)
    except _FormatError as error:
        raise AdapterError(f"{path} is not a sound safetensors file: {error}") from error


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write arrays as F32 tensors into a new file, in order of name; equal input, equal bytes."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offset = 0
    for name, array in sorted(arrays.items()):
        end = offset + array.size * ITEM_BYTES["F32"]
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % ALIGNMENT)  # so that readers can map the data aligned
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(LENGTH_BYTES, "little"))
        file.write(encoded)
        for _, array in sorted(arrays.items()):
            file.write(array.astype("<f4").tobytes())


class _FormatError(Exception):
    """What is wrong with the file; ``read`` adds which file."""


def _parse(content: np.ndarray) -> SafetensorsFile:
    if len(content) < LENGTH_BYTES:
        raise _FormatError("it is too short to have a header")
    length = int.from_bytes(content[:LENGTH_BYTES].tobytes(), "little")
    if length > min(MAX_HEADER_BYTES, len(content) - LENGTH_BYTES):
        raise _FormatError(f"its header claims {length} bytes")
    header = _header(content[LENGTH_BYTES : LENGTH_BYTES + length].tobytes())
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _FormatError("its metadata is not a map of strings")
    data = content[LENGTH_BYTES + length :]
    spans = {name: _span(name, entry) for name, entry in header.items()}
    _check_coverage(spans, len(data))
    # Copies, because a view could start at an odd address, which kernels need not support.
    tensors = {
        name: Tensor(name, header[name]["dtype"], shape, data[begin:end].copy())
        for name, (begin, end, shape) in spans.items()
    }
    return SafetensorsFile(tensors, metadata)


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise _FormatError(f"its header is not valid JSON ({error})") from error
    if not isinstance(header, dict):
        raise _FormatError("its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key appears twice")
    return dict(pairs)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _span(name: str, entry: object) -> tuple[int, int, tuple[int, ...]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _FormatError(f"the entry of tensor {_quoted(name)} is malformed")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TYPES:
        raise _FormatError(f"tensor {_quoted(name)} is not of type {', '.join(TYPES)}")
    if not _is_sizes(shape) or not _is_sizes(offsets) or len(offsets) != 2:
        raise _FormatError(f"the shape or place of tensor {_quoted(name)} is malformed")
    begin, end = offsets
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise _FormatError(f"the shape of tensor {_quoted(name)} does not match its bytes")
    return begin, end, tuple(shape)


def _quoted(name: str) -> str:
    return repr(name if len(name) <= 80 else name[:77] + "...")


def _is_sizes(value: object) -> bool:
    # bool is an int to Python, but not to the format.
    if not isinstance(value, list) or len(value) > MAX_DIMS:
        return False
    return all(type(item) is int and item >= 0 for item in value)


def _check_coverage(spans: Mapping[str, tuple[int, int, object]], n_bytes: int) -> None:
    position = 0
    for begin, end, _ in sorted(spans.values(), key=lambda span: span[:2]):
        if begin != position:
            raise _FormatError("its tensors overlap or leave a gap")
        position = end
    if position != n_bytes:
        raise _FormatError(f"its tensors have {position} bytes, but {n_bytes} follow the header")
