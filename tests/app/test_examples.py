"""The scripts of examples/ run, and come to what they say they come to."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from places import ROOT

EXAMPLES = ROOT / "examples"


def output_of(name: str, folder: Path) -> str:
    """What an example prints when it is started in a folder."""
    command = [sys.executable, EXAMPLES / name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, text: str) -> tuple[float, ...]:
    """The groups of the one line that begins with a pattern."""
    [match] = re.finditer(f"^{pattern}", text, re.MULTILINE)
    return tuple(map(float, match.groups()))


def test_every_example_has_a_test() -> None:
    tested = set(re.findall(r'output_of\("(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_tune(tmp_path: Path) -> None:
    found = output_of("tune.py", tmp_path)
    before, after = numbers(r"held-out loss ([\d.]+) -> ([\d.]+)$", found)
    assert after < before - 0.5
    assert re.search(r"^What does a cow say\? \S", found, re.MULTILINE)
    assert (tmp_path / "pirate.gguf").is_file()


def test_own_estimator(tmp_path: Path) -> None:
    found = output_of("own_estimator.py", tmp_path)
    assert numbers(r"correlation with exact slopes: ([\d.]+)$", found)[0] > 0.999
    before, after = numbers(r"loss of the batch ([\d.]+) -> ([\d.]+)$", found)
    assert after < before - 0.2


def test_federated_round(tmp_path: Path) -> None:
    found = output_of("federated_round.py", tmp_path)
    assert len(re.findall(r"^client \d: \d+ bytes down, 66 up, taken$", found, re.MULTILINE)) == 3
    assert "\nthe same report again: duplicate\n" in found
    assert "\nround closed: 3 clients, 24 slopes, adapter moved: True\n" in found
    assert found.endswith("server, client and replay have the same adapter: True\n")
