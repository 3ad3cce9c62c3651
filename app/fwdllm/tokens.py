"""The tokens of data as a model reads them, and which of them are learned: look before you tune."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

from rich.text import Text

from fwdllm.engine.data.jsonl import Example, labels_of, read_jsonl
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import DataError
from fwdllm.hub import local_path

# Of what is read and of what is learned, by turns, so that one sees where a token ends.
_STYLES = {False: ("", "dim"), True: ("bold green", "bold cyan")}


@dataclass(frozen=True)
class View:
    """A sequence that a line of data becomes.

    ids: its tokens.  texts: of each, special tokens by their names.  learned: whether the loss
    counts it.  label: what an encoder's head is to answer.
    """

    line: int
    ids: list[int]
    texts: list[str]
    learned: list[bool]
    label: str | None


def view_tokens(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    line: int | None = None,
    max_tokens: int | None = None,
    literal: bool = False,
) -> Iterator[View]:
    """The sequences of a JSONL file, or of one of its lines, in order.

    model: as ``inference.evaluate``.  max_tokens, literal: as settings of ``tune``.
    Errors: ModelError; DataError, also for a line without an example.
    """
    examples = read_jsonl(data)
    engine = Engine.load(local_path(model), labels=labels_of(examples), literal=literal)
    chosen = [example for example in examples if line in (None, example.line)]
    if not chosen:
        raise DataError(f"{data} has no example in line {line}")
    for example in chosen:
        for part in engine.separate([example]):
            yield _view(engine, part, max_tokens)


def _view(engine: Engine, example: Example, max_tokens: int | None) -> View:
    tokens = engine.tokenize(example, max_tokens)
    texts = [_text(engine.tokenizer, token) for token in tokens.ids]
    learned = [label and i > 0 for i, label in enumerate(tokens.labels)]  # nothing predicts a first
    label = example.label if tokens.label_class is not None else None
    return View(example.line, tokens.ids, texts, learned, label)


def _text(tokenizer: Tokenizer, token: int) -> str:
    piece = tokenizer.piece(token)
    return piece.decode("utf-8", "replace") if piece else tokenizer.decode([token], special=True)


def render(view: View) -> Text:
    """The sequence in colours, and for those who see none "reads" and "learns" in front."""
    head = f"line {view.line}: {len(view.ids)} tokens, {sum(view.learned)} learned"
    found = Text(head + (f", label {view.label}" if view.label is not None else ""), style="bold")
    at = 0
    for learned, run in groupby(zip(view.texts, view.learned, strict=True), lambda each: each[1]):
        found.append("\n  learns  " if learned else "\n  reads   ", style="reset")
        for text, _ in run:
            shown = text.replace("\n", "\u23ce\n          ")
            found.append(shown, style=_STYLES[learned][at % 2])
            at += 1
    found.rstrip()
    return found
