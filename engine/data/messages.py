"""Messages of a conversation, as OpenAI writes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")


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
