"""``make bench-gpu`` at a small size, where nothing but torch, triton and NumPy can be imported."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

SCRIPT = ROOT / "bench" / "gpu.py"
# What the project or its peers use elsewhere; fwdllm itself comes from the sources.
ABSENT = ("gguf", "llama_cpp", "typer", "rich", "hypothesis", "nanobind", "safetensors")
BARE = f"""
import runpy, sys
for name in {ABSENT}:
    sys.modules[name] = None
sys.modules["transformers"] = sys.modules["peft"] = None
sys.path[:] = [p for p in sys.path if "_editable" not in p]
sys.meta_path[:] = [f for f in sys.meta_path if "scikit" not in type(f).__module__]
sys.path.insert(0, {str(Path(__file__).parents[1] / "support")!r})
import interpreter
sys.argv = sys.argv[1:]
sys.path[0] = {str(SCRIPT.parent)!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch", "triton")),
    reason="torch or triton is not installed",
)


def run(arguments: list[str], code: str | None = None, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *(["-c", code] if code else []), str(SCRIPT), *arguments]
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(command, env={**base, **env}, capture_output=True, text=True)


def test_it_runs_on_a_bare_machine(tmp_path: Path) -> None:
    arguments = ["--small", "--rounds", "1", "--out", str(tmp_path)]
    done = run(arguments, BARE, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "bench-gpu.json").read_text())
    assert all(check["holds"] for check in result["checks"].values())
    [kernels] = result["kernels"]["kernels"].values()
    assert {"matmul Q4_0 64x64x4", "seeded_axpy 2 seeds"} <= kernels.keys()
    assert all(entry["rate"] > 0 for entry in kernels.values())
    assert result["step"]["forward-ad"]["seconds"] > 0
    assert "not installed" in result["peers"]["mezo bf16"]["skipped"]
    assert "DOES NOT HOLD" not in (tmp_path / "bench-gpu.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bench-gpu.json", "bench-gpu.md"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(["--out", str(tmp_path)])
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "bench-gpu needs an NVIDIA GPU that PyTorch can use: there is none"
    )
    assert not list(tmp_path.iterdir())
