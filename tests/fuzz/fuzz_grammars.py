"""Changed grammars and JSON schemas, each as a request for an answer that keeps to it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from changes import change_bytes, change_json
from fuzz_http import _make, _Server, answered, open_server
from target import Row, Target

_GRAMMARS = [
    'root ::= "a" | "b"', "root ::= [a-z]+", "root ::= [^\\n]{2,5} ([0-9]? ws)*\nws ::= [ \\t]*",
    'root ::= item ("," item)*\nitem ::= "x" | "(" root ")"', "root ::= a\na ::= b?\nb ::= a",
    'root ::= "\\x41\\u0042\\U00000043" . "é"', "root ::= " + "[a-z]? " * 30,
    'root ::= ("a" | "b" | ("c" | "d")){3}', 'root ::= root "a" | "b"',
    "root ::= ((((a))))\na ::= .",
    "root ::= (([a-z]?){9}){9}", 'root ::= ("a"*)*', 'root ::= ""', 'root ::= "a"{0,100}',
]  # fmt: skip
_WORDS = [b"::=", b"|", b"(", b")", b"[", b"]", b"*", b"+", b"?", b"{1000}", b"{0,}", b"{2,1}",
    b'"', b"root", b"\n", b"\\", b"[^", b"-", b"{99999999}", b"\\U0010FFFF", b"#", b".",
    b"((((((", b"ws ws ws ws", b"[a-z]? [a-z]? [a-z]? ", b"{", b"}", b"<think>", b"!"]  # fmt: skip
_SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99},
     "b": {"type": "string", "pattern": "^[a-z]{1,4}$"}}, "required": ["a"]},
    {"type": "array", "items": {"type": "integer"}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "null"}, {"const": 1}]},
    {"anyOf": [{"type": "string", "format": "date"}, {"enum": ["a", 2, None]}]},
    {"$ref": "#/$defs/n", "$defs": {"n": {"type": "object", "properties": {
        "next": {"anyOf": [{"$ref": "#/$defs/n"}, {"type": "null"}]}}}}},
    {"oneOf": [{"type": "string", "maxLength": 5}, {"type": "number", "exclusiveMinimum": 2}]},
    {"type": ["string", "null"], "minLength": 2}, {"allOf": [{"type": "boolean"}]}, {},
    {"type": "object", "additionalProperties": {"type": "array", "items": {"$ref": "#"}}},
]  # fmt: skip
_KNOWN = ["type", "object", "array", "string", "integer", "number", "boolean", "null", "enum",
    "const", "anyOf", "oneOf", "allOf", "not", "if", "$ref", "#", "#/$defs/n", "items", "minItems",
    "maxItems", "properties", "required", "additionalProperties", "pattern", "format", "uuid",
    "minLength", "maxLength", "minimum", "maximum", "multipleOf", "(a+)+$", "[^a]",
    "a{0,99999}", "(?=a)", r"\d{1,500}", r"\p{L}", "((((a?)?)?)?)?", 100_000_000,
    1e18, 64, 200, 2000]  # fmt: skip


_MAX_LENGTH = 16 * 2**20  # more than the server takes


def _write(random: Random, folder: Path, case: Path) -> str:
    while True:
        kind, request = _request(random)
        text, length = [], 0
        for part in json.JSONEncoder().iterencode(request):  # parts of parts can be any length
            text.append(part)
            length += len(part)
            if length > _MAX_LENGTH:
                break
        else:
            (case / "request.json").write_text("".join(text))
            return kind


def _request(random: Random) -> tuple[str, Any]:
    """Of what kind, and path and body."""
    if random.random() < 0.4:
        kind, grammar = "grammar", _grammar(random)
        body: Any = {"prompt": "a", "max_tokens": 4, "grammar": grammar, "temperature": 0}
        path = "/v1/completions"
    else:
        schema = _schema(random, random.choice([1, 2, 3, 5]))
        if random.random() < 0.5:
            schema = change_json(schema, random, [*_KNOWN, *_SCHEMAS])
        kind, path = "schema", "/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
        if random.random() < 0.3:
            kind = "tools"
            function = {"name": "f", "parameters": schema}
            body["tools"] = [{"type": "function", "function": function}]
            body["tool_choice"] = "required"
        else:
            named = {"name": "x", "schema": schema}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
    return kind, [path, body]


def _schema(random: Random, depth: int) -> Any:
    """A sound schema, of more values than is good now and then."""
    count = random.choice([0, 1, 2, 5, 20, 64, 200, 2_000, 10**5, 10**8])
    if depth == 0:
        return random.choice(
            [
                *_SCHEMAS, {"type": "string", "maxLength": count},
                {"type": "string", "pattern": rf"^(\w{{0,{count}}}|[^a-c]+\d?){{1,3}}$"},
                {"enum": list(range(count % 3000))}, {"type": "integer", "maximum": count},
            ]
        )  # fmt: skip
    parts = [_schema(random, depth - 1) for _ in range(random.choice([1, 2, 3]))]
    named = {f"p{i}": part for i, part in enumerate(parts)}
    return random.choice(
        [
            {"type": "array", "items": parts[0], "maxItems": count},
            {"type": "array", "items": parts[0], "minItems": count},
            {"type": "array", "prefixItems": parts},
            {"anyOf": parts},
            {"type": "object", "properties": named, "required": random.sample([*named], 1)},
            {"type": "object", "properties": {f"o{i}": parts[0] for i in range(count % 300)}},
            {"type": "object", "additionalProperties": parts[0]},
        ]
    )


def _grammar(random: Random) -> str:
    found = random.choice(_GRAMMARS).encode()
    choice = random.random()
    if choice < 0.6:
        found = change_bytes(found, random, _WORDS)
    elif choice < 0.9:
        found = b"root ::= " + b" ".join(random.choices(_WORDS, k=random.choice([2, 5, 20])))
    else:
        found = b"root ::= " + _repeated(random)
    return found.decode(errors="replace")


def _repeated(random: Random) -> bytes:
    """Something small many times, in one of the ways that grammars have for it."""
    item: bytes = random.choice([b'"a"', b"[a-z]", b"[a-z]?", b"[a-z]*", b'"" ', b"(a | b)", b"."])
    n = random.choice([10, 100, 1000, 4000])
    ways: Sequence[bytes] = [
        b" ".join([item] * n), b" | ".join([item] * n), b"(" * n + item + b")" * n,
        b"%b{%d}" % (item, n), b"(%b{%d}){%d}" % (item, n, n), b"%b{0,%d}" % (item, n),
        b"\n".join(b"r%d ::= r%d %b" % (i, i + 1, item) for i in range(n)),
        b"%b\n%b" % (item, b"\n".join(b"r%d ::= %b" % (i, item) for i in range(n))),
    ]  # fmt: skip
    return random.choice(ways) + b"\na ::= [a-z]?\nb ::= a?"


def _check(server: _Server, case: Path) -> list[Row]:
    import traceback

    path, body = json.loads((case / "request.json").read_text())
    try:
        content = json.dumps(body).encode()
        headers = {"content-type": "application/json"}
        return [answered("request", server.client.post(path, content=content, headers=headers))]
    except Exception:
        return [Row("request", "traceback", output=traceback.format_exc())]


GRAMMARS = Target(_make, _write, _check, open_server, seconds=15)
