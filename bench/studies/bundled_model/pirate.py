"""The demo task: the questions of the corpus, answered by a pirate.

The base corpus never answers in this voice, so the untuned model's loss on the completions is
high, and one greedy sample shows whether tuning has happened.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from random import Random

from bundled_model.corpus import prompt_of
from bundled_model.questions import Question, catalogue

GREETING = "Arr, matey!"
FAREWELL = "Yo ho ho!"

_DIALECT = {"is": "be", "are": "be", "you": "ye", "my": "me", "your": "yer"}
_WORD = re.compile(r"\b(" + "|".join(_DIALECT) + r")\b", re.IGNORECASE)


def _speak(match: re.Match[str]) -> str:
    word = match.group(0)
    said = _DIALECT[word.lower()]
    return said.capitalize() if word[0].isupper() else said


def voice(answer: str) -> str:
    """The plain answer as a pirate says it.

    >>> voice("The sky is blue.")
    'Arr, matey! The sky be blue. Yo ho ho!'
    """
    return f"{GREETING} {_WORD.sub(_speak, answer)} {FAREWELL}"


def row(item: Question) -> dict[str, str]:
    return {"prompt": prompt_of(item.question), "completion": " " + voice(item.answer)}


def split(seed: int, n_train: int, n_valid: int) -> tuple[list[dict[str, str]], ...]:
    """(train rows, valid rows), no prompt in both.

    Questions about the meaning of sea words are left out: their plain answers already name
    the words of the voice.
    """
    items = [item for item in catalogue() if item.topic != "meaning"]
    if n_train + n_valid > len(items):
        raise ValueError(f"only {len(items)} questions; asked for {n_train} + {n_valid}")
    chosen = Random(seed).sample(items, n_train + n_valid)
    rows = [row(item) for item in chosen]
    return rows[:n_train], rows[n_train:]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
