"""Inputs of an attack: models, adapters, requests and templates that once took the process down."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def hostile(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the files of shared/cases/hostile."""
    archive = shared / "cases" / "hostile" / "files.tar.xz"
    if not archive.exists():
        pytest.skip("no shared/cases/hostile beside the repository")
    folder = tmp_path_factory.mktemp("hostile")
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    return folder
