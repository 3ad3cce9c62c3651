"""Adapter files: GGUF LoRA as llama.cpp reads it, and PEFT safetensors.

GGUF: tensors "<name>.weight.lora_a" [rank, n_in] and ".lora_b" [n_out, rank], as made by
llama.cpp's convert_lora_to_gguf.py and read by src/llama-adapter.cpp. A classification head
is metadata, because llama.cpp refuses a file with tensors it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from gguf import GGUF_DEFAULT_ALIGNMENT, GGUFType, GGUFValueType, GGUFWriter, Keys

from fwdllm.engine.adapters.adapter import LAYOUT_VERSION, Adapter, Head
from fwdllm.engine.adapters.peft import read_peft, save_peft
from fwdllm.engine.adapters.stored import (
    StoredAdapter,
    assemble,
    check_fit,
    check_inside_layers,
    check_values,
)
from fwdllm.engine.errors import AdapterError, ConfigError, ModelError, NumericsError
from fwdllm.engine.files import atomic_write
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.kernels.api import Kernels
from fwdllm.kernels.types import Weight

__all__ = ["check_gguf_adapter", "load_adapter", "read_adapter", "save_gguf", "save_peft"]

KEY_LAYOUT_VERSION = "fwdllm.layout_version"
KEY_HEAD_LABELS = "fwdllm.head.labels"
KEY_HEAD_WEIGHT = "fwdllm.head.weight"
KEY_HEAD_BIAS = "fwdllm.head.bias"

SUFFIX_A = ".weight.lora_a"
SUFFIX_B = ".weight.lora_b"
# mergekit adds norms, which llama.cpp skips, too.
_NORM = re.compile(r"[\w.]+_norm\.weight", re.ASCII)


def save_gguf(adapter: Adapter, path: str | Path) -> None:
    """Write a GGUF LoRA file atomically; equal adapters give equal bytes.

    Errors: NumericsError if the adapter holds values that are not finite, ConfigError if the
    folder does not exist.
    """
    if not np.isfinite(adapter.theta).all():
        raise NumericsError("the adapter holds values that are not finite, so it is not saved")
    with atomic_write(path) as temporary:
        writer = GGUFWriter(temporary, adapter.architecture)
        _add_metadata(writer, adapter)
        halves: list[np.ndarray] = []
        for target in adapter.targets:
            factors = adapter.factors(target)
            for suffix, half in ((SUFFIX_A, factors.a), (SUFFIX_B, factors.b)):
                writer.add_tensor_info(target.name + suffix, half.shape, half.dtype, half.nbytes)
                halves.append(half)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        _append(temporary, halves)


def _append(path: Path, tensors: Sequence[np.ndarray]) -> None:
    """Append the data of tensors to a GGUF header; each starts and ends at an aligned position.

    GGUFWriter would call ndarray.tofile, which does not notice that the disk is full.
    """
    with open(path, "ab") as file:
        for tensor in tensors:
            file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
            file.write(tensor.tobytes())
        file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))


def load_adapter(
    path: str | Path,
    architecture: str,
    shapes: Mapping[str, tuple[int, int]],
    n_heads: int,
    n_kv_heads: int,
    ops: Kernels,
) -> Adapter:
    """Load a GGUF LoRA file, a PEFT folder, or the .safetensors file in a PEFT folder.

    architecture: the model's general.architecture.  shapes: as ``adapter.layout``.  n_heads,
    n_kv_heads: of the model, because the rows of q and k are ordered differently in PEFT.
    ops: the kernels that the adapter will use.
    Errors: AdapterError if the file is missing, damaged or made for another model.
    """
    stored = read_adapter(path, architecture, n_heads, n_kv_heads)
    check_inside_layers(stored.path, stored.pairs)
    return assemble(stored, architecture, shapes, ops)


def read_adapter(
    path: str | Path, architecture: str, n_heads: int, n_kv_heads: int
) -> StoredAdapter:
    """The factors in a file, as ``load_adapter`` reads them, whether they fit the model or not."""
    path = Path(path)
    if path.is_dir() or path.suffix == ".safetensors":
        stored = read_peft(path, architecture, n_heads, n_kv_heads)
    else:
        stored = _read_gguf(path, architecture)
    check_values(stored)
    return stored


def check_gguf_adapter(
    path: str | Path, architecture: str, shapes: Mapping[str, tuple[int, int]]
) -> None:
    """Check a GGUF file before llama.cpp reads it, which ends the process on some.

    architecture, shapes: as ``load_adapter``, of the model that it is to be applied to.
    Errors: AdapterError if it is damaged, no LoRA adapter, or for another model.
    """
    stored = _read_gguf(Path(path), architecture)
    check_values(stored)
    check_inside_layers(stored.path, stored.pairs)
    for name, (a, b) in stored.pairs.items():
        check_fit(stored.path, name, a, b, shapes)


def _open_gguf(path: str | Path, architecture: str) -> GGUFFile:
    try:
        file = GGUFFile.open(path)
        kind, kind_of_adapter, found = (
            file.string(key, "")
            for key in (Keys.General.TYPE, Keys.Adapter.TYPE, Keys.General.ARCHITECTURE)
        )
    except ModelError as error:
        raise AdapterError(str(error)) from error
    if kind != GGUFType.ADAPTER:
        raise AdapterError(f"{path} is not an adapter; it is a model or another GGUF file")
    if kind_of_adapter != "lora":
        raise AdapterError(f"{path} is not a LoRA adapter; other kinds are not supported")
    if found != architecture:
        raise AdapterError(f"{path} is for {found!r} models, but this model is {architecture!r}")
    if Keys.Adapter.ALORA_INVOCATION_TOKENS in file.metadata:
        raise AdapterError(f"{path} is an activated LoRA (aLoRA), which is not supported")
    layout = file.metadata.get(KEY_LAYOUT_VERSION, LAYOUT_VERSION)
    if type(layout) is not int or layout != LAYOUT_VERSION:
        raise AdapterError(
            f"{path} has the layout {layout!r}, but only {LAYOUT_VERSION} is known: it is damaged, "
            "or made by a newer fwdllm"
        )
    return file


def _add_metadata(writer: GGUFWriter, adapter: Adapter) -> None:
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, adapter.config.file_alpha)
    writer.add_uint32(KEY_LAYOUT_VERSION, LAYOUT_VERSION)
    if adapter.head is None:
        return
    weight, bias = np.split(adapter.theta[adapter.n_lora :], [adapter.head.n_weight])
    writer.add_array(KEY_HEAD_LABELS, list(adapter.head.labels))
    writer.add_array(KEY_HEAD_WEIGHT, weight.tolist())
    writer.add_array(KEY_HEAD_BIAS, bias.tolist())


def _read_gguf(path: Path, architecture: str) -> StoredAdapter:
    file = _open_gguf(path, architecture)
    try:
        head, values = _read_head(file)
        return StoredAdapter(path, _read_pairs(file), _read_alpha(file), head, values)
    except ModelError as error:
        raise AdapterError(str(error)) from error


def _read_alpha(file: GGUFFile) -> float | None:
    key = Keys.Adapter.LORA_ALPHA
    kind = file.metadata.types.get(key, GGUFValueType.FLOAT32)
    alpha = file.number(key, 0.0)
    if kind != GGUFValueType.FLOAT32:  # on others llama.cpp ends the process
        raise AdapterError(f"{file.path}: its alpha is {kind.name}, not FLOAT32")
    if alpha < 0:
        raise AdapterError(f"{file.path}: its alpha is {alpha}, which is no scale")
    # llama.cpp takes a missing alpha and an alpha of 0 as "no scale".
    return alpha or None


def _read_pairs(file: GGUFFile) -> dict[str, tuple[Weight, Weight]]:
    names = []
    for name in file.tensors:
        if name.endswith((SUFFIX_A, SUFFIX_B)):
            names.append(name[: -len(SUFFIX_A)])
        elif not _NORM.fullmatch(name):
            raise AdapterError(f"{file.path} holds {name!r}, which is not a LoRA tensor")
    return {name: (_half(file, name, SUFFIX_A), _half(file, name, SUFFIX_B)) for name in names}


def _half(file: GGUFFile, name: str, suffix: str) -> Weight:
    if name + suffix not in file.tensors:
        raise AdapterError(f"{file.path} is incomplete: it lacks {name + suffix!r}")
    return file.weight(name + suffix)


def _read_head(file: GGUFFile) -> tuple[Head | None, np.ndarray | None]:
    if KEY_HEAD_LABELS not in file.metadata:
        return None, None
    labels = file.strings(KEY_HEAD_LABELS)
    weight = _floats(file, KEY_HEAD_WEIGHT)
    bias = _floats(file, KEY_HEAD_BIAS)
    try:
        head = Head(labels, len(weight) // max(1, len(labels)))
    except ConfigError as error:
        raise AdapterError(f"{file.path} is damaged: {error}") from error
    if len(weight) != head.n_weight or len(bias) != len(labels):
        raise AdapterError(f"{file.path} is damaged: its classification head is incomplete")
    return head, np.concatenate([weight, bias])


def _floats(file: GGUFFile, key: str) -> np.ndarray:
    values = file.numbers(key)
    if values.dtype != np.float32:
        raise AdapterError(f"{file.path} is damaged: {key} is {values.dtype}, not float32")
    return values
