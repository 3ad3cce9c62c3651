"""What a model learns of a conversation: each of the assistant's turns, as it would be prompted.

What comes before a turn is what the chat template makes of the messages until then, with the
opening of the assistant's turn: the prompt that a server gives the model. Where a template renders
earlier turns differently once later ones follow (it takes their thoughts out, say), turns are
sequences of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fwdllm.engine.data.chat import ChatTemplate
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.data.messages import MESSAGE_FIELDS
from fwdllm.engine.errors import DataError, ModelError

# Contents that a message is rendered with besides its own, to find where a template has put it.
_MARKS = ("\x02", "\x03")
_NOT_BY_CHANCE = 12
# Fields of a result, which say which call it is of: its place does so, too.
_OF_RESULTS = ("name", "tool_call_id")


@dataclass(frozen=True)
class Turn:
    """An assistant's message i: the text before it, and what the model is to answer there."""

    i: int
    before: str
    answer: str


def separate(template: ChatTemplate, example: Example) -> list[Example]:
    """The conversation as examples of which each is one sequence.

    Most are one already. Errors: DataError.
    """
    if example.messages is None or len(_learned(example)) < 2:
        return [example]
    groups: list[list[int]] = []
    done = None
    for turn in turns(template, example, alone=True):
        if done is None or not turn.before.startswith(done):
            groups.append([])
        groups[-1].append(turn.i)
        done = turn.before + turn.answer
    if len(groups) == 1:
        return [example]
    every = {i for i, m in enumerate(example.messages) if m["role"] == "assistant"}
    return [
        dataclasses.replace(
            example,
            messages=example.messages[: group[-1] + 1],
            context=frozenset(i for i in every if i <= group[-1] and i not in group),
        )
        for group in groups
    ]


def turns(template: ChatTemplate, example: Example, alone: bool = False) -> list[Turn]:
    """The turns to learn of, in order.

    Errors: DataError, also if they are not one sequence, unless ``alone``.
    """
    assert example.messages is not None
    found: list[Turn] = []
    done = ""
    try:
        for i in _learned(example):
            turn = _turn(template, example, i)
            if not alone and not turn.before.startswith(done):
                raise DataError(
                    f"{example.where}: the chat template renders earlier turns differently once "
                    "later ones follow, so they are sequences of their own"
                )
            found.append(turn)
            done = turn.before + turn.answer
        _check_shown(template, example, [turn.i for turn in found])
    except ModelError as error:
        raise DataError(f"{example.where}: {error}") from error
    return found


def _learned(example: Example) -> list[int]:
    assert example.messages is not None
    return [
        i
        for i, message in enumerate(example.messages)
        if message["role"] == "assistant" and i not in example.context
    ]


def _turn(template: ChatTemplate, example: Example, i: int) -> Turn:
    assert example.messages is not None
    messages, tools = example.messages[: i + 1], example.tools
    whole = template.render(messages, False, tools)
    before = template.render(messages[:-1], True, tools) if i else None
    if before is not None and whole.startswith(before):
        return Turn(i, before, whole[len(before) :])
    # The prompt opens more than the template writes of a turn that is over, thoughts for example;
    # or it is the first message, which has no prompt.
    content = messages[-1]["content"]
    with_marks = [
        template.render([*messages[:-1], {**messages[-1], "content": mark}], False, tools)
        for mark in _MARKS
    ]
    head = _common([whole, *with_marks])
    rest = whole[len(head) :]
    if before is None:
        return Turn(i, head, rest)
    if not before.startswith(head):
        raise DataError(
            f"{example.where}: the chat template prompts for message {i + 1} with another text "
            "than it renders; give single turns as prompt and completion"
        )
    if content.strip() in rest:
        return Turn(i, before, rest)
    # It leaves out a part of what was answered, the thoughts: they are learned, too.
    tail = _common([text[len(head) :][::-1] for text in (whole, *with_marks)])[::-1]
    return Turn(i, before, content + tail)


def _common(texts: Sequence[str]) -> str:
    """The beginning that texts have in common."""
    n = 0
    for letters in zip(*texts, strict=False):
        if len(set(letters)) > 1:
            break
        n += 1
    return texts[0][:n]


def _check_shown(template: ChatTemplate, example: Example, learned: Sequence[int]) -> None:
    """DataError for what the template leaves out: the model would not see or learn it."""
    assert example.messages is not None
    end = learned[-1] + 1
    messages, tools = example.messages[:end], example.tools
    whole = template.render(messages, False, tools)
    if tools and whole == template.render(messages, False):
        raise _not_shown(example, "tools")
    for i, message in enumerate(messages):
        if i not in learned and message["role"] != "assistant":
            content = message["content"].strip()
            # A longer one is not there by chance, and rendering takes time.
            shown = len(content) >= _NOT_BY_CHANCE and content in whole
            if not shown and whole == _changed(template, example, i, {"content": _MARKS[0]}, end):
                raise _not_shown(example, f"message {i + 1}, of the role {message['role']}")
        for name in MESSAGE_FIELDS:
            if name not in message or (message["role"] == "tool" and name in _OF_RESULTS):
                continue
            # Thoughts of earlier turns are left out on purpose; those to learn are not.
            until = i + 1 if i in learned else end
            if name.startswith(("reason", "think")) and i not in learned:
                continue
            own = template.render(messages[:until], False, tools)
            if own == _changed(template, example, i, {name: None}, until):
                raise _not_shown(example, f"{name} of message {i + 1}")


def _changed(
    template: ChatTemplate, example: Example, i: int, fields: dict[str, Any], end: int
) -> str:
    """The conversation with fields of message i changed."""
    assert example.messages is not None
    messages = list(example.messages[:end])
    messages[i] = {**messages[i], **fields}
    return template.render(messages, False, example.tools)


def _not_shown(example: Example, what: str) -> DataError:
    return DataError(
        f"{example.where}: the model's chat template leaves out {what}; take it out, or write the "
        "text that the model is to see as prompt and completion"
    )
