"""The command ``classify``."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fwdllm.cli.console import Backend, Device, Model, print_json, say

if TYPE_CHECKING:
    from fwdllm.engine.classification import Classification
    from fwdllm.engine.data.jsonl import Example


def classify(
    model: Model,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="[TEXT]...", help="Texts to classify.")
    ] = None,
    adapter: Annotated[
        Path | None, typer.Option("--adapter", help="GGUF LoRA file or PEFT folder.")
    ] = None,
    file: Annotated[
        list[str] | None,
        typer.Option(
            "--file",
            "-f",
            help='Classify its lines: plain texts, or JSON objects with a "text"; - is standard '
            "input; repeatable.",
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            "--label", help="One that a decoder chooses from, as its data had it; repeatable."
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", help="Cut texts to this many tokens.", show_default="all"),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="fp32 arithmetic: slower, without rounding.")
    ] = False,
    device: Device = "cpu",
    backend: Backend = "auto",
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object for each text and nothing else.")
    ] = False,
) -> None:
    """Print the likeliest label of each text and its probability.

    A blank line of a file gives a blank line, so that results stay beside their texts.
    """
    from fwdllm.engine.engine import Engine
    from fwdllm.hub import local_path

    if bool(texts) == bool(file):
        raise typer.BadParameter("give texts to classify, or --file with a file of them")
    engine = Engine.load(
        local_path(model), adapter=adapter, exact=exact, device=device, backend=backend
    )
    if not file:
        for number, found in enumerate(
            engine.classify(_arguments(texts or []), label or (), max_tokens), 1
        ):
            _print(found, json, None, number)
        return
    waiting: deque[Example] = deque()  # read, and not printed
    for found in engine.classify(_noted(_lines(file), waiting), label or (), max_tokens):
        _print_blanks(waiting, json)
        example = waiting.popleft()
        _print(found, json, example.path, example.line)
    _print_blanks(waiting, json)


def _arguments(texts: list[str]) -> Iterator[Example]:
    from fwdllm.engine.data.jsonl import Example
    from fwdllm.engine.errors import ConfigError

    for number, text in enumerate(texts, 1):
        if text == "-" or os.path.isfile(text):
            what = "standard input" if text == "-" else f"the file {text}"
            raise ConfigError(f"to classify the lines of {what}, say --file {text}")
        yield Example(text=text, line=number, path="text")


def _lines(files: list[str]) -> Iterator[Example]:
    from fwdllm.engine.data.lines import read_texts

    for file in files:
        yield from read_texts(file)


def _noted(examples: Iterable[Example], waiting: deque[Example]) -> Iterator[Example]:
    """Those that are not blank; all are put into ``waiting``."""
    for example in examples:
        waiting.append(example)
        if example.text:
            yield example


def _print_blanks(waiting: deque[Example], json: bool) -> None:
    while waiting and not waiting[0].text:
        waiting.popleft()
        if not json:
            say()


def _print(found: Classification, json: bool, file: str | None, line: int) -> None:
    if json:
        probabilities = dict(zip(found.labels, found.probabilities, strict=True))
        best = {"label": found.label, "probability": found.probability}
        print_json({"file": file, "line": line, **best, "probabilities": probabilities})
        return
    # A label with a tab or a line end in it would look like two.
    label = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in found.label)
    say(f"{label}\t{found.probability:.4f}")
