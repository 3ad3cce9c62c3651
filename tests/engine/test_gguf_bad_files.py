"""Bad GGUF files of every sort: each gets one clear sentence as a ModelError."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_bytes import ARRAY, BOOL, STRING, U8, U32, array, gguf, open_bytes, pair, tensor, text

from fwdllm.engine.errors import ModelError
from fwdllm.engine.gguf import header as gguf_header
from fwdllm.engine.gguf.file import GGUFFile

__all__ = ["open_bytes"]  # a fixture

NONE = 2**64 - 1
VECTOR = tensor("t", (4,))
BAD_FILES: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "three bytes": (b"GGU", "is not a GGUF file"),
    "magic": (gguf(magic=b"PK\x03\x04"), r"is not a GGUF file: it starts with b'PK"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "version 0": (gguf(version=0), "is GGUF version 0"),
    "version 1": (gguf(version=1), "is GGUF version 1.*convert the model again"),
    "version 4": (gguf(version=4), "is GGUF version 4"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "is a big-endian GGUF file"),
    "no counts": (b"GGUF" + struct.pack("<I", 3), "truncated or damaged: the number of tensors"),
    "half a version": (b"GGUF\x03\0", "truncated or damaged: the version ends 2 bytes past"),
    "tensor count": (gguf(counts=(NONE, 0)), f"claims {NONE} tensors"),
    "key count": (gguf(counts=(0, NONE)), f"claims {NONE} metadata keys"),
    "key missing": (gguf(counts=(0, 9)), "metadata key 0 is ''"),
    "key with a NUL": (gguf((pair("a\0b", U8, b"\1"),)), r"metadata key 0 is 'a\\x00b'"),
    "tensor missing": (gguf(counts=(9, 0)), "past the end"),
    "key length": (gguf((struct.pack("<Q", NONE),)), f"key 0 has {NONE} bytes, more than 65535"),
    "key past the end": (gguf((struct.pack("<Q", 60000),)), "key 0 ends .* past the end"),
    "key not utf-8": (gguf((pair(b"\xff", U8, b"\0"),)), "metadata key 0 is not valid UTF-8"),
    "key twice": (gguf((pair("k", U8, b"\0"),) * 2), "metadata key 'k' appears twice"),
    "value type": (gguf((pair("k", 13, b"\0"),)), "value of 'k' has the unknown type 13"),
    "value past the end": (gguf((pair("k" * 28, 12, b""),)), "ends 8 bytes past the end"),
    "bool 2": (gguf((pair("k", BOOL, b"\2"),)), "value of 'k' is a bool other than 0 and 1"),
    "string length": (gguf((pair("k", STRING, b"\xff" * 8),)), f"value of 'k' has {NONE} bytes"),
    "string past the end": (
        gguf((pair("k", STRING, struct.pack("<Q", 1 << 20)),)),
        "value of 'k' ends .* past the end",
    ),
    "string not utf-8": (gguf((pair("k", STRING, text(b"\xc3")),)), "'k' is not valid UTF-8"),
    "array of arrays": (
        gguf((pair("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0"))),)),
        "value of 'k' is an array of arrays",
    ),
    "array type": (gguf((pair("k", ARRAY, array(99, 0, b"")),)), "unknown type 99"),
    "array count": (gguf((pair("k", ARRAY, array(U32, 1 << 61, b"")),)), "past the end"),
    "array count wraps": (gguf((pair("k", ARRAY, array(U32, 1 << 62, b"")),)), "past the end"),
    "strings count": (
        gguf((pair("k", ARRAY, array(STRING, NONE, b"")),)),
        f"value of 'k' ends {8 * NONE - 15} bytes past the end",
    ),
    "string in array": (
        gguf((pair("k", ARRAY, array(STRING, 2, b"\xf0" + b"\xff" * 7 + bytes(8))),)),
        "value of 'k' ends .* past the end",
    ),
    "string ends early": (
        gguf((pair("k", ARRAY, array(STRING, 2, text(bytes(71)))),)),
        "value of 'k' ends 8 bytes past",
    ),
    "alignment 0": (gguf((pair("general.alignment", U32, bytes(4)),)), "not a power of two"),
    "alignment 24": (gguf((pair("general.alignment", U8, b"\x18"),)), "not a power of two"),
    "alignment string": (gguf((pair("general.alignment", STRING, text("32")),)), "not a power"),
    "alignment bool": (gguf((pair("general.alignment", BOOL, b"\1"),)), "not a power of two"),
    "name length": (gguf(tensors=(tensor("n" * 65, (4,)),)), "has 65 bytes, more than 64"),
    "name not utf-8": (gguf(tensors=(tensor(b"\xff", (4,)),)), "tensor 0 is not valid UTF-8"),
    "name twice": (gguf(tensors=(VECTOR, VECTOR), data=bytes(16)), "tensor 't' appears twice"),
    "5 dimensions": (gguf(tensors=(tensor("t", (1,) * 5),), data=bytes(4)), "has 5 dimensions"),
    "dimension 0": (gguf(tensors=(tensor("t", (4, 0)),), data=bytes(4)), r"shape \(0, 4\)"),
    "product overflows": (gguf(tensors=(tensor("t", (1 << 32, 1 << 32)),)), "impossible shape"),
    "one dimension overflows": (gguf(tensors=(tensor("t", (NONE,)),)), "impossible shape"),
    "type 4": (gguf(tensors=(tensor("t", (32,), 4),), data=bytes(99)), "has type number 4,"),
    "type 1000": (gguf(tensors=(tensor("t", (32,), 1000),), data=bytes(99)), "number 1000,"),
    "half a block": (
        gguf(tensors=(tensor("t", (48, 2), 2),), data=bytes(99)),
        "tensor 't' has rows of 48, not whole Q4_0 blocks of 32",
    ),
    "half a large block": (
        gguf(tensors=(tensor("t", (128, 2), 11),), data=bytes(110)),
        "tensor 't' has rows of 128, not whole Q3_K blocks of 256",
    ),
    "unaligned": (gguf(tensors=(tensor("t", (4,), 0, 8),), data=bytes(24)), "is not aligned to 32"),
    "truncated data": (
        gguf(tensors=(VECTOR,), data=bytes(15)),
        "is truncated: it has 79 bytes, but its tensors need 80, 1 more",
    ),
    "truncated block": (
        gguf(tensors=(tensor("t", (32,), 39),), data=bytes(16)),
        "is truncated: it has 80 bytes, but its tensors need 81, 1 more",
    ),
    "far offset": (gguf(tensors=(tensor("t", (4,), 0, 2**64 - 32),), data=bytes(16)), "a gap"),
    "same bytes": (gguf((), (tensor("t", (8,)), tensor("u", (8,))), data=bytes(64)), "overlaps"),
    "alignment of 8 bits": (gguf((pair("general.alignment", U8, b"\x20"),)), "not a power of two"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_get_one_clear_sentence(open_bytes: Callable, tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    with pytest.raises(ModelError, match=message) as caught:
        open_bytes(content)
    sentence = str(caught.value)
    assert sentence.startswith(str(tmp_path / "model.gguf"))
    assert "\n" not in sentence
    assert len(sentence) < 400


def test_good_file_of_the_same_maker_opens(open_bytes: Callable) -> None:
    """The bad files above differ from this one by their fault only."""
    pairs = (
        pair("k", ARRAY, array(STRING, 1, text("a"))),
        pair("general.alignment", U32, b"\x20\0\0\0"),
    )
    file = open_bytes(gguf(pairs, (VECTOR,), data=bytes(16)))
    assert file.vector("t").tolist() == [0, 0, 0, 0]


def test_every_truncation_is_refused(open_bytes: Callable) -> None:
    pairs = (pair("k", ARRAY, array(STRING, 2, text("ab") + text("c"))), pair("b", BOOL, b"\1"))
    content = gguf(pairs, (VECTOR, tensor("u", (2, 2), 1, 32)), data=bytes(40))
    assert list(open_bytes(content).tensors) == ["t", "u"]
    for size in range(len(content)):
        with pytest.raises(ModelError):
            open_bytes(content[:size])


def test_paths_that_are_not_files(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"none\.gguf does not exist"):
        GGUFFile.open(tmp_path / "none.gguf")
    with pytest.raises(ModelError, match="is a folder"):
        GGUFFile.open(tmp_path)
    with pytest.raises(ModelError, match="cannot read"):
        GGUFFile.open("a\0b")
    with pytest.raises(ModelError, match="cannot read"):
        GGUFFile.open("a" * 5000)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes on this system")
def test_a_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR)  # a reader that does wait fails this test, not hangs
    try:
        with pytest.raises(ModelError, match="not a regular file"):
            GGUFFile.open(path)
    finally:
        os.close(descriptor)


def test_header_size_is_bounded(open_bytes: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    content = gguf((pair("k", ARRAY, array(U8, 2 << 20, bytes(2 << 20))),))
    open_bytes(content)
    monkeypatch.setattr(gguf_header, "MAX_HEADER_BYTES", 1 << 20)
    with pytest.raises(ModelError, match="its header is over 1 MiB, in the value of 'k'"):
        open_bytes(content)


def test_long_keys_are_shortened_in_messages(open_bytes: Callable) -> None:
    with pytest.raises(ModelError, match=r"k\.\.\.' has the unknown type 99") as caught:
        open_bytes(gguf((pair("k" * 60000, 99, b""),)))
    assert len(str(caught.value)) < 400


def test_arrays_are_checked_at_access(open_bytes: Callable) -> None:
    strings = array(STRING, 2, text("a") + text(b"\xff"))
    pairs = (pair("s", ARRAY, strings), pair("b", ARRAY, array(BOOL, 2, b"\1\2")))
    file = open_bytes(gguf(pairs))
    with pytest.raises(ModelError, match="string 1 of array 's' is not valid UTF-8"):
        file.strings("s")
    with pytest.raises(ModelError, match="array 'b' has a bool other than 0 and 1"):
        file.numbers("b")
