"""What the documents name is there: files, tests, and names that are said to be in a file."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest
from places import ROOT

PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "SECURITY.md",
    *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
]
# Pages that say where things are: what stands beside a file in one sentence or row is in that file.
GUIDES = ["CONTRIBUTING.md", "docs/architecture.md"]

FOLDERS = ("app", "bench", "docs", "engine", "examples", "kernels", "protocol", "tests", ".ci")
QUOTED = re.compile(r"`([^`\n]+)`")
NAME = re.compile(r"[A-Za-z_]\w*(\.\w+)*")
# Paragraphs, points of a list and rows of a table.
BLOCK = re.compile(r"\n\n|\n(?=- |\d\. |\| )")


# "| what | 64 MiB | `NAME` in `a/file.py` |": a limit, and the constant that it is.
LIMIT = re.compile(r"^\| .* \| ([\d,.]+) ?(KiB|MiB|GiB|s|) \| `(\w+)` in `([\w/]+)\.py` \|$", re.M)
UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "s": 1, "": 1}


def quoted_paths(text: str) -> Iterator[str]:
    """What is quoted and begins with a folder of the repository, also within a command."""
    for word in " ".join(QUOTED.findall(text)).split():
        if "/" in word and word.split("/")[0] in FOLDERS:
            yield word


def missing_paths(text: str) -> list[str]:
    """Paths that are not there, and tests that are not in their file."""
    return [word for word in quoted_paths(text) if not _is_there(*word.split("::"))]


def _is_there(path: str, test: str = "") -> bool:
    found = list(ROOT.glob(path)) if "*" in path else [ROOT / path]
    if not all(f.exists() for f in found):
        return False
    return not test or f"def {test}(" in found[0].read_text(encoding="utf-8")


def missing_names(text: str) -> list[str]:
    """Names that are in none of the files that are named in the same block."""
    found = []
    for block in BLOCK.split(text):
        files = [f for word in quoted_paths(block) for f in files_of(ROOT / word.split("::")[0])]
        sources = "\n".join(file.read_text(encoding="utf-8") for file in files)
        for quoted in QUOTED.findall(block) if files else []:
            if NAME.fullmatch(quoted) and not all(
                re.search(rf"\b{part}\b", sources) for part in quoted.split(".")
            ):
                found.append(quoted)
    return found


def files_of(path: Path) -> list[Path]:
    """A file, or the sources in a folder."""
    return [path] if path.is_file() else sorted(path.glob("*.py"))


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    assert missing_paths((ROOT / page).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("page", GUIDES)
def test_names_are_in_the_files_beside_them(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert len(list(quoted_paths(text))) > 40
    assert missing_names(text) == []


def test_what_is_missing_is_seen() -> None:
    text = "see `engine/nothing.py`, `python bench/gone.py X` and `tests/test_docs.py::test_gone`"
    assert len(missing_paths(text)) == 3
    text = "`no_such_name` alone\n\n`GUIDES` and `nowhere` in `engine/errors.py`\n- `ModelError`"
    assert missing_names(text) == ["GUIDES", "nowhere"]


def test_limits_are_those_of_the_code() -> None:
    text = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    found = LIMIT.findall(text)
    assert len(found) == text.partition("## Limits")[2].count("` in `") > 0
    for value, unit, name, path in found:
        module = (
            path.replace("app/fwdllm", "fwdllm") if path.startswith("app") else f"fwdllm/{path}"
        )
        constant = getattr(import_module(module.replace("/", ".")), name)
        assert float(value.replace(",", "")) * UNITS[unit] == constant, name
