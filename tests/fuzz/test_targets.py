"""A short run of every target of ``make fuzz``: the same few cases each time, without a finding."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks at children by /proc")

RUN = Path(__file__).with_name("run.py")
# So many cases take a second or two.
COUNTS = {
    "gguf": 10,
    "models": 1,
    "adapters": 1,
    "jsonl": 50,
    "wire": 60,
    "ledger": 20,
    "http": 40,
    "grammars": 40,
}


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, RUN, "--jobs", 1, "--out", folder / "found", *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("name", COUNTS)
def test_a_few_cases(name: str, tmp_path: Path) -> None:
    done = run(tmp_path, name, "--first", 0, "--count", COUNTS[name])
    assert done.returncode == 0, done.stdout + done.stderr
    [total] = re.findall(r"^\| all \| (\d+), (\d+), 0 \|", done.stdout, re.MULTILINE)
    assert sum(map(int, total)) >= COUNTS[name]  # each was tried, and something was said of it
    assert not (tmp_path / "found").exists()


def test_every_target_is_tried() -> None:
    assert {path.stem for path in RUN.parent.glob("fuzz_*.py")} == {
        f"fuzz_{name}" for name in COUNTS
    }
