"""Damaged GGUF files: opening and reading everything works or raises FwdllmError, in time.

A valid file from the gguf package's writer is changed at random places. Nothing else than
FwdllmError may come out, within seconds, and without allocating what a damaged count claims.
"""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf_bytes import ARRAY, BOOL, STRING, array, gguf, pair, tensor, text
from hypothesis import given, settings
from hypothesis import strategies as st

from fwdllm.engine.errors import FwdllmError
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.gguf.header import MAX_HEADER_BYTES

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "setitimer"), reason="no interval timer on this system"
)
CASE_SECONDS = 2.0
FOLDER = tempfile.TemporaryDirectory()  # one for all cases: removing one takes milliseconds
QUANTIZED = {"Q4_0": 18, "IQ4_NL": 18, "MXFP4": 17}  # and bytes of a block


def valid_file() -> bytes:
    """A small model-like file with every kind of metadata value and several tensor types."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        writer = GGUFWriter(path, "llama")
        writer.add_custom_alignment(32)
        writer.add_block_count(2)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_bool("tokenizer.ggml.add_bos_token", True)
        writer.add_chat_template("{% for m in messages %}{{ m }}{% endfor %}")
        writer.add_token_list(["<s>", "</s>", "ä", "token"])
        writer.add_token_scores([0.0, -1.0, -2.0, -3.0])
        writer.add_array("x.flags", [True, False])
        writer.add_tensor("norm", np.ones(8, np.float32))
        writer.add_tensor("half", np.ones((2, 8), np.float16))
        for name, n_bytes in QUANTIZED.items():
            blocks = np.zeros((2, n_bytes), np.uint8)
            writer.add_tensor(name, blocks, raw_dtype=GGMLQuantizationType[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def vocabulary_file() -> bytes:
    """A file without tensors whose last byte belongs to a string of an array."""
    tokens = array(STRING, 3, text("<s>") + text("") + text("token"))
    return gguf((pair("bool", BOOL, b"\1"), pair("tokens", ARRAY, tokens))).rstrip(b"\0")


VALID = {"model": valid_file(), "vocabulary": vocabulary_file()}
DATA_BYTES = 2 * 32 + 3 * 64  # of the tensors, each padded to the alignment
HEADER_BYTES = len(VALID["model"]) - DATA_BYTES
MODEL_AND_VOCABULARY = pytest.mark.parametrize("name", VALID)


def touch(path: Path) -> int:
    """Open the file and read all metadata and tensors; return how many were read."""
    file = GGUFFile.open(path)
    n_read = sum(1 for _ in file.metadata.items())
    for name, info in file.tensors.items():
        read = file.vector if len(info.shape) == 1 else file.weight
        try:
            value = read(name)
            n_read += int((value if isinstance(value, np.ndarray) else value.data).size > 0)
        except FwdllmError:
            continue  # a damaged tensor must not keep the others from being read
    return n_read


@contextmanager
def deadline(seconds: float = CASE_SECONDS) -> Iterator[None]:
    """Fail, rather than wait for ever, when the block takes longer than ``seconds``."""

    def expired(signum: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not finished after {seconds} s")

    previous = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def check(content: bytes) -> bool:
    """Whether the file was accepted; anything but acceptance and FwdllmError fails the test."""
    path = Path(FOLDER.name) / "m.gguf"
    path.unlink(missing_ok=True)  # a new file, as the old one may still be mapped
    path.write_bytes(content)
    with deadline():
        try:
            touch(path)
        except FwdllmError:
            return False
        return True


@pytest.mark.parametrize(("name", "n_values"), [("model", 9 + 5), ("vocabulary", 2)])
def test_the_unchanged_file_is_read_in_full(tmp_path: Path, name: str, n_values: int) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(VALID[name])
    assert touch(path) == n_values


def replace(content: bytes, place: int, new: bytes) -> bytes:
    return content[:place] + new + content[place + len(new) :]


def flip(content: bytes, bit: int) -> bytes:
    place = min(bit // 8, len(content) - 1)
    return replace(content, place, bytes([content[place] ^ 1 << bit % 8]))


# Most of the header's fields are 4- or 8-byte numbers: extremes and near misses of limits.
LIMITS = [0, 1, 2, 5, 7, 8, 9, 13, 31, 64, 65, HEADER_BYTES, HEADER_BYTES + DATA_BYTES]
POWERS = [2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**60, 2**61, 2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1]
NUMBERS = st.sampled_from(LIMITS + POWERS)


@st.composite
def changed(draw: st.DrawFn) -> bytes:
    """One of the valid files after one to four changes."""
    content = draw(st.sampled_from(list(VALID.values())))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        kind = draw(st.sampled_from(["flip", "number", "insert", "delete", "overwrite"]))
        if kind == "flip" and content:
            content = flip(content, 8 * place + draw(st.integers(0, 7)))
        elif kind == "number":
            width = draw(st.sampled_from([4, 8]))
            number = draw(NUMBERS) % 2 ** (8 * width)
            content = replace(content, place, number.to_bytes(width, "little"))
        elif kind == "delete":
            content = content[:place] + content[place + draw(st.integers(1, 64)) :]
        elif kind == "insert":
            content = content[:place] + draw(st.binary(max_size=16)) + content[place:]
        else:
            content = replace(content, place, draw(st.binary(max_size=16)))
    return content


@settings(max_examples=500, deadline=None, derandomize=True)
@given(changed())
def test_changed_anywhere(content: bytes) -> None:
    check(content)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.sampled_from(list(VALID.values())), st.integers(0, HEADER_BYTES), st.binary())
def test_random_tail(content: bytes, place: int, tail: bytes) -> None:
    check(content[:place] + tail)


@MODEL_AND_VOCABULARY
def test_every_flipped_header_bit(name: str) -> None:
    content = VALID[name]
    n_bits = 8 * min(HEADER_BYTES, len(content))
    accepted = sum(check(flip(content, bit)) for bit in range(n_bits))
    assert 0 < accepted < n_bits  # a changed letter is fine, a length is not


@MODEL_AND_VOCABULARY
def test_every_number_at_every_place(name: str) -> None:
    content = VALID[name]
    for place in range(4, len(content)):
        check(replace(content, place, struct.pack("<Q", 2**64 - 1)))
        check(replace(content, place, struct.pack("<I", 2**31)))
        check(replace(content, place, struct.pack("<I", 9)))


@pytest.mark.parametrize(("name", "spare"), [("model", 30), ("vocabulary", 0)])
def test_every_truncation(name: str, spare: int) -> None:
    # The model's last tensor has 34 bytes, padded to 64.
    content = VALID[name]
    for size in range(len(content) - spare):
        assert not check(content[:size])
    assert check(content[: len(content) - spare])


def absurd_files() -> list[bytes]:
    """Files of a few bytes that claim to hold far more than memory does."""
    huge = struct.pack("<Q", 2**40)
    key = text("k")
    matrix = tensor("t", (2**20, 2**20))
    claims = [
        gguf(counts=(2**40, 0)),
        gguf(counts=(0, 2**40)),
        gguf(counts=(1 << 17, 0)),
        gguf(counts=(0, 1 << 17)),
        gguf((huge,)),
        gguf((key + struct.pack("<I", STRING) + huge,)),
        gguf(tensors=(huge,)),
        gguf(tensors=(key + struct.pack("<I", 2**31),)),
        gguf(tensors=(matrix,)),
    ]
    for type in range(13):
        for count in (2**40, 2**60, 2**64 - 1):
            claims.append(gguf((pair("k", ARRAY, array(type, count, b"")),)))
    return [claim + bytes(4096) for claim in claims]


MEMORY_SCRIPT = """
import resource, sys
from pathlib import Path
from fwdllm.engine.errors import FwdllmError
from fwdllm.engine.gguf.file import GGUFFile

used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
try:
    bytearray(128 << 20)
except MemoryError:
    print("limited")
for path in sorted(Path(sys.argv[1]).iterdir()):
    try:
        dict(GGUFFile.open(path).metadata)
        print("accepted", path.name)
    except FwdllmError:
        print("refused")
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux's memory limit")
def test_absurd_claims_do_not_allocate(tmp_path: Path) -> None:
    files = absurd_files()
    for i, content in enumerate(files):
        (tmp_path / f"{i}.gguf").write_bytes(content)
    result = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:-1] == ["limited"] + ["refused"] * len(files)


@pytest.mark.parametrize("n_bytes", [MAX_HEADER_BYTES - 1024, MAX_HEADER_BYTES, 2**33])
def test_the_slowest_header_takes_seconds(tmp_path: Path, n_bytes: int) -> None:
    # An empty string per 8 bytes. The file is sparse, so it costs no disk.
    path = tmp_path / "m.gguf"
    with open(path, "wb") as file:
        file.write(gguf((pair("k", ARRAY, array(STRING, n_bytes // 8, b"")),)))
        file.truncate(n_bytes + 4096)
    with deadline(10):
        if n_bytes < MAX_HEADER_BYTES:
            assert "k" in GGUFFile.open(path).metadata
            return
        with pytest.raises(FwdllmError, match="header is over"):
            GGUFFile.open(path)
