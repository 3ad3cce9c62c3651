"""The choice of an instruction set: by measurement, once for a machine, unless one is asked for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fwdllm.kernels import cpu
from fwdllm.kernels.cpu import _native, choice

CONTENDERS = [name for name in cpu.isas if name not in ("avx2", "portable")]
several = pytest.mark.skipif(len(CONTENDERS) < 2, reason="there is nothing to choose from here")


def chosen(cache: Path, isa: str = "") -> str:
    """By a process of its own."""
    env = {**os.environ, "XDG_CACHE_HOME": str(cache), "FWDLLM_ISA": isa}
    command = [sys.executable, "-c", "from fwdllm.kernels import cpu; print(cpu.isa)"]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, check=True
    ).stdout.strip()


def answers(cache: Path) -> Path:
    return cache / "fwdllm" / "instruction-set.json"


def test_only_much_faster_ones_are_preferred_to_the_first() -> None:
    assert choice.best({"amx": 1.0, "avx512_vnni": 2.0}) == "amx"
    assert choice.best({"amx": 1.2, "avx512_vnni": 1.0}) == "amx"
    assert choice.best({"amx": 1.3, "avx512_vnni": 1.0}) == "avx512_vnni"
    assert choice.best({"amx": 3.0, "avx512_vnni": 2.0, "avx512_bf16": 1.0}) == "avx512_bf16"


def test_every_instruction_set_is_measured() -> None:
    seconds = _native.product_seconds(list(cpu.isas))
    assert len(seconds) == len(cpu.isas) and all(0 < s < 10 for s in seconds)
    with pytest.raises(RuntimeError, match="FWDLLM_ISA is abacus"):
        _native.product_seconds(["abacus"])


@several
def test_the_answer_is_kept(tmp_path: Path) -> None:
    first = chosen(tmp_path)
    kept = json.loads(answers(tmp_path).read_text())
    assert list(kept.values()) == [first] and first in CONTENDERS
    other = next(name for name in CONTENDERS if name != first)
    answers(tmp_path).write_text(json.dumps(dict.fromkeys(kept, other)))
    assert chosen(tmp_path) == other


@several
@pytest.mark.parametrize("text", ["", "[]", '{"%s": "abacus"}', '{"%s": ["amx"]}'])
def test_a_damaged_answer_is_found_out_anew(tmp_path: Path, text: str) -> None:
    chosen(tmp_path)
    (key,) = json.loads(answers(tmp_path).read_text())
    answers(tmp_path).write_text(text.replace("%s", key))
    assert chosen(tmp_path) in CONTENDERS
    assert json.loads(answers(tmp_path).read_text())[key] in CONTENDERS


@several
def test_what_is_asked_for_is_used_and_nothing_measured(tmp_path: Path) -> None:
    assert chosen(tmp_path, cpu.isas[-1]) == cpu.isas[-1]
    assert not answers(tmp_path).exists()


@several
def test_a_cache_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "fwdllm").write_text("not a folder")
    assert chosen(tmp_path) in CONTENDERS
