"""Calls of tools: what makes a model call one, and how its calls are read from its text."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from typing import Any

from fwdllm.http.json_grammar import Grammar, SchemaError
from fwdllm.http.pattern_grammar import literal

Delta = dict[str, Any]

# How a call begins in the formats of most models: Hermes' and Qwen's tag, or JSON and nothing else
# (Llama 3, and Mistral, whose tag before it is a special token and so no text).
_TAG, _END = "<tool_call>", "</tool_call>"
_OPENING = re.compile(r'\{"name": "([^"]*)", "arguments":')


def opening_of(tool: Any) -> str:
    """The text of a call of a tool, up to its arguments."""
    return f'{{"name": {json.dumps(tool.function.name)}, "arguments":'


def grammar_of(tools: Sequence[Any]) -> str:
    """The grammar of a call of one of these tools; of a single one, what follows ``opening_of``.

    Errors: SchemaError, its path in ``tools``.
    """
    grammar = Grammar()
    calls = []
    for i, tool in enumerate(tools):
        try:
            arguments = grammar.schema(tool.function.parameters or {"type": "object"})
        except SchemaError as error:
            raise SchemaError(str(error), f"{i}.function.parameters") from error
        opening = "" if len(tools) == 1 else literal(opening_of(tool))
        calls.append(f'{opening} ws {arguments} "}}"')
    grammar.rule(" | ".join(calls), "root")
    return grammar.text()


class TextReader:
    """Text, none of which is a call."""

    def feed(self, text: str) -> list[Delta]:
        """What a further piece of the model's text adds to the answer."""
        return [{"content": text}] if text else []

    def end(self, reason: str) -> tuple[list[Delta], str]:
        """What is still to be added at the end, and why the answer has ended."""
        return [], reason


class CallReader:
    """The text of ``grammar_of``, which is one call; see ``TextReader``. before: precedes it."""

    def __init__(self, before: str) -> None:
        self._text, self._sent, self._began = before, 0, False

    def feed(self, text: str) -> list[Delta]:
        """The name comes with the first piece of arguments; the last brace is the call's own."""
        self._text += text
        opening = _OPENING.match(self._text)
        if opening is None:
            return []
        found = []
        if not self._sent:
            found.append(_call(0, opening[1], ""))
            self._sent = opening.end()
        return found + self._until(len(self._text.rstrip(" }")))

    def end(self, reason: str) -> tuple[list[Delta], str]:
        try:
            json.loads(self._text)
        except ValueError:  # cut off
            return self._until(len(self._text)), reason
        return self._until(len(self._text) - 1), "tool_calls"

    def _until(self, end: int) -> list[Delta]:
        if not self._sent or end <= self._sent:
            return []
        piece, self._sent = self._text[self._sent : end], end
        if not self._began:
            piece = piece.lstrip()
            self._began = bool(piece)
        if not piece:
            return []
        return [{"tool_calls": [{"index": 0, "function": {"arguments": piece}}]}]


class FreeReader:
    """The text of a model that may call tools, or answer; see ``TextReader``.

    names: of the tools.  most: calls to give; None for all. What might become a call is held back
    until it is one, or the text has ended.
    """

    def __init__(self, names: Sequence[str], most: int | None) -> None:
        self._names, self._most = set(names), most
        self._held = ""
        self._said = False

    def feed(self, text: str) -> list[Delta]:
        self._held += text
        start = self._start()
        piece, self._held = self._held[:start], self._held[start:]
        if not piece:
            return []
        self._said = True
        return [{"content": piece}]

    def end(self, reason: str) -> tuple[list[Delta], str]:
        calls = self._calls() if self._held else []
        if not calls:
            return TextReader().feed(self._held), reason
        calls = calls[: self._most]
        return [
            _call(i, name, arguments) for i, (name, arguments) in enumerate(calls)
        ], "tool_calls"

    def _start(self) -> int:
        """Where what might be a call starts in the held text."""
        if not self._said and self._held.lstrip()[:1] in ("", "{", "["):
            return 0
        found = self._held.find(_TAG)
        if found >= 0:
            return found
        half = next(n for n in range(len(_TAG), -1, -1) if self._held.endswith(_TAG[:n]))
        return len(self._held) - half

    def _calls(self) -> list[tuple[str, str]]:
        held = self._held.strip()
        texts = [held]
        if held.startswith(_TAG):
            texts = [part.split(_END)[0] for part in held.split(_TAG)[1:]]
        try:
            values = [json.loads(text) for text in texts]
        except (ValueError, RecursionError):
            return []
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        found = []
        for value in values:
            if not isinstance(value, dict) or value.get("name") not in self._names:
                return []
            arguments = value.get("arguments", value.get("parameters"))
            if not isinstance(arguments, dict):
                return []
            found.append((str(value["name"]), json.dumps(arguments, ensure_ascii=False)))
        return found


def _call(index: int, name: str, arguments: str) -> Delta:
    function = {"name": name, "arguments": arguments}
    id = f"call_{uuid.uuid4().hex[:24]}"
    return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
