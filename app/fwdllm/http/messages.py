"""What a message of a request to chat may have."""

from __future__ import annotations

import json
from typing import Any

from fwdllm.engine.data.messages import as_templates_expect

# What a message may have besides its role and content. Of these, templates need not show ids and
# the name of a result's tool, nor earlier reasoning; null and empty fields say nothing.
_FIELDS = {"name", "reasoning", "reasoning_content", "tool_call_id", "tool_calls"}


def checked(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message as chat templates expect it.

    Errors: ValueError for what is no message, or has what a template cannot show.
    """
    where = f"message {index}"
    message = {name: value for name, value in message.items() if value not in (None, [])}
    for name in message:
        if name not in _FIELDS | {"role", "content"}:
            raise ValueError(f"{where} has {name!r}, which no chat template has a place for")
    if "tool_calls" in message:
        calls = message["tool_calls"]
        if not isinstance(calls, list) or message.get("role") != "assistant":
            raise ValueError(f"the tool_calls of {where} are not a list in an assistant's message")
        for call in calls:
            _check_call(where, call)
    content = _content(where, message.get("content", ""))
    return as_templates_expect({**message, "content": content}, where)


def _content(where: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(f"the content of {where} is not a text")
    for part in content:
        if not isinstance(part, dict):
            raise ValueError(f"{where} has a part that is not an object")
        kind = part.get("type", "text")
        if kind != "text":
            raise ValueError(f"{where} has a part {kind!r}; this server reads parts of text only")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where} has a part of text without a text")
    return "".join(part["text"] for part in content)


def _check_call(where: str, call: Any) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{where} has a tool call without a function and its name")
    arguments = function.get("arguments") or "{}"
    try:
        arguments = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"the arguments of a tool call in {where} are not a JSON object")
