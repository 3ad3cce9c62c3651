"""Copies of a model file with other metadata or tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter

_TYPES = {
    bool: GGUFValueType.BOOL,
    int: GGUFValueType.UINT32,
    float: GGUFValueType.FLOAT32,
    str: GGUFValueType.STRING,
    list: GGUFValueType.ARRAY,
}


def changed(
    path: Path,
    source: Path,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | None] | None = None,
    types: Mapping[str, GGMLQuantizationType] | None = None,
) -> Path:
    """Write ``source`` to ``path``, some keys and tensors replaced, added or (None) left out.

    types: of tensors that are given as blocks, uint8.
    """
    reader = GGUFReader(source)
    fields = {k: f for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    metadata, tensors = metadata or {}, tensors or {}
    writer = GGUFWriter(path, metadata.get("general.architecture", "llama"))
    for key in dict.fromkeys([*fields, *metadata]):
        value = metadata[key] if key in metadata else fields[key].contents()
        if value is None or key == "general.architecture":
            continue
        type = _TYPES[value.__class__] if key in metadata else fields[key].types[0]
        item = None
        if type == GGUFValueType.ARRAY:
            item = _TYPES[value[0].__class__] if key in metadata else fields[key].types[-1]
            if item == GGUFValueType.UINT32:
                item = GGUFValueType.INT32
        writer.add_key_value(key, value, type, item)
    for tensor in reader.tensors:
        if tensor.name not in tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in tensors.items():
        if data is not None:
            writer.add_tensor(name, data, raw_dtype=(types or {}).get(name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
