"""GGUF files written byte by byte, so that they may be wrong in any way."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from fwdllm.engine.gguf.file import GGUFFile

U8, U32, F32, BOOL = 0, 4, 6, 7
STRING, ARRAY = 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def pair(key: str | bytes, type: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", type) + value


def array(type: int, count: int, elements: bytes) -> bytes:
    return struct.pack("<IQ", type, count) + elements


def tensor(name: str | bytes, dims: tuple[int, ...], type: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", type, offset)


def gguf(
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    *,
    data: bytes = b"",
    version: int = 3,
    magic: bytes = b"GGUF",
    counts: tuple[int, int] | None = None,
) -> bytes:
    """A GGUF file; ``counts`` (of tensors and pairs) are the true ones unless given."""
    n_tensors, n_pairs = counts or (len(tensors), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_tensors, n_pairs)
    head += b"".join(pairs) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + data


@pytest.fixture
def open_bytes(tmp_path: Path) -> Callable[[bytes], GGUFFile]:
    """Writes the bytes to a file and opens that."""

    def open_file(content: bytes) -> GGUFFile:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return GGUFFile.open(path)

    return open_file
