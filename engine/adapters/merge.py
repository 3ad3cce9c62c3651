"""Writing a model with an adapter merged into it: W + scale * B A in place of W.

One block of rows after another is read, changed and written, so that a model of any size takes
little memory. Metadata and all other tensors are the model's, byte for byte.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from fwdllm.engine.adapters.stored import StoredAdapter, check_fit
from fwdllm.engine.errors import AdapterError, ConfigError, NumericsError, UnsupportedError
from fwdllm.engine.files import atomic_write
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.gguf.header import DEFAULT_ALIGNMENT, MAGIC, TensorInfo, metadata_bytes
from fwdllm.kernels.reference import dequantize

F32, F16 = GGMLQuantizationType.F32, GGMLQuantizationType.F16
BF16, Q8_0 = GGMLQuantizationType.BF16, GGMLQuantizationType.Q8_0

# What changed tensors are rounded to; None: to the type that the tensor has.
TYPES: Mapping[str, GGMLQuantizationType | None] = {"f16": F16, "q8_0": Q8_0, "own": None}

# Types of which a tensor, read and rounded again, stays as it is. In those of 4 to 6 bits the
# rounding is larger than what an adapter changes.
_STABLE = (F32, F16, BF16, Q8_0)

# Models without "output.weight" that multiply with the embedding instead, and llama.cpp's graph of
# which takes an output of its own if there is one.
_MAY_BE_TIED = ("llama", "qwen2", "qwen3")
_OUTPUT, _EMBEDDING = "output", "token_embd"

# Elements that are changed at once: 16 MiB in float32, and a few times that while they are rounded.
_BLOCK = 1 << 22


@dataclass(frozen=True)
class _Change:
    """What is added to a tensor: left @ right, float32 [n_out, rank] and [rank, n_in]."""

    left: np.ndarray
    right: np.ndarray


@dataclass(frozen=True)
class _Output:
    """A tensor to write. source: the model's tensor that it is made from."""

    info: TensorInfo
    source: TensorInfo
    change: _Change | None


def merge(model: GGUFFile, adapter: StoredAdapter, path: Path, type: str) -> None:
    """Write the model with the adapter merged into it, atomically.

    type: see ``TYPES``.
    Errors: AdapterError if the adapter does not fit or has a classification head, ConfigError for
    a split model, for a type that a tensor cannot have and for a place where no file can be
    written, UnsupportedError for a tensor that cannot be read, NumericsError for a weight that is
    not finite, OSError for a full disk.
    """
    if type not in TYPES:
        raise ConfigError(f"type must be one of {', '.join(TYPES)}, not {type!r}")
    if model.integer("split.count", 1) != 1:
        raise ConfigError(
            f"{model.path} is split: join its files first: llama-gguf-split --merge FIRST NEW"
        )
    if adapter.head is not None:
        raise AdapterError(
            f"{adapter.path} has a classification head, for which a GGUF model has no place: "
            "keep the adapter"
        )
    outputs = _plan(model, _changes(model, adapter), TYPES[type])
    with (
        atomic_write(path) as temporary,
        open(model.path, "rb") as source,
        open(temporary, "wb") as file,
    ):
        _write_header(file, model, outputs)
        for output in outputs:
            for block in _blocks(source, output):
                file.write(block)
            _pad(file, _alignment(model))


def _changes(model: GGUFFile, adapter: StoredAdapter) -> dict[str, _Change]:
    """What the adapter adds, by the name of the tensor that it is added to, with ".weight"."""
    shapes = {
        name.removesuffix(".weight"): _rows(tensor)
        for name, tensor in model.tensors.items()
        if 1 <= len(tensor.shape) <= 2 and name.endswith(".weight")
    }
    if _is_tied(model):
        shapes[_OUTPUT] = shapes[_EMBEDDING]
    changes = {}
    for name, (a, b) in adapter.pairs.items():
        if name == _EMBEDDING:  # llama.cpp looks rows of A up, so files have it the other way round
            n_out, n_in = shapes[name]
            if (a.n_out, b.n_out, a.n_in) != (n_out, n_in, b.n_in):
                raise AdapterError(f"{adapter.path} has factors of {name!r} of another shape")
            left, right, rank = dequantize(a), dequantize(b).T, a.n_in
        else:
            check_fit(adapter.path, name, a, b, shapes)
            left, right, rank = dequantize(b), dequantize(a), a.n_out
        scale = 1.0 if adapter.alpha is None else adapter.alpha / rank
        with np.errstate(over="ignore"):  # what it gives is looked at
            left = np.float32(scale) * left
        changes[f"{name}.weight"] = _Change(left, np.ascontiguousarray(right))
    return changes


def _rows(tensor: TensorInfo) -> tuple[int, int]:
    """(n_out, n_in); one row may be written without its first dimension."""
    return math.prod(tensor.shape[:-1]), tensor.shape[-1]


def _is_tied(model: GGUFFile) -> bool:
    return (
        model.string("general.architecture") in _MAY_BE_TIED
        and f"{_OUTPUT}.weight" not in model.tensors
        and f"{_EMBEDDING}.weight" in model.tensors
    )


def _plan(
    model: GGUFFile, changes: dict[str, _Change], type: GGMLQuantizationType | None
) -> list[_Output]:
    """The tensors to write, in order.

    A tied model gets an output of its own if the adapter changes either the output or the
    embedding, as adapters change only one of them.
    """
    sources = [(tensor.name, tensor) for tensor in model.tensors.values()]
    ends = {f"{_OUTPUT}.weight", f"{_EMBEDDING}.weight"}
    if _is_tied(model) and ends & set(changes):
        sources.append((f"{_OUTPUT}.weight", model.tensors[f"{_EMBEDDING}.weight"]))
    outputs, end = [], 0
    for name, source in sources:
        change = changes.get(name)
        new = source.type if change is None else _type(model, source, type)
        block, size = GGML_QUANT_SIZES[new]
        nbytes = source.n_elements // block * size
        outputs.append(_Output(TensorInfo(name, new, source.shape, end, nbytes), source, change))
        end += nbytes + -nbytes % _alignment(model)
    return outputs


def _type(
    model: GGUFFile, tensor: TensorInfo, type: GGMLQuantizationType | None
) -> GGMLQuantizationType:
    """The type of a tensor after its change."""
    try:
        _, size = GGML_QUANT_SIZES[tensor.type]
        quants.dequantize(np.zeros((1, size), np.uint8), tensor.type)
    except NotImplementedError:
        raise UnsupportedError(
            model.path, f"tensor {tensor.name!r} has the type {tensor.type.name}, which is not read"
        ) from None
    if type is None:
        if tensor.type not in _STABLE:
            raise ConfigError(
                f"{tensor.name} is {tensor.type.name}, which is too coarse to round it again: "
                "choose type f16 or q8_0"
            )
        return tensor.type
    if tensor.shape[-1] % GGML_QUANT_SIZES[type][0]:
        raise ConfigError(
            f"{tensor.name} has rows of {tensor.shape[-1]}, which are not whole blocks of "
            f"{type.name}: choose type f16"
        )
    return type


def _alignment(model: GGUFFile) -> int:
    return model.integer("general.alignment", DEFAULT_ALIGNMENT)


def _write_header(file: BinaryIO, model: GGUFFile, outputs: list[_Output]) -> None:
    n_keys, metadata = metadata_bytes(model.path)
    file.write(MAGIC + struct.pack("<IQQ", model.version, len(outputs), n_keys) + metadata)
    for output in outputs:
        info, name = output.info, output.info.name.encode()
        file.write(struct.pack("<Q", len(name)) + name)
        dims = info.shape[::-1]
        file.write(struct.pack(f"<I{len(dims)}Q", len(dims), *dims))
        file.write(struct.pack("<IQ", info.type, info.offset))
    _pad(file, _alignment(model))


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _blocks(model: BinaryIO, output: _Output) -> Iterator[bytes]:
    """The data of a tensor. model: the model's file, which is read, as mapped pages would stay."""
    source, change = output.source, output.change
    model.seek(source.offset)
    if change is None:
        for start in range(0, source.nbytes, _BLOCK):
            yield model.read(min(_BLOCK, source.nbytes - start))
        return
    n_out, n_in = _rows(source)
    row, step = source.nbytes // n_out, max(1, _BLOCK // n_in)
    for first in range(0, n_out, step):
        end = min(first + step, n_out)
        data = np.frombuffer(model.read((end - first) * row), np.uint8).reshape(end - first, row)
        with np.errstate(over="ignore", invalid="ignore"):
            values = quants.dequantize(data, source.type) + change.left[first:end] @ change.right
            rounded = quants.quantize(values, output.info.type)
        if not np.isfinite(quants.dequantize(rounded.view(np.uint8), output.info.type)).all():
            raise NumericsError(
                f"{source.name} has values that {output.info.type.name} cannot hold"
            )
        yield rounded.tobytes()
