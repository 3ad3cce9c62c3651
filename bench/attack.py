"""``fwdllm serve`` under attack: latencies of ordinary clients, without and with attackers.

The attackers send what once stopped the server: grammars and schemas that grow without bound,
bodies of faults, long conversations, half of a request, and requests whose answer nobody reads.
Each kind has one client, which sends its next request when the last has been answered.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import os
import sys
import tempfile
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias

import httpx

from fwdllm.bench.serve import QUESTIONS, Load, asking, running, send, summary
from fwdllm.demo import asset
from fwdllm.engine.errors import ConfigError

_CHAT, _COMPLETIONS = "/v1/chat/completions", "/v1/completions"
# Of half-sent requests at a time; they are held until the server closes them.
_HALVES = 32
# Between the requests of an attacker, so that its own work does not fill the machine.
_PAUSE_SECONDS = 0.05
_SAMPLE_SECONDS = 1.0
_DEAF_SECONDS = 5.0

# Sends one attack; returns the status of the answer, or what became of it.
_Attack: TypeAlias = Callable[[httpx.AsyncClient], Awaitable[str]]


def measure_attack(model: Path | None, clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Latencies in seconds by kind of request, in turns without and with attackers.

    model: None: the bundled model.  clients: number of ordinary clients.  seconds: of each part; a
    round has two parts.  In the result, "ratio" is the p95 latency with attackers over that
    without; "errors" counts answers of 500 and above, to whomever; "resident_bytes" is the
    server's memory at the ends of all parts and the most that was seen.  Errors: ConfigError.
    """
    if min(clients, rounds) < 1 or not seconds > 0:
        raise ConfigError("clients, rounds and seconds must be above 0")
    model = model or asset("fwdllm-tiny.gguf")
    with tempfile.TemporaryDirectory(prefix="fwdllm-") as folder, running(model, folder) as url:
        found = asyncio.run(_measure(url, clients, seconds, rounds))
    parts = {part: summary(found.ordinary.seconds[part]) for part in ("without", "with")}
    counted = [found.ordinary.statuses, *found.attacks.values()]
    return {
        "command": "attack",
        "settings": {
            "model": model.stem,
            "clients": clients,
            "seconds": seconds,
            "rounds": rounds,
        },
        "statuses": dict(found.ordinary.statuses),
        "attacks": {kind: dict(statuses) for kind, statuses in found.attacks.items()},
        "errors": sum(n for part in counted for status, n in part.items() if status[0] == "5"),
        "resident_bytes": {"ends": found.ends, "most": max(found.samples)},
        **parts,
        "ratio": {
            kind: parts["with"][kind]["p95"] / before["p95"]
            for kind, before in parts["without"].items()
            if kind in parts["with"]
        },
    }


class _Found:
    """ordinary: the clients' figures.  attacks: statuses by kind.  samples, ends: of memory."""

    def __init__(self) -> None:
        self.ordinary = Load()
        self.attacks: dict[str, collections.Counter[str]] = {
            kind: collections.Counter() for kind in _ATTACKS
        }
        self.samples: list[int] = []
        self.ends: list[int] = []


async def _measure(url: str, clients: int, seconds: float, rounds: int) -> _Found:
    found = _Found()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        # So that all parts of the server are loaded before the first part.
        await send(client, clients, min(2.0, seconds), Load(), "without")
        for _ in range(rounds):
            for part in ("without", "with"):
                attacking = _attackers(url, found) if part == "with" else contextlib.nullcontext()
                watching = asyncio.ensure_future(_watch(client, found))
                async with attacking:
                    await send(client, clients, seconds, found.ordinary, part)
                watching.cancel()
                found.ends.append(await _resident(client))
                found.samples.append(found.ends[-1])
    return found


@contextlib.asynccontextmanager
async def _attackers(url: str, found: _Found) -> AsyncIterator[None]:
    """A context in which a process attacks: its work would delay the clients of this one."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "fwdllm.bench.attack", url, stdin=PIPE, stdout=PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    try:
        yield
    finally:
        said, _ = await process.communicate(b"")
    for kind, statuses in json.loads(said).items():
        found.attacks[kind].update(statuses)


def main(url: str) -> None:
    """Attack a server from the first line on standard output to the end of standard input.

    Then a JSON object follows with the number of answers of each status, by kind of attack.
    """
    asyncio.run(_attack_all(url, {kind: collections.Counter[str]() for kind in _ATTACKS}))


async def _attack_all(url: str, attacks: dict[str, collections.Counter[str]]) -> None:
    everything = asyncio.gather(*(_attack(url, kind, n) for kind, n in attacks.items()))
    print("begun", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(attacks), flush=True)
    assert not everything.done()
    os._exit(0)  # they are in the middle of something


async def _watch(client: httpx.AsyncClient, found: _Found) -> None:
    while True:
        found.samples.append(await _resident(client))
        await asyncio.sleep(_SAMPLE_SECONDS)


async def _resident(client: httpx.AsyncClient) -> int:
    lines = (await client.get("/metrics")).raise_for_status().text.splitlines()
    return int(float(next(v for k, _, v in map(_parted, lines) if k == "fwdllm_resident_bytes")))


def _parted(line: str) -> tuple[str, str, str]:
    return line.partition(" ")


async def _attack(url: str, kind: str, statuses: collections.Counter[str]) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        while True:
            try:
                status = await _ATTACKS[kind](client)
            except httpx.HTTPError as error:
                status = type(error).__name__
            statuses[status] += 1
            await asyncio.sleep(_PAUSE_SECONDS)


def _posting(path: str, body: bytes) -> _Attack:
    async def post(client: httpx.AsyncClient) -> str:
        headers = {"Content-Type": "application/json"}
        return str((await client.post(path, content=body, headers=headers)).status_code)

    return post


def _as_json(**fields: Any) -> bytes:
    return json.dumps({"max_tokens": 2, **fields}).encode()


def _schema(schema: Any) -> bytes:
    wanted = {"type": "json_object", "schema": schema}
    return _as_json(**asking(QUESTIONS[0]), response_format=wanted)


def _faults(n_bytes: int) -> bytes:
    return b'{"messages":[' + b",".join([b"1"] * (n_bytes // 2)) + b"]}"


async def _abort(client: httpx.AsyncClient) -> str:
    """Leave when the first token of a long answer is there."""
    body = {**asking(QUESTIONS[0]), "max_tokens": 1000, "stream": True}
    async with client.stream("POST", _CHAT, json=body) as answer:
        async for _ in answer.aiter_lines():
            break
    return str(answer.status_code)


async def _half(client: httpx.AsyncClient) -> str:
    """Send half of some requests and wait for the server to close them."""
    head = f"POST {_CHAT} HTTP/1.1\r\nHost: localhost\r\n".encode()
    body = head + b"Content-Length: 100000\r\n\r\n{"
    opened = [await _connect(client) for _ in range(_HALVES)]
    for i, (_, writer) in enumerate(opened):
        writer.write((head, body)[i % 2])
    try:
        await asyncio.gather(*(reader.read() for reader, _ in opened), return_exceptions=True)
    finally:
        for _, writer in opened:
            writer.close()
    return "closed"


async def _deaf(client: httpx.AsyncClient) -> str:
    """Ask for a stream and read nothing of it."""
    _, writer = await _connect(client)
    body = json.dumps({**asking(QUESTIONS[0]), "stream": True}).encode()
    head = f"POST {_CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
    await asyncio.sleep(_DEAF_SECONDS)
    writer.close()
    return "unread"


async def _connect(client: httpx.AsyncClient) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection(client.base_url.host, client.base_url.port)


_ATTACKS: dict[str, _Attack] = {
    "grammar": _posting(_COMPLETIONS, _as_json(prompt="a", grammar="root ::= " + "[a-z]? " * 700)),
    "schema": _posting(_CHAT, _schema({"type": "array", "items": {}, "maxItems": 10**8})),
    "wide schema": _posting(_CHAT, _schema({"enum": list(range(100_000))})),
    "1 MB of faults": _posting(_CHAT, _faults(10**6)),
    "8 MB of faults": _posting(_CHAT, _faults(8 * 10**6)),
    "long prompt": _posting(_COMPLETIONS, _as_json(prompt="word " * 10**6)),
    "many messages": _posting(_CHAT, _as_json(messages=[{"role": "user", "content": "a"}] * 2000)),
    "abort": _abort,
    "half-sent requests": _half,
    "unread streams": _deaf,
}


if __name__ == "__main__":
    main(sys.argv[1])
