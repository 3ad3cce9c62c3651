"""hf:// names, with a stub in place of huggingface_hub."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from cli_runs import MODEL, make_cli

from fwdllm.engine.errors import ConfigError, ModelError
from fwdllm.hub import local_path


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """What was asked of the Hub, which has one model."""
    asked: list[tuple[str, str]] = []

    def hf_hub_download(repo_id: str, filename: str) -> str:
        asked.append((repo_id, filename))
        if filename.endswith("none.gguf"):
            raise RuntimeError("404 Client Error.\n\nEntry Not Found for url: https://...")
        return str(MODEL)

    stub = ModuleType("huggingface_hub")
    stub.hf_hub_download = hf_hub_download  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", stub)
    return asked


def test_paths_are_left_alone(downloads: list[tuple[str, str]]) -> None:
    assert local_path("a/b.gguf") == Path("a/b.gguf")
    assert local_path(Path("hf/b.gguf")) == Path("hf/b.gguf")
    assert downloads == []


def test_a_name_is_downloaded(downloads: list[tuple[str, str]]) -> None:
    assert local_path("hf://owner/repo/model.Q4_0.gguf") == MODEL
    assert local_path("hf://owner/repo/folder/model.gguf") == MODEL
    assert downloads == [("owner/repo", "model.Q4_0.gguf"), ("owner/repo", "folder/model.gguf")]


def test_commands_take_names(
    downloads: list[tuple[str, str]], capfd: pytest.CaptureFixture[str]
) -> None:
    outcome = make_cli(capfd)("inspect", "hf://owner/repo/model.gguf", "--json")
    assert (outcome.code, outcome.json["name"]) == (0, "fwdllm-tiny")
    failed = make_cli(capfd)("inspect", "hf://owner/repo/none.gguf")
    assert (failed.code, failed.out) == (2, "")
    assert failed.err == ("fwdllm: cannot download hf://owner/repo/none.gguf: 404 Client Error.\n")


def test_a_failed_download_is_a_model_error(downloads: list[tuple[str, str]]) -> None:
    with pytest.raises(ModelError, match="404"):
        local_path("hf://owner/repo/none.gguf")


@pytest.mark.parametrize(
    "name", ["hf://", "hf://owner/repo", "hf://owner//a.gguf", "hf://owner/repo/a.bin"]
)
def test_a_name_must_name_a_file(name: str, downloads: list[tuple[str, str]]) -> None:
    with pytest.raises(ConfigError, match=r"write hf://owner/repo/file\.gguf"):
        local_path(name)
    assert downloads == []


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ConfigError, match=r"install it with: pip install 'fwdllm\[hub\]'"):
        local_path("hf://owner/repo/model.gguf")


def test_with_the_first_file_of_a_split_model_come_the_others(
    downloads: list[tuple[str, str]],
) -> None:
    local_path("hf://owner/repo/Q4_0/m-00001-of-00003.gguf")
    assert [file for _, file in downloads] == [f"Q4_0/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
