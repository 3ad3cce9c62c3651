"""Damaged adapter files: loading works or raises FwdllmError, and nothing else."""

from __future__ import annotations

import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_adapters import N_HEADS, N_KV_HEADS, WIDTH, random_adapter, shapes

from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.adapters.io import load_adapter, save_gguf, save_peft
from fwdllm.engine.adapters.peft import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE
from fwdllm.engine.errors import FwdllmError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import reference

FOLDER = tempfile.TemporaryDirectory()  # one for all cases: removing one takes milliseconds
GGUF_FILE = "adapter.gguf"
PARTS = [GGUF_FILE, WEIGHTS_FILE, CONFIG_FILE, HEAD_FILE]


def sound_files() -> dict[str, bytes]:
    config = LoRAConfig(rank=1, targets=("attn_k", "attn_q"), layers=(0, 2))
    adapter = random_adapter(config, head=Head(("no", "yes"), WIDTH))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_gguf(adapter, folder / GGUF_FILE)
        save_peft(adapter, folder, N_HEADS, N_KV_HEADS, "model")
        return {part: (folder / part).read_bytes() for part in PARTS}


SOUND = sound_files()


def load(changed: str, content: bytes) -> Adapter | None:
    """Load the adapter with one of its files replaced; None if it was refused."""
    folder = Path(FOLDER.name) / "case"
    shutil.rmtree(folder, ignore_errors=True)  # new files, as the old may still be mapped
    folder.mkdir()
    for part in PARTS:
        (folder / part).write_bytes(content if part == changed else SOUND[part])
    path = folder / GGUF_FILE if changed == GGUF_FILE else folder
    try:
        adapter = load_adapter(path, "llama", shapes(), N_HEADS, N_KV_HEADS, reference)
    except FwdllmError:
        return None
    # What was accepted can be used.
    assert np.isfinite(adapter.theta).all()
    assert math.isfinite(adapter.config.scale)
    assert all(adapter.factors(t).a.shape[1] == t.n_in for t in adapter.targets)
    return adapter


every_part = pytest.mark.parametrize("part", PARTS)


@every_part
def test_sound_file_is_accepted(part: str) -> None:
    adapter = load(part, SOUND[part])
    assert adapter is not None
    assert adapter.head is not None


@every_part
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_truncated(part: str, data: st.DataObject) -> None:
    n = data.draw(st.integers(0, len(SOUND[part]) - 1))
    complete_json = part == CONFIG_FILE and not SOUND[part][n:].strip()
    assert (load(part, SOUND[part][:n]) is not None) == complete_json


@every_part
@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_bytes(part: str, data: st.DataObject) -> None:
    content = bytearray(SOUND[part])
    place = st.integers(0, len(content) - 1)
    for at, value in data.draw(st.lists(st.tuples(place, st.integers(0, 255)), min_size=1)):
        content[at] = value
    load(part, bytes(content))


@every_part
@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_changed_length(part: str, data: st.DataObject) -> None:
    content = SOUND[part]
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, len(content)))
    load(part, content[:begin] + data.draw(st.binary(max_size=64)) + content[end:])


@pytest.mark.parametrize("part", [GGUF_FILE, WEIGHTS_FILE])
def test_most_changes_of_the_header_are_noticed(part: str) -> None:
    content = SOUND[part]
    accepted = 0
    for place in range(8, 400, 3):
        changed = bytes([content[place] ^ 0xFF])
        accepted += load(part, content[:place] + changed + content[place + 1 :]) is not None
    assert accepted < 40
