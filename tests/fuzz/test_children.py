"""The fuzzer notices every bad end of a case, keeps its input and goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at children by /proc")

if sys.platform == "linux":
    from children import run

MB = 1 << 20


def die() -> int:
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def hang() -> int:
    subprocess.run(["sleep", "60"], check=False)
    return 0


def fill() -> int:
    kept = [b"x" * (8 * MB) for _ in range(50)]
    time.sleep(10)
    return len(kept)


def fill_at_once() -> int:
    b"x" * (400 * MB)
    return 0


def complain() -> int:
    raise RuntimeError("not foreseen")


def refuse() -> int:
    print("fwdllm: no")
    return 2


@pytest.mark.parametrize(
    ("work", "fault"),
    [
        (lambda: 0, None),
        (refuse, None),
        (die, "SIGSEGV"),
        (hang, "hang"),
        (fill, "memory"),
        (fill_at_once, "memory"),
        (complain, "traceback"),
        (lambda: 3, "exit code 3"),
        (lambda: 2, "nothing said"),
    ],
)
def test_every_end_is_told_apart(
    work: Callable[[], int], fault: str | None, tmp_path: Path
) -> None:
    # On a busy machine the others may take their time.
    seconds = 2 if work is hang else 30
    ended = run(work, tmp_path / "log", seconds=seconds, memory=200 * MB)
    assert ended.fault == fault
    assert ended.seconds < seconds + 3


# A program like run.py with one target, whose cases end in all ways.
PROGRAM = """
import os, signal, sys, time
sys.path[:0] = [{fuzz!r}, {support!r}]
import run
from target import Row, Target

def write(random, folder, case):
    (case / "input").write_text(case.name)
    return "some"

def check(opened, case):
    number = int((case / "input").read_text().split("-")[1])
    if number == 1: os.kill(os.getpid(), signal.SIGSEGV)
    if number == 2: time.sleep(60)
    if number == 3:
        while True: pass
    if number == 4: kept = b"x" * (400 << 20); time.sleep(60)
    if number == 5: raise ValueError("five")
    return [Row("work", "wrong" if number == 6 else "ok")]

run.MEMORY = 200 << 20
run.targets = lambda: {{"odd": Target(lambda folder: None, write, check, seconds=0.5)}}
sys.exit(run.main())
"""


def test_a_run_goes_on_after_every_bad_end(tmp_path: Path) -> None:
    here = Path(__file__).parent
    program = tmp_path / "program.py"
    text = PROGRAM.format(fuzz=str(here), support=str(here.parent / "support"))
    program.write_text(textwrap.dedent(text))
    command = [sys.executable, program, "--first", "0", "--count", "9", "--jobs", "2"]
    done = subprocess.run(
        [*command, "--out", tmp_path], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1, done.stderr
    found = dict(re.findall(r"^odd-(\d) \(some\), (?:process|work): (\S+?), ", done.stdout, re.M))
    assert found == {
        "1": "SIGSEGV", "2": "hang", "3": "hang", "4": "memory", "5": "traceback", "6": "wrong",
    }  # fmt: skip
    assert "| all | 3, 0, 1 | 0, 0, 5 |" in done.stdout
    kept = {path.name: (path / "input").read_text() for path in tmp_path.glob("odd-*")}
    assert kept == {f"odd-{i}": f"case-{i}" for i in range(1, 7)}
    again = subprocess.run(
        [*command[:2], "--again", tmp_path / "odd-6"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "work: wrong" in again.stdout
