"""Messages of a conversation, as OpenAI writes them, and fields of a line of data in general."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

from fwdllm.engine.errors import DataError

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# Fields of a message that a chat template is given.
MESSAGE_FIELDS = (
    "name", "tool_calls", "tool_call_id", "refusal",
    "reasoning_content", "reasoning", "thinking",
)  # fmt: skip
# Fields of a message that no template here is given.
_OTHER_FIELDS = ("function_call", "audio", "images", "videos")
_NOTHING: tuple[Any, ...] = (None, [], {}, "")


def as_templates_expect(message: Message, name: str) -> dict[str, Any]:
    """A message without nulls, its content a string, and with "developer" as "system".

    name: of the message, in errors. ValueError for parts of other kinds than text.
    """
    found = {key: value for key, value in message.items() if value is not None}
    if found.get("role") not in ROLES:
        raise ValueError(f"the role of {name} is not one of {', '.join(ROLES)}")
    if found["role"] == "developer":  # a name that templates do not know
        found["role"] = "system"
    content = found.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise ValueError(f"{name} has parts other than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of {name} is not a text")
    return {**found, "content": content}


def parse_messages(value: object, where: str) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """Messages, and the numbers of the assistant's that are context only."""
    if not is_list(value):
        raise DataError(f"{where}: messages is {kind_of(value)}, not a list")
    found = [_message(item, f"{where}: message {i}") for i, item in enumerate(value, 1)]
    messages = [message for message, _ in found]
    assistant = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not assistant:
        raise DataError(f"{where}: there is no assistant message to learn from")
    context = frozenset(i for i in assistant if not found[i][1])
    if len(context) == len(assistant):
        raise DataError(f"{where}: every assistant message has weight 0, so none is learned from")
    return messages, context


def parse_prompt_and_completion(
    fields: dict[str, Any], where: str
) -> tuple[list[dict[str, Any]], frozenset[int]]:
    """As ``parse_messages``, of a prompt and a completion that are messages, as TRL has them."""
    messages, context = parse_messages([*fields["prompt"], *fields["completion"]], where)
    before = range(len(fields["prompt"]))
    context |= {i for i in before if messages[i]["role"] == "assistant"}
    if all(m["role"] != "assistant" or i in context for i, m in enumerate(messages)):
        raise DataError(f"{where}: the completion has no assistant message to learn from")
    return messages, context


def _message(value: object, where: str) -> tuple[dict[str, Any], bool]:
    """A message as chat templates expect it, and whether it has a weight of 1."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: it is {kind_of(value)}, not an object")
    role = string(value, "role", where)
    refuse(value, _OTHER_FIELDS, where)
    weight = value.get("weight", 1)
    if weight is None:
        weight = 1
    if isinstance(weight, bool) or weight not in (0, 1):
        raise DataError(f"{where}: its weight is {short(str(weight))}, not 0 or 1")
    known = {name: value[name] for name in MESSAGE_FIELDS if value.get(name) not in _NOTHING}
    calls = _calls(known["tool_calls"], where) if "tool_calls" in known else []
    content = value.get("content")
    if content is None and (calls or "refusal" in known):
        content = ""
    elif is_list(content):
        content = _joined(content, where)
    else:
        take = nonempty if role == "assistant" and not (calls or "refusal" in known) else string
        content = take(value, "content", where)
    if role not in ROLES:
        raise DataError(f"{where}: the role {short(role)} is not one of {', '.join(ROLES)}")
    message = as_templates_expect({"role": role, "content": content, **known}, where)
    return message, bool(weight)


def _joined(parts: list[Any], where: str) -> str:
    """The texts of a content's parts."""
    texts = []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        if kind != "text" or not isinstance(part, dict):
            raise DataError(f"{where}: a part of its content is {short(str(kind))}, not text")
        texts.append(string(part, "text", where))
    return "".join(texts)


def _calls(value: object, where: str) -> list[Any]:
    """Checks a message's tool calls."""
    if not is_list(value):
        raise DataError(f"{where}: tool_calls is {kind_of(value)}, not a list")
    for call in value:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError(f"{where}: a tool call is not a function with a name")
        if not isinstance(function.get("arguments", ""), (str, dict)):
            raise DataError(f"{where}: the arguments of a tool call are not JSON in a string")
    return value


def parse_tools(fields: dict[str, object], where: str) -> list[dict[str, Any]] | None:
    """The tools of a line, if there are any."""
    tools = fields.get("tools")
    if tools in _NOTHING:
        return None
    if not is_list(tools) or not all(isinstance(tool, dict) for tool in tools):
        raise DataError(f"{where}: tools is not a list of objects")
    return tools


def is_list(value: object) -> TypeGuard[list[Any]]:
    return isinstance(value, list)


def refuse(fields: dict[str, object], names: Iterable[str], where: str) -> None:
    """DataError for a field that is there, not empty, and would be ignored."""
    for name in names:
        if fields.get(name) not in (None, [], {}, ""):
            raise DataError(
                f"{where}: the field {name} would change what is learned, and is not read; take it "
                "out, or write the text that the model is to see as prompt and completion"
            )


def nonempty(fields: dict[str, object], name: str, where: str) -> str:
    value = string(fields, name, where)
    if not value:
        raise DataError(f"{where}: {name} is empty")
    return value


def string(fields: dict[str, object], name: str, where: str) -> str:
    if name not in fields:
        raise DataError(f"{where}: {name} is missing")
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {kind_of(value)}, not a string")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; UTF-8 cannot
        raise DataError(f"{where}: {name} has half of a surrogate pair") from None
    return value


def kind_of(value: object) -> str:
    if value is None:
        return "null"
    names = {bool: "a bool", int: "a number", float: "a number", str: "a string", list: "a list"}
    return names.get(type(value), "an object")


def short(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")
