"""Chat templates as Transformers and llama-cpp-python run them: programs in Jinja's sandbox.

Run by ``chat`` in a process of its own: the sandbox bounds what a program reaches, not how long it
takes and how much it writes. So this module imports little.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2.ext
from jinja2 import BaseLoader, Template
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# A context of a million tokens is four million characters.
MAX_CHARACTERS = 1 << 24


class _Generation(jinja2.ext.Extension):
    """The tag of Transformers around what an assistant says; its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def render(request: dict[str, Any]) -> str:
    """The text of a conversation. request: source, now (ISO 8601), and in values the
    variables that the program is given. Errors: whatever the program raises."""
    now = datetime.fromisoformat(request["now"])
    text = _compiled(request["source"]).render(
        **request["values"],
        # Other programs give these, too, so a template may ask whether they are none.
        functions=None,
        function_call=None,
        tool_choice=None,
        raise_exception=_raise,
        strftime_now=now.strftime,
    )
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"it writes over {MAX_CHARACTERS:,} characters")
    return text


@lru_cache(maxsize=8)  # compiling takes longer than rendering a conversation
def _compiled(source: str) -> Template:
    environment = ImmutableSandboxedEnvironment(
        loader=BaseLoader(),
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    return environment.from_string(source)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise(message: str) -> None:
    raise ValueError(message)
