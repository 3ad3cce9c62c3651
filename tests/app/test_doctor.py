"""``fwdllm doctor``: what it says is so."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cli_runs import make_cli

from fwdllm import doctor
from fwdllm.engine.llamacpp import probe
from fwdllm.kernels import cpu


def test_the_report(capfd: pytest.CaptureFixture[str]) -> None:
    done = make_cli(capfd)("doctor", "--json")
    assert (done.code, done.err) == (0, "")
    report = done.json
    assert report["ok"] is True
    assert report["versions"]["fwdllm"] == importlib.metadata.version("fwdllm")
    assert report["processor"]["cpus"] == os.cpu_count()
    kernels = report["kernels"]
    assert (kernels["isa"], tuple(kernels["isas"])) == (cpu.isa, cpu.isas)
    assert kernels["threads"] == cpu.num_threads()
    assert kernels["compiler"].startswith(("GCC ", "Clang "))
    usual = probe.verdict()  # test_llama_probe.py says what that may be
    assert (report["llama_cpp"]["state"], report["llama_cpp"]["reason"]) == (
        usual.state,
        usual.reason,
    )
    assert Path(report["llama_cpp"]["library"]).is_dir()
    assert "CPU" in report["llama_cpp"]["system"]
    assert report["libraries"]["numpy"] == importlib.metadata.version("numpy")
    assert report["extras"].keys() == {"hub", "gpu", "federation", "server"}
    assert report["extras"]["server"] == []
    memory = report["memory"]
    assert memory["total_bytes"] > 2**28
    if sys.platform == "linux":
        assert 0 < memory["available_bytes"] < memory["total_bytes"]


def test_the_page(capfd: pytest.CaptureFixture[str]) -> None:
    done = make_cli(capfd)("doctor")
    assert done.code == 0
    for words in ("our kernels", cpu.isa, "llama.cpp", "works", "[server]", "installed"):
        assert words in done.out


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    version = doctor._version
    monkeypatch.setattr(doctor, "_output", lambda command: "")  # no compiler, no driver
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name == "fastapi" else version(name)
    )
    report = doctor.examine()
    assert report["extras"]["server"] == ["fastapi"]
    assert (report["compilers"], report["gpus"]) == ({}, [])
    doctor.render(report)


def test_a_wrong_instruction_set_is_a_finding() -> None:
    command = [sys.executable, "-m", "fwdllm", "doctor"]
    env = {**os.environ, "FWDLLM_ISA": "abacus"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "do not work: FWDLLM_ISA is abacus" in done.stdout


def test_a_driver_that_hangs_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "_SECONDS", 0.2)
    assert doctor._gpus() == []
