"""One tokenization: what is tuned on, generated from and served are the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from real_models import smollm2

from fwdllm.engine import Engine, Example
from fwdllm.engine.data.messages import as_templates_expect
from fwdllm.engine.llamacpp import generation
from fwdllm.http.chat import prompt_of
from fwdllm.http.schemas import ChatRequest

__all__ = ["smollm2"]  # a fixture

TEMPLATES = ("tools", "lastthink", "r1", "default-system", "date", "alternate")
SYSTEM = {"role": "developer", "content": "Be brief."}
QUESTION = {"role": "user", "content": "Weather in Bonn?"}
ANSWER = {"role": "assistant", "content": "It rains."}
CALL = {"name": "weather", "arguments": '{"city": "Bonn"}'}
CALLS = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c1", "type": "function", "function": CALL}],
}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "rain, all day long"}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], Any]] = {
    "one turn": ([QUESTION, ANSWER], None),
    "system": ([SYSTEM, QUESTION, ANSWER], None),
    "turns": ([QUESTION, ANSWER, QUESTION, ANSWER], None),
    "greeting": ([ANSWER, QUESTION, ANSWER], None),
    "calls": ([QUESTION, CALLS, RESULT, ANSWER], TOOLS),
}
# Of these templates: one refuses the order of roles, the others show no tools.
REFUSED = {("alternate", "system"), ("alternate", "greeting")}


@pytest.fixture(scope="module")
def model(models: Path, bundled: Path, smollm2: Path) -> Callable[[str], Path]:
    real = {"bundled": bundled, "SmolLM2": smollm2}
    return lambda name: real.get(name) or models / f"template-{name}.gguf"


@pytest.mark.parametrize("name", [*TEMPLATES, "bundled", "SmolLM2"])
def test_a_conversation(model: Callable[[str], Path], name: str) -> None:
    engine = Engine.load(model(name))
    for what, (messages, tools) in CONVERSATIONS.items():
        if (name, what) in REFUSED or (tools and name != "tools"):
            continue
        *before, _ = messages
        ids = prompt_of(engine.tokenizer, ChatRequest(messages=before, tools=tools))
        assert ids == generation._prompt_ids(engine.tokenizer, before, False, tools), what
        # What is tuned on begins with that, and then learns.
        read = [as_templates_expect(message, "it") for message in messages]
        *_, last = engine.separate([Example(messages=read, tools=tools)])
        tokens = engine.tokenize(last, None)
        assert tokens.ids[: len(ids)] == ids, what
        assert (tokens.labels[len(ids) - 1], tokens.labels[len(ids)]) == (False, True), what


@pytest.mark.parametrize("name", ["tools", "bundled", "SmolLM2"])
@pytest.mark.parametrize("text", ["The market", "<|im_start|>user\nHi.<|im_end|>\n", " a  b"])
def test_a_text(model: Callable[[str], Path], name: str, text: str) -> None:
    """The server's is in test_serve_fields.py."""
    engine = Engine.load(model(name))
    ids = generation._prompt_ids(engine.tokenizer, text, False, None)
    tokens = engine.tokenize(Example(prompt=text, completion=" fell."), None)
    assert tokens.ids[: len(ids)] == ids
    assert engine.tokenize(Example(text=text + " fell."), None).ids[0] == ids[0]
