"""Where real test models and data lie, what runs Triton kernels, and how processes share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from case_models import make_models, models
from hostile import hostile
from places import SHARED

if TYPE_CHECKING:
    from cli_runs import Cli

__all__ = ["hostile", "make_models", "models"]  # fixtures

# Triton reads this when it is imported, in the processes that tests start, too. Its interpreter
# runs on NumPy; with it set, a machine's GPU would not be tested.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Tests run in several processes, see the Makefile: they share the processors, with a priority as
# low as that of a server's jobs, which would get nothing beside them. Kernels and libraries read
# this when they start.
if (workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))) > 1:
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    for name in ("FWDLLM_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ.setdefault(name, threads)
    os.nice(19)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than processors: tests of servers and federations wait most of their time.

    Another would cost as much as it gains: each imports all tests, in twelve seconds.
    """
    return min(8, (os.cpu_count() or 1) + 1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and data beside the repository."""
    if not (SHARED / "models").is_dir():
        pytest.skip("no folder shared/ with real models beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def bundled() -> Path:
    """The bundled model."""
    with as_file(files("fwdllm") / "assets" / "fwdllm-tiny.gguf") as path:
        return Path(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a model of an architecture and a type, once."""
    from llama_models import make_model

    return partial(make_model, tmp_path_factory.mktemp("models"))


@pytest.fixture
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than a short run."""
    monkeypatch.setattr(
        "fwdllm.tuning.run_directory.RunDirectory.plot", lambda self: self.path / "plot.png"
    )


@pytest.fixture
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of llama.cpp's threads wait for each other in a loop, long if others are at work."""
    monkeypatch.setenv("FWDLLM_NUM_THREADS", "1")


@pytest.fixture
def fwdllm(capfd: pytest.CaptureFixture[str]) -> Cli:
    """Runs the command in this process."""
    from cli_runs import make_cli

    return make_cli(capfd)
