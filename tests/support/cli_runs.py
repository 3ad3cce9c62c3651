"""Running the ``fwdllm`` command in tests, and small inputs for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from fwdllm.cli.commands import main
from fwdllm.demo import asset

MODEL = asset("fwdllm-tiny.gguf")
TRAIN = asset("pirate.train.jsonl")

# A run of a second or two: the bundled model learns something in a handful of steps.
QUICK = ("--steps", "4", "--batch-size", "4", "--lr", "0.01", "--held-out", "4")


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Cli = Callable[..., Outcome]


def make_cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    """A function that runs the command in this process, with all that it prints caught.

    But for one line: where llama.cpp's fastest kernels fail, a process says so once, before its
    first use of them, which may be in any test.
    """

    def run(*arguments: object) -> Outcome:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        lines = err.splitlines(keepends=True)
        err = "".join(line for line in lines if "without its fastest kernels" not in line)
        code = exit.value.code
        return Outcome(code if isinstance(code, int) else 0, out, err)

    return run


def start_cli(arguments: Sequence[object]) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "fwdllm", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def write_rows(path: Path, rows: Sequence[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pirate_rows(count: int) -> list[dict[str, str]]:
    with open(TRAIN, encoding="utf-8") as lines:
        return [json.loads(line) for line in islice(lines, count)]
