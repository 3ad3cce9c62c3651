"""Where real test models and data lie, for tests that skip without them."""

from __future__ import annotations

from importlib.resources import as_file, files
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
