"""Adapters as the bytes of GGUF files, the form in which the store keeps them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.files import temporary_folder


@contextlib.contextmanager
def as_file(content: bytes) -> Iterator[Path]:
    """A temporary file with these bytes, for functions that read only files."""
    with temporary_folder() as folder:
        path = folder / "adapter.gguf"
        path.write_bytes(content)
        yield path


def to_bytes(adapter: Adapter) -> bytes:
    """The bytes of an adapter's GGUF file. NumericsError if a value is not finite."""
    with temporary_folder() as folder:
        path = folder / "adapter.gguf"
        save_gguf(adapter, path)
        return path.read_bytes()
