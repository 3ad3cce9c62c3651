"""Adapters as the bytes of GGUF files, which is how the store keeps them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.adapters.io import save_gguf


@contextlib.contextmanager
def as_file(content: bytes) -> Iterator[Path]:
    """A file with these bytes, for what reads only files."""
    with tempfile.TemporaryDirectory(prefix="fwdllm-") as folder:
        path = Path(folder) / "adapter.gguf"
        path.write_bytes(content)
        yield path


def to_bytes(adapter: Adapter) -> bytes:
    """A GGUF file of an adapter. NumericsError if it holds values that are not finite."""
    with tempfile.TemporaryDirectory(prefix="fwdllm-") as folder:
        path = Path(folder) / "adapter.gguf"
        save_gguf(adapter, path)
        return path.read_bytes()
