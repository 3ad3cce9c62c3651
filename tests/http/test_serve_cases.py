"""Models and requests as people bring them to the server: tools, schemas and odd templates."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from real_models import SMOLLM2, package_folder
from serving import Server, error_of, succeeded

from fwdllm import generate
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.http.json_grammar import SchemaError, grammar_of

openai = pytest.importorskip("openai")
jsonschema = pytest.importorskip("jsonschema_rs")

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"place": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
            "required": ["place"],
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
ASKED = [{"role": "user", "content": "Will it rain in Rome?"}]
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def models(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    script = shared / "cases" / "make_models.py"
    if not script.exists():
        pytest.skip("no shared/cases beside the repository")
    folder = tmp_path_factory.mktemp("cases")
    subprocess.run([sys.executable, str(script), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One of SmolLM2, whose template has no place for tools."""
    [model] = package_folder(SMOLLM2).glob("*.gguf")
    with Server(tmp_path_factory.mktemp("tools") / "state", model=model) as running:
        yield running


def client_of(server: Server) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def body(**fields: Any) -> dict[str, Any]:
    return {"messages": ASKED, "max_tokens": 60, "temperature": 0, **fields}


# Tools


@pytest.mark.parametrize("choice", [NAMED, "required"])
def test_a_forced_call_is_whole_and_in_pieces_the_same(server: Server, choice: Any) -> None:
    request = {"tools": [WEATHER], "tool_choice": choice, "seed": 1}
    whole = succeeded(server.http.post(CHAT, json=body(**request)))["choices"][0]
    assert whole["finish_reason"] == "tool_calls"
    assert whole["message"]["content"] is None
    [call] = whole["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"])["place"] in ("Oslo", "Rome")
    name, id, arguments, n = "", "", "", 0
    with client_of(server) as client:
        model = client.models.list().data[0].id
        for chunk in client.chat.completions.create(model=model, stream=True, **body(**request)):
            for piece in chunk.choices[0].delta.tool_calls or []:
                name += piece.function.name or ""
                id += piece.id or ""
                arguments += piece.function.arguments
                n += 1
            reason = chunk.choices[0].finish_reason
    assert (name, arguments, reason) == ("weather", call["function"]["arguments"], "tool_calls")
    assert re.fullmatch("call_[0-9a-f]{24}", id)
    assert n > 3


def test_a_required_call_is_of_one_of_the_tools(server: Server) -> None:
    found = server.post(CHAT, body(tools=[CLOCK, WEATHER], tool_choice="required"))
    [call] = found["choices"][0]["message"]["tool_calls"]
    assert call["function"]["name"] in ("clock", "weather")
    assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_a_call_that_is_cut_off_says_so(server: Server) -> None:
    found = server.post(CHAT, body(tools=[WEATHER], tool_choice=NAMED, max_tokens=3))["choices"][0]
    assert found["finish_reason"] == "length"
    [call] = found["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    with pytest.raises(ValueError, match=r"."):
        json.loads(call["function"]["arguments"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [WEATHER]}, "tools"),
        ({"tools": [CLOCK], "tool_choice": NAMED}, "tool_choice"),
        ({"tools": [WEATHER], "response_format": {"type": "json_object"}}, None),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
        ]}]}, "messages.1.tool_calls"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "clock", "arguments": "{"}}
        ]}]}, "messages"),
    ],
)  # fmt: skip
def test_what_a_template_has_no_place_for_is_refused(
    server: Server, fields: Any, param: str | None
) -> None:
    error = error_of(server.http.post(CHAT, json=body(**fields)))
    assert error["param"] == param
    assert "tool" in error["message"]


def test_tools_reach_a_template_with_a_place_for_them(models: Path, tmp_path: Path) -> None:
    """A conversation with a call and its result goes on."""
    arguments = json.dumps({"place": "Rome"})
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    talk = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "sunny"},
    ]
    with Server(tmp_path / "state", model=models / "template-tools.gguf") as server:
        without = server.post(CHAT, body(messages=ASKED, max_tokens=1))["usage"]["prompt_tokens"]
        for messages in (ASKED, talk):
            found = server.post(CHAT, body(messages=messages, tools=[WEATHER], max_tokens=1))
            assert found["usage"]["prompt_tokens"] > without + 10


# Structured output


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "https://example.com/schema.json"},
        {"$ref": "#/$defs/missing"},
        {"type": "object", "properties": {"a": {"not": {"type": "string"}}}},
        {"type": "string", "pattern": "^(?=x).*$"},
        {"type": "array", "uniqueItems": True},
        {"if": {"type": "string"}, "then": {"minLength": 2}},
        {"$ref": "#"},
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_schema_that_cannot_be_kept_is_refused(server: Server, schema: Any, strict: bool) -> None:
    wanted = {"name": "x", "strict": strict, "schema": schema}
    form = {"type": "json_schema", "json_schema": wanted}
    assert error_of(server.http.post(CHAT, json=body(response_format=form)))["message"]
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    request = body(tools=[tool], tool_choice="required")
    assert error_of(server.http.post(CHAT, json=request))["message"]


def test_the_place_in_the_schema_is_named(server: Server) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?!x)"}}}
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    error = error_of(server.http.post(CHAT, json=body(response_format=form)))
    assert error["param"] == "response_format.json_schema.schema.properties.a"
    assert "look-around" in error["message"]


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {
        "a": {"type": "string", "minLength": 2, "maxLength": 4},
        "b": {"type": "integer", "minimum": -12, "maximum": 137},
        "c": {"type": ["number", "null"]},
    }, "required": ["b"], "additionalProperties": False},
    {"type": "string", "pattern": "^[A-Z]{2}\\d{2,4}$"},
    {"type": "string", "pattern": "^(foo|b\"a\\\\r)[^a-z]{3}$|^x\\w\\s$"},
    {"type": "number", "minimum": -3, "maximum": 1},
    {"type": "integer", "exclusiveMinimum": 999},
    {"type": "array", "items": {"enum": ["a", 'b"q\\', 1, None]}, "minItems": 2, "maxItems": 3},
    {"$defs": {"integer": {"type": "object", "properties": {
        "kids": {"type": "array", "items": {"$ref": "#/$defs/integer"}, "maxItems": 2},
        "v": {"const": "é\n"},
    }, "required": ["v", "kids"]}}, "$ref": "#/$defs/integer"},
    {"anyOf": [{"type": "string", "format": f} for f in ("date-time", "ipv4", "uuid")]},
    {"oneOf": [
        {"type": "object", "properties": {"k": {"const": "a"}}, "required": ["k"]},
        {"type": "object", "properties": {"k": {"const": "b"}, "z": {}}, "required": ["k"]},
    ]},
]  # fmt: skip


@pytest.mark.parametrize("schema", SCHEMAS)
def test_answers_are_valid_by_the_schema(small: Server, schema: Any) -> None:
    """Even at a temperature where the model writes anything that the grammar allows."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}}
    valid, n = jsonschema.validator_for(schema, validate_formats=True), 0
    for seed in range(6):
        request = {"response_format": form, "temperature": 6, "top_k": 0, "top_p": 1, "min_p": 0}
        found = small.post(CHAT, body(**request, seed=seed, max_tokens=200))["choices"][0]
        if found["finish_reason"] == "stop":
            valid.validate(json.loads(found["message"]["content"]))
            n += 1
    assert n > 2


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One of the bundled model."""
    with Server(tmp_path_factory.mktemp("schemas") / "state") as running:
        yield running


def test_an_unanchored_pattern_may_be_anywhere(small: Server) -> None:
    form = {"type": "json_object", "schema": {"type": "string", "pattern": "b[aeiou]t"}}
    request = body(response_format=form, logit_bias={}, max_tokens=100, temperature=1, seed=3)
    found = small.post(CHAT, request)["choices"][0]
    if found["finish_reason"] == "stop":
        assert re.search("b[aeiou]t", json.loads(found["message"]["content"]))
    grammar = grammar_of({"type": "string", "pattern": "b[aeiou]t"})
    assert len(grammar.splitlines()[-2].split("*")) == 3  # anything before, anything after


@pytest.mark.parametrize(
    ("schema", "where"),
    [
        (False, ""),
        ({"type": "foo"}, "type"),
        ({"properties": {"a": {"items": [{}]}}}, "properties.a.items"),
        ({"allOf": [{}, {}]}, "allOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf"),
        ({"enum": []}, "enum"),
        ({"required": ["a"]}, "required"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, ""),
        ({"type": "string", "minLength": 5000}, ""),
        ({"type": "string", "format": "iri"}, ""),
        ({"type": "string", "pattern": "(?i)a"}, ""),
        ({"type": "string", "pattern": "a\\b"}, ""),
    ],
)
def test_what_the_grammar_cannot_say_is_an_error(schema: Any, where: str) -> None:
    with pytest.raises(SchemaError) as refused:
        grammar_of(schema)
    assert refused.value.where == where


# Models


def test_a_template_that_is_none_leaves_completions_and_embeddings(
    models: Path, tmp_path: Path
) -> None:
    """Ollama's templates are Go's; some files have one."""
    with Server(tmp_path / "state", model=models / "template-go.gguf") as server:
        assert server.post("/v1/completions", {"prompt": "The market"})["choices"][0]["text"]
        assert server.post("/v1/embeddings", {"input": "The market"})["data"]
        for stream in (False, True):
            answer = server.http.post(CHAT, json=body(stream=stream))
            assert answer.status_code == 400
            assert "chat template" in error_of(answer)["message"]


def test_no_end_token_is_put_behind_a_prompt(models: Path, shared: Path, tmp_path: Path) -> None:
    path, plain = models / "add-eos.gguf", shared / "models/tinymix-6m.Q4_0.gguf"
    expected = "".join(generate(plain, "The market", max_tokens=8))
    assert "".join(generate(path, "The market", max_tokens=8)) == expected
    tokenizer = Tokenizer.open(path)
    assert tokenizer.add_eos
    assert tokenizer.encode_chat(ASKED)[-1] != tokenizer.eos
    with Server(tmp_path / "state", model=path) as server:
        request = {"prompt": "The market", "max_tokens": 8, "temperature": 0}
        assert server.post("/v1/completions", request)["choices"][0]["text"] == expected
