"""Odd but honest model files, made from the shared ones by the script of shared/cases."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture(scope="session")
def make_models(shared: Path) -> ModuleType:
    """The script."""
    script = shared / "cases" / "make_models.py"
    if not script.exists():
        pytest.skip("no shared/cases beside the repository")
    spec = importlib.util.spec_from_file_location(script.stem, script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def models(make_models: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all its files."""
    folder = tmp_path_factory.mktemp("cases")
    make_models.main(folder)
    return folder
