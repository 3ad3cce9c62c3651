"""Whether what a model answers is right: exact match, as lm-evaluation-harness counts it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwdllm.engine.data.jsonl import Example, read_jsonl
from fwdllm.engine.errors import ConfigError, DataError
from fwdllm.inference import _Path, generate

# What GSM8K's answers end with; the harness's "strict-match".
GSM8K = r"#### (-?[0-9.,]+)"
ANSWER_TOKENS = 256


@dataclass(frozen=True)
class Answered:
    """expected, found: what the pattern takes of the example and of the text, None if nothing."""

    line: int
    text: str
    expected: str
    found: str | None

    @property
    def right(self) -> bool:
        return self.found is not None and _plain(self.found) == _plain(self.expected)


@dataclass(frozen=True)
class Answers:
    """exact_match: the share of examples that were answered right."""

    exact_match: float
    n_right: int
    n_examples: int


def evaluate_answers(
    model: _Path,
    data: _Path,
    *,
    adapter: _Path | None = None,
    pattern: str = GSM8K,
    max_tokens: int = ANSWER_TOKENS,
    on_answer: Callable[[Answered], None] = lambda answered: None,
) -> Answers:
    """Let a model answer every example, and compare what ``pattern`` first takes of it.

    model, adapter: as ``inference.evaluate``.  data: JSONL of prompts with completions, or of
    conversations, whose last turn is the answer.  pattern: a regular expression whose first group
    is what counts; commas, "$" and a period at the end do not.  max_tokens: of an answer; the
    likeliest token is taken each time.  on_answer: called with each.
    Errors: those of ``inference.evaluate``; ConfigError for a pattern that is none, DataError for
    an example that the pattern takes nothing of.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from error
    if wanted.groups < 1:
        raise ConfigError(f"the pattern {pattern!r} has no group (...) that is the answer")
    questions = []
    for example in read_jsonl(Path(data)):
        prompt, answer = _parts(example)
        expected = _first(wanted, answer)
        if expected is None:
            raise DataError(f"{example.where}: the pattern {pattern!r} is not in its answer")
        questions.append((example, prompt, expected))
    n_right = 0
    for example, prompt, expected in questions:
        pieces = generate(
            model, prompt, adapter=adapter, max_tokens=max_tokens, tools=example.tools
        )
        text = "".join(pieces)
        answered = Answered(example.line, text, expected, _first(wanted, text))
        n_right += answered.right
        on_answer(answered)
    return Answers(n_right / len(questions), n_right, len(questions))


def _parts(example: Example) -> tuple[str | list[dict[str, Any]], str]:
    """What is put to the model, and the answer."""
    if example.kind == "completion":
        assert example.prompt is not None and example.completion is not None
        return example.prompt, example.completion
    if example.kind == "messages" and example.messages:
        *before, last = example.messages
        learned = len(before) not in example.context
        if before and last["role"] == "assistant" and learned:
            return before, last["content"]
    raise DataError(f"{example.where}: there is no prompt with an answer")


def _first(pattern: re.Pattern[str], text: str) -> str | None:
    match = pattern.search(text)
    return match[1] if match else None


def _plain(answer: str) -> str:
    return answer.strip().replace(",", "").replace("$", "").removesuffix(".")
