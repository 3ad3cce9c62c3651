"""A real model's first layers, where all of them would take a test minutes and show no more."""

from __future__ import annotations

from pathlib import Path

import gguf


def first_layers(model: Path, n_layers: int, path: Path) -> Path:
    """Write the model without its later layers to ``path``; gives that."""
    reader = gguf.GGUFReader(model)
    architecture = reader.fields[gguf.Keys.General.ARCHITECTURE].contents()
    count = gguf.Keys.LLM.BLOCK_COUNT.format(arch=architecture)
    writer = gguf.GGUFWriter(path, architecture)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != gguf.Keys.General.ARCHITECTURE:
            type, *element = field.types
            value = n_layers if key == count else field.contents()
            writer.add_key_value(key, value, type, element[-1] if element else None)
    for tensor in reader.tensors:
        parts = tensor.name.split(".")
        if parts[0] != "blk" or int(parts[1]) < n_layers:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
