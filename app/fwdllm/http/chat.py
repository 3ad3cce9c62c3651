"""/v1/chat/completions: a conversation becomes a prompt, and a text becomes OpenAI's answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.errors import ModelError
from fwdllm.http import tool_calls
from fwdllm.http.api_error import ApiError
from fwdllm.http.json_grammar import SchemaError, grammar_of
from fwdllm.http.schemas import ChatRequest, Tool

Reader = tool_calls.TextReader | tool_calls.CallReader | tool_calls.FreeReader


def prompt_of(tokenizer: Tokenizer, body: ChatRequest) -> list[int]:
    """The tokens of a conversation up to the assistant's turn. Errors: ApiError 400.

    What the template does not show is an error: the model would answer as if it had not been said.
    """
    tools = None
    if body.tools and body.tool_choice != "none":
        tools = [tool.model_dump(exclude_unset=True) for tool in body.tools]
    text = _render(tokenizer, body.messages, tools)
    text.encode()  # UnicodeEncodeError for half of a surrogate pair
    # A call can be forced without the model being told of the tools.
    if tools and not forced(body) and text == _render(tokenizer, body.messages, None):
        raise ApiError(400, "the chat template of this model has no place for tools", "tools")
    for i, message in enumerate(body.messages):
        for name in ("tool_calls", "name"):
            if name not in message or message["role"] in ("tool", "function"):
                continue
            without = {k: v for k, v in message.items() if k != name}
            others = [*body.messages[:i], without, *body.messages[i + 1 :]]
            if text == _render(tokenizer, others, tools):
                what = f"the chat template of this model has no place for {name!r}"
                raise ApiError(400, what, f"messages.{i}.{name}")
    ids = tokenizer.encode_prompt(text)
    called = forced(body)
    if len(called) == 1:  # what is known need not be written
        ids += tokenizer.encode(tool_calls.opening_of(called[0]), bos=False)
    return ids


def forced(body: ChatRequest) -> Sequence[Tool]:
    """The tools one of which must be called; none if the model may answer instead."""
    tools = body.tools or []
    if body.tool_choice == "required":
        return tools
    if body.tool_choice in ("auto", "none"):
        return ()
    assert not isinstance(body.tool_choice, str)
    name = body.tool_choice.function.name
    return [tool for tool in tools if tool.function.name == name]


def constraint(body: ChatRequest) -> str | None:
    """The grammar of the answer that a request wants, if it wants one. Errors: ApiError 400."""
    try:
        if tools := forced(body):
            return tool_calls.grammar_of(tools)
        schema = body.response_format.wanted()
        return body.grammar if schema is None else grammar_of(schema)
    except SchemaError as error:
        where = "tools" if forced(body) else body.response_format.where()
        param = f"{where}.{error.where}" if error.where else where
        raise ApiError(400, f"{where}: {error}", param) from error


def reader_of(body: ChatRequest) -> Reader:
    """What makes an answer of the model's text."""
    if tools := forced(body):
        return tool_calls.CallReader(tool_calls.opening_of(tools[0]) if len(tools) == 1 else "")
    if body.tools and body.tool_choice == "auto":
        names = [tool.function.name for tool in body.tools]
        return tool_calls.FreeReader(names, None if body.parallel_tool_calls else 1)
    return tool_calls.TextReader()


def whole(completion: dict[str, Any], reader: Reader) -> dict[str, Any]:
    """The answer to a request without ``stream``, from llama-cpp-python's completion."""
    [choice] = completion["choices"]
    deltas = reader.feed(choice["text"])
    rest, reason = reader.end(choice["finish_reason"])
    message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
    calls: dict[int, dict[str, Any]] = {}
    for delta in [*deltas, *rest]:
        if "content" in delta:
            message["content"] = (message["content"] or "") + delta["content"]
        for piece in delta.get("tool_calls", []):
            index, arguments = piece["index"], piece["function"]["arguments"]
            if index in calls:
                calls[index]["function"]["arguments"] += arguments
            else:
                calls[index] = {k: v for k, v in piece.items() if k != "index"}
    if calls:
        message["tool_calls"] = list(calls.values())
    elif message["content"] is None and not isinstance(reader, tool_calls.CallReader):
        message["content"] = ""
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
    return {
        **_head(completion, "chat.completion"),
        "choices": [choice],
        "usage": completion["usage"],
    }


def streamed(chunks: Iterator[dict[str, Any]], reader: Reader) -> Iterator[dict[str, Any]]:
    """The chunks of an answer, from llama-cpp-python's."""
    reason, head = "stop", None
    for chunk in chunks:
        [choice] = chunk["choices"]
        reason = choice["finish_reason"] or reason
        if head is None:
            head = _head(chunk, "chat.completion.chunk")
            yield _chunk(head, {"role": "assistant", "content": ""})
        for delta in reader.feed(choice["text"]):
            yield _chunk(head, delta)
    assert head is not None
    rest, reason = reader.end(reason)
    for delta in rest:
        yield _chunk(head, delta)
    yield _chunk(head, {}, reason)


def _render(tokenizer: Tokenizer, messages: Sequence[Any], tools: list[Any] | None) -> str:
    try:
        return tokenizer.chat.render(messages, True, tools)
    except ModelError as error:
        raise ApiError(400, str(error), "messages") from error


def _head(found: dict[str, Any], kind: str) -> dict[str, Any]:
    same = {name: found[name] for name in ("created", "model")}
    return {"id": f"chat{found['id']}", "object": kind, **same}


def _chunk(
    head: dict[str, Any], delta: dict[str, Any], reason: str | None = None
) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {**head, "choices": [choice]}
