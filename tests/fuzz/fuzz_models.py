"""Changed models and adapters through every command that opens them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import commands
import sources
from children import run
from commands import Work
from model_mutations import mutate
from target import OK, REFUSED, Row, Target


def make(folder: Path) -> None:
    """Import what commands need."""
    commands.warm()


def _write(random: Random, folder: Path, case: Path) -> str:
    source = sources.source(folder, random.choice(sources.names()))
    shutil.copytree(source, case, dirs_exist_ok=True, ignore=lambda *_: ["model.gguf", "peft"])
    kind, content = mutate(source / "model.gguf", random)
    (case / "model.gguf").write_bytes(content)
    return kind


def check(commands_of: Callable[[Path], dict[str, Work]], case: Path) -> list[Row]:
    """Run each command in a child of its own."""
    rows = []
    memory = commands.MEMORY + (case / "model.gguf").stat().st_size
    for what, work in commands_of(case).items():
        (case / "out").mkdir()
        log = case / f"{what}.log"
        ended = run(work, log, commands.SECONDS, memory)
        result = ended.fault or (REFUSED if ended.code == 2 else OK)
        rows.append(Row(what, result, ended.seconds, ended.peak, ended.output))
        shutil.rmtree(case / "out")
        log.unlink()
    return rows


def _check_model(_: Any, case: Path) -> list[Row]:
    return check(commands.of_model, case)


MODELS = Target(make, _write, _check_model, seconds=60, chunk=10)
