"""Training and evaluation data: JSONL files, their labels, and held-out splits.

Each line is an object of one of four kinds, and a file holds one kind:

    {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", ...}], "tools": [...]}
    {"prompt": "...", "completion": "..."}
    {"text": "..."}
    {"text": "...", "label": "..."}

Messages and tools are OpenAI's, with calls, results, and ``weight``: 0 for an assistant's turn that
is context only. A prompt beside messages that begin with it says nothing new. Fields that would
change what is learned and have no place here (the pairs of preference data, documents, images) are
errors; others are ignored. Blank lines are skipped.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from fwdllm.engine.data.messages import (
    is_list,
    kind_of,
    nonempty,
    parse_messages,
    parse_prompt_and_completion,
    parse_tools,
    refuse,
    short,
    string,
)
from fwdllm.engine.errors import ConfigError, DataError

Kind = Literal["messages", "completion", "text", "label"]

# Fields of a line that change what a model reads or learns.
_LINE_FIELDS = ("functions", "documents", "images", "videos", "chosen", "rejected")
# Kinds of data of other tools, by a field that they have, with what converts a file of them.
_OTHER_KINDS = {
    "conversations": (
        "ShareGPT's",
        'jq -c \'{messages: [.conversations[] | {role: ({human: "user", gpt: "assistant"}[.from] '
        "// .from), content: .value}]}'",
    ),
    "instruction": (
        "Alpaca's",
        'jq -c \'{prompt: ([.instruction, (.input // "" | select(. != ""))] | join("\\n") '
        '+ "\\n"), completion: .output}\'',
    ),
}

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Example:
    """One example; the fields of its kind are set and the others are None.

    messages: chat turns, each {"role": str, "content": str, ...}; the loss is on the assistant's.
    tools: what the assistant may call, as OpenAI describes them.
    prompt, completion: the loss is on the completion.
    text: the loss is on all of it, or with ``label`` it is to be classified.
    context: numbers from 0 of the assistant's messages that the loss leaves out.
    line, path: where it was read, for error messages; path is "" for examples made in code.
    """

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    prompt: str | None = None
    completion: str | None = None
    text: str | None = None
    label: str | None = None
    context: frozenset[int] = frozenset()
    line: int = 0
    path: str = ""

    @property
    def kind(self) -> Kind:
        """Which fields are set."""
        if self.messages is not None:
            return "messages"
        if self.completion is not None:
            return "completion"
        return "text" if self.label is None else "label"

    @property
    def where(self) -> str:
        """The example's place as "file:line"."""
        return f"{self.path}:{self.line}" if self.path else f"line {self.line}"


def read_jsonl(path: str | os.PathLike[str]) -> list[Example]:
    """The examples of a JSONL file, at least one, all of one kind.

    A label may be a string or an integer, which is turned into a string.
    Raises DataError, naming file and line, for anything else than the module describes.
    """
    return parse_jsonl(_lines(Path(path)), str(path))


@dataclass(frozen=True)
class Data:
    """The examples of a file, and its SHA-256 as hexadecimal digits."""

    examples: list[Example]
    digest: str


def read_data(data: Data | str | os.PathLike[str]) -> Data:
    """As ``read_jsonl``, in one reading, as of a pipe; ``Data`` is returned as it is."""
    if isinstance(data, Data):
        return data
    digest = hashlib.sha256()

    def lines() -> Iterator[bytes]:
        for line in _lines(Path(data)):
            digest.update(line)
            yield line

    return Data(parse_jsonl(lines(), str(data)), digest.hexdigest())


def parse_jsonl(lines: Iterable[bytes], name: str) -> list[Example]:
    """As ``read_jsonl``, for lines in memory. name: the file's name in error messages."""
    examples: list[Example] = []
    for line, raw in _numbered(lines):
        example = _parse(raw, line, name)
        if examples and example.kind != examples[0].kind:
            raise DataError(
                f"{example.where}: this is {_describe(example)}, but line {examples[0].line} is "
                f"{_describe(examples[0])}; a file holds one kind"
            )
        examples.append(example)
    if not examples:
        raise DataError(f"{name} has no examples; write one JSON object per line")
    return examples


def labels_of(examples: Sequence[Example]) -> tuple[str, ...]:
    """The distinct labels in sorted order; () if the examples have none."""
    return tuple(sorted({example.label for example in examples if example.label is not None}))


def check_labels(examples: Sequence[Example], labels: Sequence[str]) -> None:
    """Raise DataError, naming the line, for an example without one of ``labels``."""
    known = set(labels)
    for example in examples:
        if example.label is None:
            raise DataError(f"{example.where}: it has no label")
        if example.label not in known:
            raise DataError(
                f"{example.where}: the label {short(example.label)} is not one of "
                f"{', '.join(labels)}"
            )


def split(
    examples: Sequence[Example], held_out: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Split into (train, held out) at random, each in the order of ``examples``.

    held_out: an int is a number of examples, a float a fraction between 0 and 1, rounded and
    at least one example. The same arguments give the same split on every machine.
    Raises ConfigError for a ``held_out`` or ``seed`` that makes no sense, and DataError if
    there are too few examples to leave one on either side.
    """
    n_held_out = _held_out_count(len(examples), held_out)
    if seed < 0:
        raise ConfigError(f"the seed is {seed}; it must not be negative")
    # NumPy keeps the raw stream the same from release to release; permutation() may change.
    keys = np.random.PCG64(seed).random_raw(len(examples))
    chosen = set(np.argsort(keys, kind="stable")[:n_held_out].tolist())
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [examples[i] for i in sorted(chosen)]


def hold_out(
    examples: Sequence[Example], seed: int, most: int
) -> tuple[list[Example], list[Example]]:
    """As ``split``, with a tenth held out, but at least 1 example and at most ``most``."""
    return split(examples, min(max(1, round(0.1 * len(examples))), most), seed)


def _held_out_count(n_examples: int, held_out: float) -> int:
    is_count = isinstance(held_out, int)
    if not (held_out >= 1 if is_count else 0 < held_out < 1):
        raise ConfigError(
            f"cannot hold out {held_out}: give a fraction between 0 and 1, or a whole number"
        )
    count = int(held_out) if is_count else max(1, round(held_out * n_examples))
    if count >= n_examples:
        raise DataError(f"cannot hold out {count} of {n_examples} examples: none is left to train")
    return count


def _numbered(lines: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers in the file from 1."""
    for number, raw in enumerate(lines, 1):
        line = raw.removeprefix(BYTE_ORDER_MARK) if number == 1 else raw
        if line.strip():
            yield number, line


def _lines(path: Path) -> Iterator[bytes]:
    try:
        # Bytes, because text mode and splitlines() also break at characters JSON may hold.
        with open(path, "rb") as file:
            yield from file
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None
    except IsADirectoryError:
        raise DataError(f"{path} is a folder; name the JSONL file in it") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL in the path
        raise DataError(f"cannot read {str(path)!r}: {error}") from error


def _parse(raw: bytes, line: int, path: str) -> Example:
    where = f"{path}:{line}"
    fields = _object(raw, where)
    kinds = [
        fields.keys() & {"messages"},
        fields.keys() & {"prompt", "completion"},
        fields.keys() & {"text", "label"},
    ]
    refuse(fields, _LINE_FIELDS, where)
    if is_list(fields.get("prompt")) and is_list(fields.get("completion")):
        messages, context = parse_prompt_and_completion(fields, where)
        tools = parse_tools(fields, where)
        return Example(messages=messages, tools=tools, context=context, line=line, path=path)
    if kinds[0] and "completion" not in fields and _begins(fields["messages"], fields):
        kinds[1] = set()  # the prompt says nothing that the messages do not
    present = [kind for kind in kinds if kind]
    if not present:
        for name, (whose, command) in _OTHER_KINDS.items():
            if name in fields:
                raise DataError(
                    f"{where}: the field {name} is {whose} format; this converts a file of it: "
                    f"{command} FILE > data.jsonl"
                )
        raise DataError(f"{where}: it has none of the fields messages, completion and text")
    if len(present) > 1:
        names = ", ".join(sorted(set().union(*present)))
        raise DataError(f"{where}: the fields {names} do not belong together")
    if kinds[0]:
        messages, context = parse_messages(fields["messages"], where)
        tools = parse_tools(fields, where)
        return Example(messages=messages, tools=tools, context=context, line=line, path=path)
    if kinds[1]:
        prompt = string(fields, "prompt", where)
        completion = nonempty(fields, "completion", where)
        return Example(prompt=prompt, completion=completion, line=line, path=path)
    label = _label(fields["label"], where) if "label" in fields else None
    return Example(text=nonempty(fields, "text", where), label=label, line=line, path=path)


def _begins(messages: object, fields: dict[str, object]) -> bool:
    """Whether the user's first message is the line's prompt, as in UltraChat and No Robots."""
    if not is_list(messages) or "prompt" not in fields:
        return False
    users = [m for m in messages if isinstance(m, dict) and m.get("role") == "user"]
    return bool(users) and users[0].get("content") == fields["prompt"]


def _object(raw: bytes, where: str) -> dict[str, object]:
    try:
        value = json.loads(raw.decode())
    except UnicodeDecodeError:
        raise DataError(f"{where}: it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: it is not JSON: {error.msg} at column {error.colno}") from None
    except ValueError:
        raise DataError(f"{where}: it has a number with too many digits") from None
    except RecursionError:
        raise DataError(f"{where}: its brackets are nested too deeply") from None
    if not isinstance(value, dict):
        raise DataError(f"{where}: it is {kind_of(value)}, not an object")
    return value


def _label(value: object, where: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, float):
        raise DataError(f"{where}: label is {value}, not a string or an integer")
    return nonempty({"label": value}, "label", where)


def _describe(example: Example) -> str:
    return {
        "messages": "a conversation",
        "completion": "a prompt with a completion",
        "text": "a text without a label",
        "label": "a text with a label",
    }[example.kind]
