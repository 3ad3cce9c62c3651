"""A GGUF file as parts, each of which can be made wrong before they are written again."""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_bytes import ARRAY, STRING, array, pair, tensor, text

# Sizes of elements by the number of their type: uint8 to bool, and the 64-bit ones.
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}

_TYPES = {int(type) for type in GGML_QUANT_SIZES}
_MOST_BYTES = 64 << 20


@dataclass
class Pair:
    """A key, the number of its value's type, and the value's bytes."""

    key: bytes
    type: int
    value: bytes


@dataclass
class Entry:
    """A tensor in the table. dims: as they are in the file, the fastest first."""

    name: bytes
    dims: tuple[int, ...]
    type: int
    offset: int

    @property
    def size(self) -> int | None:
        """Bytes of its data; None for a type or a shape that has none."""
        if self.type not in _TYPES or not self.dims:
            return None
        block, n_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(self.type)]
        return None if self.dims[0] % block else math.prod(self.dims) // block * n_bytes


@dataclass
class Parts:
    """All of a file of version 3, little-endian. counts: None for the true ones."""

    pairs: list[Pair]
    tensors: list[Entry]
    data: bytearray
    alignment: int
    counts: tuple[int, int] | None = None

    @property
    def architecture(self) -> str:
        """general.architecture."""
        found = self.find(b"general.architecture")
        return "" if found is None else found.value[8:].decode(errors="replace")

    def find(self, key: bytes) -> Pair | None:
        """The first pair of this key."""
        return next((p for p in self.pairs if p.key == key), None)

    def put(self, key: bytes, type: int, value: bytes) -> None:
        """Replace a pair's value, or add the pair."""
        found = self.find(key)
        if found is None:
            self.pairs.append(Pair(key, type, value))
        else:
            found.type, found.value = type, value

    def pack(self) -> None:
        """Lay the tensors' data out anew, one after the other, each as long as it now has to be.

        Nothing is done if that is too much. What is missing is filled with what follows.
        """
        sizes = [t.size or 0 for t in self.tensors]
        if sum(sizes) > _MOST_BYTES:
            return
        data = bytearray()
        for t, size in zip(self.tensors, sizes, strict=True):
            found = self.data[t.offset : t.offset + size]
            t.offset = len(data)
            data += found + self.data[: size - len(found)]
            data += bytes(size - (len(data) - t.offset))
            data += bytes(-len(data) % self.alignment)
        self.data = data

    def header(self) -> bytes:
        """All before the tensors' data."""
        n_tensors, n_pairs = self.counts or (len(self.tensors), len(self.pairs))
        parts = [b"GGUF", struct.pack("<IQQ", 3, n_tensors, n_pairs)]
        parts += [pair(p.key, p.type, p.value) for p in self.pairs]
        parts += [tensor(t.name, t.dims, t.type, t.offset) for t in self.tensors]
        head = b"".join(parts)
        return head + bytes(-len(head) % self.alignment)

    def content(self) -> bytearray:
        """The file."""
        return bytearray(self.header()) + self.data


def read_parts(path: Path) -> Parts:
    """The parts of a sound file."""
    content = path.read_bytes()
    at = 8

    def take(format: str) -> tuple[int, ...]:
        nonlocal at
        found = struct.unpack_from("<" + format, content, at)
        at += struct.calcsize("<" + format)
        return found

    def raw() -> bytes:
        nonlocal at
        (length,) = take("Q")
        at += length
        return content[at - length : at]

    def value(type: int) -> bytes:
        nonlocal at
        start = at
        if type == STRING:
            raw()
        elif type == ARRAY:
            item, count = take("IQ")
            if item == STRING:
                for _ in range(count):
                    raw()
            else:
                at += SIZES[item] * count
        else:
            at += SIZES[type]
        return content[start:at]

    n_tensors, n_pairs = take("QQ")
    pairs = []
    for _ in range(n_pairs):
        key, (type,) = raw(), take("I")
        pairs.append(Pair(key, type, value(type)))
    tensors = []
    for _ in range(n_tensors):
        name, (n_dims,) = raw(), take("I")
        dims = take(f"{n_dims}Q")
        tensors.append(Entry(name, dims, *take("IQ")))
    alignment = next(
        (int.from_bytes(p.value, "little") for p in pairs if p.key == b"general.alignment"), 32
    )
    at += -at % alignment
    return Parts(pairs, tensors, bytearray(content[at:]), alignment)


def strings(value: bytes) -> list[bytes]:
    """The elements of an array of strings."""
    _, count = struct.unpack_from("<IQ", value)
    found, at = [], 12
    for _ in range(count):
        (length,) = struct.unpack_from("<Q", value, at)
        found.append(value[at + 8 : at + 8 + length])
        at += 8 + length
    return found


def of_strings(values: list[bytes]) -> bytes:
    """The value of an array of strings."""
    return array(STRING, len(values), b"".join(map(text, values)))
