"""Texts of files, names and models as a terminal gets them: neither markup nor controls."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from changed_models import changed
from cli_runs import MODEL, Cli, write_rows
from rich.table import Table
from rich.text import Text

from fwdllm.cli.console import Terminal, say, visible

# A closing tag of nothing, colours, a title, a picture, one that only UTF-8 writes, another order.
HOSTILE = "[/nope] [red]a[/red] \x1b[31mb \x1b]0;c\x07 :smile: \x9b2Jd \u202ee \x7f"
SHOWN = r"[/nope] [red]a[/red] \x1b[31mb \x1b]0;c\x07 :smile: \x9b2Jd \u202ee \x7f"


def test_controls_are_written_out() -> None:
    assert visible(HOSTILE) == SHOWN
    assert visible("a\rb\0c\ud800d") == r"a\rb\x00c\ud800d"
    harmless = "line\nnext\ttab ä 日本 \U0001f600 \u200d"
    assert visible(harmless) == harmless


def test_say_and_tables_write_them_out(capfd: pytest.CaptureFixture[str]) -> None:
    say(HOSTILE)
    table = Table(HOSTILE)
    table.add_row(HOSTILE)
    Terminal(width=500).print(table, Text(HOSTILE, style="bold"), HOSTILE, sep="\n")
    out = capfd.readouterr().out
    # Of ``Text``, rich itself leaves the bell out.
    assert (out.count(SHOWN), out.count(SHOWN.replace(r"\x07", ""))) == (4, 1)
    assert not set(out) & set("\x1b\x07\x9b\x7f\u202e")


def test_inspect_of_a_model_with_a_hostile_name(fwdllm: Cli, tmp_path: Path) -> None:
    path = changed(tmp_path / "m.gguf", MODEL, {"general.name": HOSTILE})
    shown = fwdllm("inspect", path)
    assert shown.code == 0
    assert "[/nope] [red]a[/red] \\x1b[31mb" in shown.out
    assert not set(shown.out) & set("\x1b\x07\x9b\x7f\u202e")
    exact = fwdllm("inspect", path, "--json")
    assert json.loads(exact.out)["name"] == HOSTILE
    assert not set(exact.out) & set("\x1b\x07\x9b\x7f\u202e")


def test_the_model_of_an_attack(fwdllm: Cli, hostile: Path) -> None:
    shown = fwdllm("inspect", hostile / "name-markup.gguf")
    assert (shown.code, shown.err) == (0, "")
    assert "[/nope]" in shown.out


def test_errors_and_results_show_the_names_of_files(
    fwdllm: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # long paths are cut
    name = HOSTILE.replace("/", "")
    missing = fwdllm("eval", tmp_path / name, tmp_path / "no.jsonl")
    assert missing.code == 2
    assert visible(name) in missing.err
    unwritable = os.fsdecode(b"\xff.gguf")  # no UTF-8
    (tmp_path / unwritable).write_bytes(MODEL.read_bytes())
    shown = fwdllm("inspect", unwritable)
    assert shown.code == 0
    assert r"\udcff.gguf" in shown.out
    assert fwdllm("inspect", unwritable, "--json").json["file"].endswith("\udcff.gguf")


def test_tokens_and_labels_of_data(fwdllm: Cli, tmp_path: Path) -> None:
    rows = [{"text": HOSTILE, "label": "[/nope]\x1b"}, {"text": "a", "label": "b"}]
    shown = fwdllm("tokens", MODEL, write_rows(tmp_path / "d.jsonl", rows))
    assert shown.code == 0
    assert "[/" in shown.out
    assert not set(shown.out) & set("\x1b\x07\x9b\x7f\u202e")
