"""The source distribution: all that a build reads, and nothing else that lies in the folder."""

from __future__ import annotations

import re
import shutil
import tarfile
from pathlib import Path

import pytest
from places import ROOT
from test_layers import modules

build = pytest.importorskip("scikit_build_core.build", reason="needs scikit-build-core")

MEGABYTE = 10**6
PACKAGES = ("app", "bench", "engine", "kernels", "protocol")
# What people have in a checkout besides, and files of the repository that no build reads.
STRAY = (
    "model.gguf", "notes/plan.txt", "adapter.run/state.npz", "build/a.o", ".venv/bin/python",
    "app/fwdllm/__pycache__/a.pyc", "kernels/cpu/_native.so", "docs/page.md", "tests/test_a.py",
    ".ci/run", "bench/studies/own.py", "bench/suites/own.py",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is in a distribution made from a checkout with strays in it, by path."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder)
    for name in STRAY:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stray")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        name = build.build_sdist(str(folder / "dist"))
    archive = folder / "dist" / name
    assert archive.stat().st_size < 5 * MEGABYTE
    found = {}
    with tarfile.open(archive) as tar:
        for member in tar:
            inside = tar.extractfile(member)
            assert inside is not None
            found[member.name.partition("/")[2]] = inside.read()
    return found


def test_it_has_what_the_build_reads(files: dict[str, bytes]) -> None:
    assert {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "PKG-INFO"} <= files.keys()
    named = set(re.findall(r"kernels/[\w/]+\.cpp", files["CMakeLists.txt"].decode()))
    assert len(named) > 3
    assert named <= files.keys()
    headers = set()
    for name, text in files.items():
        if name.startswith("kernels/cpu/"):
            headers |= set(re.findall(r'#include "([\w.]+)"', text.decode()))
    assert len(headers) > 20
    assert {f"kernels/cpu/{name}" for name in headers} <= files.keys()


def test_it_has_every_module_and_all_they_read(files: dict[str, bytes]) -> None:
    sources = {text.decode() for name, text in files.items() if name.endswith(".py")}
    wanted = {name: text for name, text in modules().items() if ".suites." not in name}
    assert [name for name, text in wanted.items() if text not in sources] == []
    assets = [path for path in (ROOT / "app/fwdllm/assets").rglob("*") if path.is_file()]
    assert {path.relative_to(ROOT).as_posix() for path in assets} <= files.keys()


def test_it_has_nothing_stray(files: dict[str, bytes]) -> None:
    assert set(STRAY) & files.keys() == set()
    roots = {"pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE", "PKG-INFO", *PACKAGES}
    assert {name.partition("/")[0] for name in files} <= roots
    large = [name for name, text in files.items() if len(text) > MEGABYTE]
    assert large == ["app/fwdllm/assets/fwdllm-tiny.gguf"]
    kinds = {Path(name).suffix for name in files if "/" in name} - {".html", ".css", ".js", ".svg"}
    assert kinds == {".py", ".cpp", ".h", ".gguf", ".jsonl", ".typed"}
