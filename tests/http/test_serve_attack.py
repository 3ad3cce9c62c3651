"""What clients send to bring the server down: it says no, and goes on answering."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving import Server, error_of

from fwdllm.http import limits
from fwdllm.http.json_grammar import SchemaError, grammar_of

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "hi"}]
# Of one request, on a machine that others keep busy.
PATIENCE = 60.0
# Of the server's computing that an answer of the loop takes beside any of these; they took up to
# 100 s. By the clock, other work of the machine would count.
PROMPT = 3.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("attack") / "state") as running:
        yield running


def refused(server: Server, path: str, body: bytes) -> Any:
    """The error in the answer to a body, during which the server answers others at once."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(post, server, path, body)
        while not answer.done():
            began = computed(server)
            assert server.get("/healthz") == {"status": "ok"}
            assert computed(server) - began < PROMPT
            time.sleep(0.05)
    assert answers(server)
    return error_of(answer.result())


def post(server: Server, path: str, body: bytes) -> httpx.Response:
    headers = {"Content-Type": "application/json"}
    return httpx.post(server.url + path, content=body, headers=headers, timeout=PATIENCE)


def computed(server: Server) -> float:
    """Seconds of all its threads."""
    times = psutil.Process(server.process.pid).cpu_times()
    return float(times.user + times.system)


def answers(server: Server) -> bool:
    """Whether it generates a text."""
    found = server.post(COMPLETION, {"prompt": "a", "max_tokens": 1})
    return bool(found["object"] == "text_completion")


def peak(server: Server) -> int:
    """The most bytes that the server has had resident."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


# Grammars


GRAMMARS = {
    "nullable": "root ::= " + "[a-z]? " * 700,
    "nullable later": 'root ::= "The" | [^T] ' + "[a-z]? " * 700,
    "nullable rules": "root ::= " + "a " * 400 + "\na ::= b | \nb ::= [a-z]*",
    "empty repeats": 'root ::= ("")* "a"',
    "left recursion": 'root ::= root "a" | "b"',
    "itself": "root ::= root",
    "hidden left recursion": 'root ::= a root "x" | "y"\na ::= b\nb ::= ""',
    "mutual recursion": "root ::= a\na ::= b\nb ::= a",
    "many repeats": "root ::= [a-z]{100000}",
    "repeats of repeats": "root ::= (([a-z]{0,40}){0,40}){0,40}",
    "deep": "root ::= " + "(" * 8000 + '"a"' + ")" * 8000,
    "deep rules": "\n".join(f"r{i} ::= r{i + 1}" for i in range(1200)) + "\nroot ::= r0",
    "a character that no token has": 'root ::= "a\\U00FFFFFF"',
    "no character": 'root ::= "\\x00"',
    "no token": "root ::= <[99999999]>",
    "no class": "root ::= []",
    "ends before min_tokens": 'root ::= "a"',
}


@pytest.mark.parametrize("kind", GRAMMARS)
def test_a_grammar_that_costs_too_much_or_ends_llama_cpp_is_refused(
    server: Server, kind: str
) -> None:
    body = {"prompt": "a", "max_tokens": 40, "min_tokens": 3, "grammar": GRAMMARS[kind]}
    error = refused(server, COMPLETION, json.dumps(body).encode())
    assert error["param"] == "grammar"
    assert "grammar" in error["message"]


def test_the_grammar_of_the_attack(server: Server, hostile: Path) -> None:
    error = refused(server, COMPLETION, (hostile / "grammar.json").read_bytes())
    assert error["message"].startswith("the grammar costs too much")


def test_a_grammar_that_costs_too_much_later_ends_its_text(server: Server) -> None:
    grammar = f'root ::= "{"moo " * 12}" ' + "[a-z]? " * 700
    body = {"messages": HELLO, "max_tokens": 80, "grammar": grammar, "stream": True}
    with server.http.stream("POST", CHAT, json=body) as answer:
        lines = [line for line in answer.iter_lines() if line.startswith("data: ")]
    assert answer.status_code == 200 and len(lines) > 5
    assert "costs too much" in lines[-1]
    assert answers(server)


def test_a_grammar_is_kept_to_after_one_was_refused(server: Server) -> None:
    refused(server, COMPLETION, json.dumps({"grammar": "root ::= root"}).encode())
    body = {"prompt": "a", "grammar": 'root ::= "moo"', "max_tokens": 8}
    assert server.post(COMPLETION, body)["choices"][0]["text"] == "moo"


# Schemas


def nested(n: int, schema: Any, name: str) -> Any:
    for _ in range(n):
        schema = {"type": "array", "items": schema} if name == "items" else {name: [schema]}
    return schema


NAMES = [f"p{i}" for i in range(900)]
OBJECTS = [{"properties": {"a": {"const": i}}, "required": ["a"]} for i in range(900)]
SCHEMAS: dict[str, Any] = {
    "maxItems": {"type": "array", "maxItems": 10**8},
    "minItems": {"type": "array", "minItems": 10**9},
    "maxLength": {"type": "string", "maxLength": 10**8},
    "minLength": {"type": "string", "minLength": 10**100},
    "minProperties": {"type": "object", "minProperties": 10**8},
    "maxProperties": {"type": "object", "maxProperties": 10**8},
    "repeats": {"type": "string", "pattern": "a{100000}"},
    "repeats of repeats": {"type": "string", "pattern": "(((a{900}){900}){900}){900}"},
    "a long pattern": {"type": "string", "pattern": "a" * 10**6},
    "a deep pattern": {"type": "string", "pattern": "(" * 2000 + ")" * 2000},
    "deep": nested(400, {}, "items"),
    "deep anyOf": nested(400, {}, "anyOf"),
    "deep allOf": nested(400, {}, "allOf"),
    "wide anyOf": {"anyOf": [{"type": "string", "maxLength": i % 1000} for i in range(20_000)]},
    "wide oneOf": {"oneOf": OBJECTS},
    "wide enum": {"enum": list(range(100_000))},
    "long enum": {"enum": ["a" * 10**6]},
    "types": {"enum": NAMES, "type": ["string"] * 10**5},
    "minimum": {"type": "integer", "minimum": 10**4000},
    "properties": {"properties": {f"p{i}": {} for i in range(20_000)}},
    "required": {"properties": {name: {} for name in NAMES}, "required": NAMES},
    "prefixItems": {"prefixItems": [{"type": "string"}] * 50_000},
    "one part under many names": {
        "anyOf": [{"$ref": "#/$defs/all/" + "0" * i} for i in range(1, 900)],
        "$defs": {"all": [{"enum": NAMES}]},
    },
    "a long $ref": {"$ref": "#" + "/a" * 10**5},
    "required of no text": {"properties": {"a": {}}, "required": [{}]},
    "a type of no text": {"type": [{}]},
}


@pytest.mark.parametrize("kind", SCHEMAS)
def test_a_schema_is_bounded_before_it_is_written_out(kind: str) -> None:
    began = time.process_time()
    with pytest.raises(SchemaError):
        grammar_of(SCHEMAS[kind])
    assert time.process_time() - began < 1.0


@pytest.mark.parametrize("kind", ["maxItems", "wide enum", "repeats of repeats"])
def test_such_a_schema_is_refused_in_formats_and_tools(server: Server, kind: str) -> None:
    schema = SCHEMAS[kind]
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    for extra in ({"response_format": wanted}, {"tools": [tool], "tool_choice": "required"}):
        error = refused(server, CHAT, json.dumps({"messages": HELLO, **extra}).encode())
        assert error["param"].startswith(("response_format.json_schema.schema", "tools.0."))


def test_the_schema_of_the_attack(server: Server, hostile: Path) -> None:
    error = refused(server, CHAT, (hostile / "schema-maxitems.json").read_bytes())
    assert error["message"].startswith("response_format.schema: more than 1000 repeats")


# Bodies


def of(n: int, item: str, begin: str, end: str) -> bytes:
    return (begin + ",".join([item] * n) + end).encode()


BODIES: dict[str, tuple[str, bytes]] = {
    "messages": (CHAT, of(4_000_000, "1", '{"messages":[', "]}")),
    "few messages too many": (CHAT, of(3000, "{}", '{"messages":[', "]}")),
    "lists": (CHAT, of(2_500_000, "[]", '{"messages":[', "]}")),
    "wrong tokens": (COMPLETION, of(900_000, "-1", '{"prompt":[', "]}")),
    "lists of wrong tokens": (COMPLETION, of(900_000, "{}", '{"prompt":[[', "]]}")),
    "stops": (CHAT, of(900_000, "1", '{"messages":[{}],"stop":[', "]}")),
    "tools": (CHAT, of(900_000, "1", '{"messages":[{}],"tools":[', "]}")),
    "inputs": ("/v1/embeddings", of(900_000, "1", '{"input":[', "]}")),
    "texts": ("/predict", of(900_000, "1", '{"inputs":[', "]}")),
    "seeds": ("/v1/perturbations/evaluate", of(900_000, "-1", '{"seeds":[', "]}")),
    "a head": ("/v1/adapters/x/updates", of(900_000, "[]", '{"head":[', "]}")),
    "fields": (CHAT, ("{" + ",".join(f'"k{i}":1' for i in range(400_000)) + "}").encode()),
    "biases": (
        CHAT,
        ('{"logit_bias":{' + ",".join(f'"k{i}":1' for i in range(400_000)) + "}}").encode(),
    ),
    "metadata": (
        CHAT,
        ('{"metadata":{' + ",".join(f'"k{i}":1' for i in range(400_000)) + "}}").encode(),
    ),
    "a field many times": (CHAT, b"{" + b'"messages":1,' * 400_000 + b'"messages":[]}'),
    "deep": (CHAT, b'{"messages":' + b"[" * 2_000_000 + b"]" * 2_000_000 + b"}"),
    "less deep": (CHAT, b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a long integer": (CHAT, b'{"messages":[],"seed":' + b"9" * 5_000_000 + b"}"),
    "a long number": (CHAT, b'{"messages":[],"temperature":0.' + b"9" * 5_000_000 + b"}"),
    "a long name": (CHAT, b'{"' + b"k" * 5_000_000 + b'":1}'),
    "an open text": (CHAT, b'{"messages":["' + rb"\"," * 2_500_000),
    "a long prompt": (COMPLETION, b'{"prompt":"' + b"word " * 1_500_000 + b'"}'),
    "a long message": (
        CHAT,
        b'{"messages":[{"role":"user","content":"' + b"word " * 1_500_000 + b'"}]}',
    ),
}


@pytest.mark.parametrize("kind", BODIES)
def test_a_body_of_many_values_or_faults_holds_nobody_up(server: Server, kind: str) -> None:
    path, body = BODIES[kind]
    assert len(body) <= limits.MAX_BODY_BYTES
    before = peak(server)
    error = refused(server, path, body)
    assert len(error["message"]) < 2000
    assert peak(server) - before < 300 * 2**20


def test_the_body_of_the_attack(server: Server, hostile: Path) -> None:
    before = peak(server)
    error = refused(server, CHAT, (hostile / "many-faults.json").read_bytes())
    assert error["message"] == "messages: there are 500,000 items; 2,048 are allowed"
    assert peak(server) - before < 100 * 2**20


def test_texts_with_many_commas_are_read(server: Server) -> None:
    """Marks of JSON that are within texts are not values."""
    body = {"prompt": 'a, b: [c] {"d"} \\ ' * 150_000, "max_tokens": 1}
    error = error_of(post(server, COMPLETION, json.dumps(body).encode()))
    assert error["code"] == "context_length_exceeded"


# Connections


def opened(server: Server) -> socket.socket:
    url = httpx.URL(server.url)
    return socket.create_connection((url.host, url.port or 80), timeout=PATIENCE)


def seconds_until_closed(connection: socket.socket) -> float:
    began = time.monotonic()
    try:
        while connection.recv(2**16):
            pass
    except ConnectionError:
        pass
    return time.monotonic() - began


HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
HALVES = {
    "nothing": b"",
    "half a line": b"POST /v1/ch",
    "half a head": HEAD + b"X-Slow: 1\r\n",
    "no body": HEAD + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n",
    "half a body": HEAD + b"Content-Length: 100\r\n\r\n" + b"{" * 50,
    "half a chunk": HEAD + b"Transfer-Encoding: chunked\r\n\r\n40\r\n{{{",
    "half a form": b"POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n"
    b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n",
}


def test_requests_that_are_half_sent_are_closed(server: Server) -> None:
    with ThreadPoolExecutor(len(HALVES)) as pool:
        connections = [opened(server) for _ in HALVES]
        for connection, sent in zip(connections, HALVES.values(), strict=True):
            connection.sendall(sent)
        waited = pool.map(seconds_until_closed, connections)
        found = dict(zip(HALVES, waited, strict=True))
    for kind, seconds in found.items():
        assert limits.REQUEST_SECONDS - 3 < seconds < limits.REQUEST_SECONDS + 10, kind
    assert "Traceback" not in server.output


def test_only_so_many_connections_are_open(server: Server) -> None:
    files = psutil.Process(server.process.pid).num_fds
    before = files()
    connections = [opened(server) for _ in range(limits.MAX_CONNECTIONS + 50)]
    assert answers(server)
    assert files() - before <= limits.MAX_CONNECTIONS
    for connection in connections:
        connection.close()
