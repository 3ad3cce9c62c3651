"""Chat templates: a program in a model's file that makes a text of a conversation.

Messages are OpenAI's: text parts are joined, "developer" is the system, and a call's arguments,
JSON in a string, are an object where the template writes them as one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from typing import Any

from fwdllm.engine.child import Child, ChildError
from fwdllm.engine.data.messages import Message, as_templates_expect
from fwdllm.engine.errors import ModelError

# What llama.cpp uses for a model without a template.
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# A call as a template is tried with, to see how it writes arguments.
_ARGUMENTS = '{"needle": 1}'


# Templates render a conversation in less than a millisecond, one of 10 MB in a second.
SECONDS = 5.0
# Beyond what the process needs for itself: a conversation is in there some ten times.
MEMORY = 512 << 20

_renderer = Child("fwdllm.engine.data.template:render")


class ChatTemplate:
    """The template of a model, rendered in a process of its own, see ``template``.

    source: the program.  path: of the model, in errors.  now: the time it is told, None for the
    clock's: a run's tokens must not change with the day.
    """

    def __init__(self, source: str, bos: str, eos: str, path: object) -> None:
        self._source, self._bos, self._eos, self._path = source, bos, eos, path
        self.now: datetime | None = None

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The text of a conversation. Errors: ModelError if the program fails or refuses it."""
        try:
            found = [as_templates_expect(m, f"message {i}") for i, m in enumerate(messages, 1)]
            return self._run(self._with_arguments(found), add_generation_prompt, tools)
        except (ChildError, ValueError) as error:
            raise ModelError(
                f"the chat template of {self._path} fails on these messages: {error}"
            ) from error
        except OSError as error:
            raise ModelError(
                f"the chat template of {self._path} cannot be run: no process can be started for "
                f"it ({error.strerror or error})"
            ) from error

    def _run(
        self,
        messages: list[dict[str, Any]],
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        values = {
            "messages": messages,
            "tools": tools or None,
            "add_generation_prompt": add_generation_prompt,
            "bos_token": self._bos,
            "eos_token": self._eos,
        }
        now = (self.now or datetime.now().replace(microsecond=0)).isoformat()
        return _rendered(json.dumps({"source": self._source, "now": now, "values": values}))

    def _with_arguments(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The messages with calls' arguments as objects or as JSON, as the template wants them."""
        if not any(message.get("tool_calls") for message in messages):
            return messages
        convert = _with_object if self._takes_objects else _with_text
        return [
            {**m, "tool_calls": [convert(call) for call in m["tool_calls"]]}
            if m.get("tool_calls")
            else m
            for m in messages
        ]

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether a call's arguments appear as JSON only if they are given as an object."""

        def shown(arguments: object) -> str:
            call = {"name": "probe", "arguments": arguments}
            calls = [{"id": "call00000", "type": "function", "function": call}]
            messages: list[dict[str, Any]] = [
                {"role": "user", "content": "Hi."},
                {"role": "assistant", "content": "", "tool_calls": calls},
            ]
            try:
                return self._run(messages, False)
            except ChildError as error:
                if error.died:
                    raise
                return ""

        return _ARGUMENTS not in shown(_ARGUMENTS) and "needle" in shown(json.loads(_ARGUMENTS))


@lru_cache(maxsize=8)  # an example is rendered in several ways, and some of them twice
def _rendered(request: str) -> str:
    text: str = _renderer.ask(json.loads(request), SECONDS, MEMORY)
    return text


def _with_text(call: Any) -> Any:
    """A tool call with its arguments as JSON, if they are an object."""
    function = call.get("function", {})
    if not isinstance(function.get("arguments"), dict):
        return call
    return {**call, "function": {**function, "arguments": json.dumps(function["arguments"])}}


def _with_object(call: Any) -> Any:
    """A tool call with its arguments read from JSON, if they are an object."""
    try:
        found = json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError):
        return call
    if not isinstance(found, dict):
        return call
    return {**call, "function": {**call["function"], "arguments": found}}
