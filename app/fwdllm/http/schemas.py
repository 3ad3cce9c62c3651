"""Requests to the models: OpenAI's format, with llama-cpp-python's further parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.types import StringConstraints

from fwdllm.http import limits

MAX_INPUTS = 2048  # OpenAI's limit of texts in one request
_NO_LIMIT = 2**31 - 1

Temperature = Annotated[float, Field(ge=0, le=100)]
Penalty = Annotated[float, Field(ge=0, le=10)]
Bias = dict[int, Annotated[float, Field(ge=-100, le=100)]]
Count = Annotated[int, Field(ge=1)]
Suffix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]*$", max_length=64)]


class NullIsDefault(BaseModel):
    """A request in which null means the default, as in OpenAI's API."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class GenerationRequest(NullIsDefault):
    """What requests for text have in common: what clients write for no limit, and for no stop.

    Empty strings to stop at are left out. -1 tokens are as many as the context has room for, to
    which ``Llama`` cuts any greater number.
    """

    @model_validator(mode="before")
    @classmethod
    def _as_clients_mean_it(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        found = dict(values)
        for name in ("max_tokens", "max_completion_tokens"):
            if found.get(name) == -1:
                found[name] = _NO_LIMIT
        stop = found.get("stop")
        if isinstance(stop, list):
            stop = [text for text in stop if text != ""]
        if stop in ("", []):
            found.pop("stop")
        elif stop is not None:
            found["stop"] = stop
        return found


class StreamOptions(NullIsDefault):
    """include_usage: whether a last chunk with token counts is sent."""

    include_usage: bool = False


class ResponseFormat(NullIsDefault):
    """The format of an answer. schema: for type "json_object".  json_schema: for that type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: dict[str, Any] = {}
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    def plain(self) -> dict[str, Any] | None:
        """In llama-cpp-python's form."""
        if self.type == "text":
            return None
        schema = self.json_schema.get("schema", self.schema_)
        return {"type": "json_object", **({"schema": schema} if schema else {})}


class LoraScale(BaseModel):
    """An adapter for a request, as for llama.cpp's server: its number, and how much it counts."""

    model_config = ConfigDict(extra="forbid")

    id: Annotated[int, Field(ge=0, lt=2**31)]
    scale: Annotated[float, Field(ge=-limits.MAX_LORA_SCALE, le=limits.MAX_LORA_SCALE)]


LoraScales = Annotated[list[LoraScale], Field(max_length=limits.MAX_LORAS)]

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# Fields that ``Llama`` does not take, or takes in another form.
_OURS = {
    "best_of", "logit_bias_type", "lora", "max_completion_tokens", "messages", "min_tokens",
    "model", "n", "grammar", "response_format", "stream_options", "user",
}  # fmt: skip


class CompletionRequest(GenerationRequest, CreateCompletionRequest):
    """A text to continue.

    repeat_penalty: 1.0, not llama-cpp-python's default of 1.1: OpenAI's API has no such penalty,
    and it makes greedy answers worse.
    """

    n: Literal[1] = 1
    best_of: Literal[1] = 1
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] = ""
    max_tokens: Count = 16
    temperature: Temperature = 0.8
    repeat_penalty: Penalty = 1.0
    logit_bias: Bias = {}
    lora: LoraScales | None = None
    stream_options: StreamOptions = StreamOptions()

    def options(self) -> dict[str, Any]:
        """Arguments for ``Llama.create_completion``."""
        options = self.model_dump(exclude=_OURS, exclude_none=True)
        prompt = self.prompt if isinstance(self.prompt, str) else self.prompt[0]
        return {**options, "prompt": prompt}


class ChatRequest(GenerationRequest, CreateChatCompletionRequest):
    """A conversation to continue; see ``CompletionRequest``."""

    n: Literal[1] = 1
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Temperature = 0.8
    repeat_penalty: Penalty = 1.0
    logit_bias: Bias = {}
    lora: LoraScales | None = None
    response_format: ResponseFormat = ResponseFormat()
    stream_options: StreamOptions = StreamOptions()

    @field_validator("messages")
    @classmethod
    def _as_templates_expect(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [_message(i, message) for i, message in enumerate(messages)]

    def options(self) -> dict[str, Any]:
        """Arguments for ``Llama.create_chat_completion``."""
        options = self.model_dump(exclude=_OURS, exclude_none=True)
        options |= {"messages": self.messages, "response_format": self.response_format.plain()}
        if self.max_completion_tokens is not None:
            options["max_tokens"] = self.max_completion_tokens
        return options


class EmbeddingRequest(NullIsDefault):
    """Texts to embed, each as a vector of the model's embedding size."""

    model: str | None = None
    lora: LoraScales | None = None
    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]], Field(min_length=1, max_length=MAX_INPUTS)
        ]
    )
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: None = None
    user: str | None = None


def _message(index: int, message: dict[str, Any]) -> dict[str, Any]:
    """A message with its text parts joined, without nulls, and with "developer" as "system"."""
    message = {name: value for name, value in message.items() if value is not None}
    if message.get("role") not in _ROLES:
        raise ValueError(f"the role of message {index} is not one of {', '.join(_ROLES)}")
    if message["role"] == "developer":
        message["role"] = "system"
    content = message.get("content", "")
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise ValueError(f"message {index} has parts other than text")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise ValueError(f"the content of message {index} is not a text")
    return {**message, "content": content}
