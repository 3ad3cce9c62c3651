"""Requests to the models: OpenAI's format, with llama-cpp-python's further parameters."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from fwdllm.http import limits
from fwdllm.http.messages import checked

MAX_INPUTS = 2048  # OpenAI's limit of texts in one request
_NO_LIMIT = 2**31 - 1


def _few(value: Any, most: int, what: str) -> Any:
    """Refuse too many values before each of them is checked."""
    if isinstance(value, (dict, list)) and len(value) > most:
        raise ValueError(f"there are {len(value):,} {what}; {most:,} are allowed")
    return value


def at_most(most: int) -> BeforeValidator:
    """For ``Annotated``: so many items, counted before each of them is checked."""
    return BeforeValidator(lambda value: _few(value, most, "items"))


class FirstFault(FailFast):
    """For ``Annotated``: of a long list, the first wrong item is enough."""

    __hash__ = object.__hash__  # needed for unions; pydantic's class has none


class Strict(BaseModel):
    """A request in which unknown fields are errors."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _with_few_fields(cls, values: Any) -> Any:
        return _few(values, limits.MAX_FIELDS, "fields")


Temperature = Annotated[float, Field(ge=0, le=100)]
Penalty = Annotated[float, Field(ge=0, le=10)]
Bias = Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], at_most(limits.MAX_BIASES)]
Count = Annotated[int, Field(ge=1)]
Tokens = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1), FirstFault()]
Suffix = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]*$", max_length=64)]
Metadata = Annotated[
    dict[
        Annotated[str, StringConstraints(max_length=64)],
        Annotated[str, StringConstraints(max_length=512)],
    ],
    Field(max_length=16),
    at_most(16),
]
ToolName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]


def _refuse(value: Any, info: ValidationInfo) -> None:
    if value not in (None, "", [], {}):
        raise ValueError(f"this server does not have {info.field_name!r}")


# What OpenAI has and this server has not: only what says nothing is accepted.
Refused = Annotated[None, BeforeValidator(_refuse)]


class NullIsDefault(Strict):
    """A request in which null means the default, as in OpenAI's."""

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


class GenerationRequest(NullIsDefault):
    """What requests for text have in common: what clients write for no limit, and for no stop.

    Empty strings to stop at are left out. -1 tokens are as many as the context has room for, to
    which ``Llama`` cuts any greater number. cache_prompt: llama.cpp's, which changes no answer.
    """

    logit_bias_type: Literal["input_ids"] | None = None
    cache_prompt: bool | None = None

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
    """include_usage: whether a last chunk with token counts is sent.

    include_obfuscation: padding against listeners, which a local server does not need.
    """

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(NullIsDefault):
    """OpenAI's wrapping of a schema. strict: answers are so in either case."""

    name: str = ""
    description: str = ""
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool = True


class ResponseFormat(NullIsDefault):
    """The format of an answer. schema: for type "json_object".  json_schema: for that type."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")

    @model_validator(mode="after")
    def _has_a_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type 'json_schema' needs 'json_schema'")
        return self

    def wanted(self) -> dict[str, Any] | None:
        """The schema of the answer, None for any text."""
        if self.type == "text":
            return None
        if self.type == "json_schema":
            assert self.json_schema is not None
            return self.json_schema.schema_
        return self.schema_ or {"type": "object"}

    def where(self) -> str:
        """The path of the schema in the request."""
        inner = "json_schema.schema" if self.type == "json_schema" else "schema"
        return f"response_format.{inner}"


class LoraScale(Strict):
    """An adapter for a request, as for llama.cpp's server: its number, and how much it counts."""

    id: Annotated[int, Field(ge=0, lt=2**31)]
    scale: Annotated[float, Field(ge=-limits.MAX_LORA_SCALE, le=limits.MAX_LORA_SCALE)]


LoraScales = Annotated[
    list[LoraScale], Field(max_length=limits.MAX_LORAS), at_most(limits.MAX_LORAS)
]
Stop = (
    str | Annotated[list[str], Field(max_length=limits.MAX_STOPS), at_most(limits.MAX_STOPS)] | None
)


class Function(NullIsDefault):
    """A function that a model may call. parameters: a JSON schema.  strict: as ``JsonSchema``."""

    name: ToolName
    description: str = ""
    parameters: dict[str, Any] = {}
    strict: bool = False


class Tool(NullIsDefault):
    """A tool that a model may call."""

    type: Literal["function"] = "function"
    function: Function


class _Name(NullIsDefault):
    name: ToolName


class NamedTool(NullIsDefault):
    """The tool that a model must call."""

    type: Literal["function"] = "function"
    function: _Name


# Fields that ``Llama.create_completion`` does not take, or takes in another form.
_OURS = {
    "best_of", "cache_prompt", "echo", "grammar", "logit_bias_type", "logprobs", "lora",
    "max_completion_tokens", "min_tokens", "model", "n", "prompt", "stream_options", "suffix",
    "user",
}  # fmt: skip


class CompletionRequest(GenerationRequest, CreateCompletionRequest):
    """A text to continue.

    prompt: a text, or the ids of the model's own tokens.
    repeat_penalty: 1.0, not llama-cpp-python's default of 1.1: OpenAI's API has no such penalty,
    and it makes greedy answers worse.
    """

    n: Literal[1] = 1
    best_of: Literal[1] = 1
    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, max_length=1), at_most(1)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=1), at_most(1)]
    ) = ""
    suffix: Refused = None
    stop: Stop = None
    logprobs: Refused = None
    max_tokens: Count = 16
    temperature: Temperature = 0.8
    repeat_penalty: Penalty = 1.0
    logit_bias: Bias = {}
    lora: LoraScales | None = None
    stream_options: StreamOptions = StreamOptions()

    def options(self) -> dict[str, Any]:
        """Arguments for ``Llama.create_completion``."""
        return self.model_dump(exclude=_OURS, exclude_none=True)


class ChatRequest(GenerationRequest, CreateChatCompletionRequest):
    """A conversation to continue; see ``CompletionRequest``.

    Of OpenAI's further fields those are accepted that change no answer, or with the value that
    changes none.
    """

    n: Literal[1] = 1
    messages: Annotated[
        list[dict[str, Any]],
        Field(min_length=1, max_length=limits.MAX_MESSAGES),
        at_most(limits.MAX_MESSAGES),
    ]
    stop: Stop = None
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Temperature = 0.8
    repeat_penalty: Penalty = 1.0
    logit_bias: Bias = {}
    lora: LoraScales | None = None
    response_format: ResponseFormat = ResponseFormat()
    stream_options: StreamOptions = StreamOptions()
    tools: Annotated[list[Tool], Field(max_length=128), at_most(128)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True

    logprobs: Literal[False] = False
    top_logprobs: Literal[0] = 0
    functions: Refused = None
    function_call: Refused = None
    audio: Refused = None
    modalities: Annotated[list[Literal["text"]], at_most(16)] | None = None
    moderation: Refused = None
    reasoning_effort: Refused = None
    verbosity: Literal["medium"] | None = None
    web_search_options: Refused = None
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] | None = None
    metadata: Metadata | None = None
    prediction: dict[str, Any] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None

    @field_validator("messages")
    @classmethod
    def _as_templates_expect(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [checked(i, message) for i, message in enumerate(messages)]

    @field_validator("tool_choice")
    @classmethod
    def _is_one_of_the_tools(cls, choice: Any, info: ValidationInfo) -> Any:
        names = [tool.function.name for tool in info.data.get("tools", [])]
        if choice == "required" and not names:
            raise ValueError("'required' needs 'tools'")
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"there is no tool {choice.function.name!r} in 'tools'")
        return choice

    @model_validator(mode="after")
    def _has_one_format(self) -> ChatRequest:
        wanted = {
            "grammar": self.grammar is not None,
            "response_format": self.response_format.type != "text",
            "tools": bool(self.tools) and self.tool_choice != "none",
        }
        names = [name for name, given in wanted.items() if given]
        if len(names) > 1:
            raise ValueError(f"{names[0]!r} and {names[1]!r} cannot be combined")
        return self

    def options(self) -> dict[str, Any]:
        """Arguments for ``Llama.create_completion``."""
        theirs = set(CompletionRequest.model_fields) - _OURS
        options = self.model_dump(include=theirs, exclude_none=True)
        return {**options, "max_tokens": self.max_completion_tokens or self.max_tokens}


def _no_tokens(value: Any) -> Any:
    if isinstance(value, list) and any(isinstance(item, (int, list)) for item in value):
        raise ValueError(
            "token ids are not accepted, as clients count in the vocabulary of OpenAI's models; "
            "send texts (LangChain: check_embedding_ctx_length=False)"
        )
    return value


class EmbeddingRequest(NullIsDefault):
    """Texts to embed. dimensions: the first so many numbers, scaled to length 1 again."""

    model: str | None = None
    lora: LoraScales | None = None
    input: Annotated[
        Annotated[str, Field(min_length=1)]
        | Annotated[
            list[Annotated[str, Field(min_length=1)]],
            Field(min_length=1, max_length=MAX_INPUTS),
            at_most(MAX_INPUTS),
        ],
        BeforeValidator(_no_tokens),
    ]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None
    user: str | None = None
