"""Changes of bytes and of JSON that formats have not foreseen."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

_NUMBERS = [0, 1, 2, 7, 127, 255, 256, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1]

_WORDS = [b"\0", b"\xff", b"\xed\xa0\x80", b'"', b"}", b"]", b"[" * 100_000, b'{"a":' * 5_000]

# Values that are wrong in most places. Texts: none, long, half a surrogate pair, markup, controls.
ODD: Sequence[Callable[[], Any]] = [
    lambda: None, lambda: True, lambda: False, lambda: 0, lambda: -1, lambda: 1, lambda: 0.5,
    lambda: 2**31, lambda: 2**53 + 1, lambda: 2**63, lambda: 2**64, lambda: -(2**63),
    lambda: 10**30, lambda: 10**400, lambda: 1e308, lambda: -1e-320, lambda: math.nan,
    lambda: math.inf, lambda: "", lambda: " ", lambda: "a", lambda: "\0", lambda: "\ud800",
    lambda: "ß語😀\u202e", lambda: "x" * 30_000, lambda: "lorem " * 3_000, lambda: "[red]x[/red]",
    lambda: "\x1b[31m\r\n", lambda: "../../etc/passwd", lambda: "<|im_start|>", lambda: "1e5",
    lambda: [], lambda: {}, lambda: [None], lambda: [[]], lambda: {"": None}, lambda: [1] * 3000,
    lambda: {str(i): i for i in range(2000)}, lambda: nested([], 60), lambda: nested({}, 60),
    lambda: nested([], 200), lambda: nested({}, 200), lambda: [{}] * 1000, lambda: "a b c " * 20,
]  # fmt: skip


def nested(value: Any, depth: int) -> Any:
    """Lists or objects in each other."""
    found: Any = value
    for _ in range(depth):
        found = [found] if isinstance(value, list) else {"a": found}
    return found


def change_json(value: Any, random: Random, known: Sequence[Any] = ()) -> Any:
    """A JSON value with one to four changes. known: values that mean something in its format."""
    found = copy.deepcopy(value)
    for _ in range(random.choice([1, 1, 1, 1, 2, 4])):
        places = list(_places(found))
        if not places:
            return random.choice(ODD)()
        holder, key = random.choice(places)
        _change(holder, key, random, known, places)
    return found


def _change(
    holder: Any, key: Any, random: Random, known: Sequence[Any], places: list[tuple[Any, Any]]
) -> None:
    way = random.randrange(9)
    if way == 0 or (way == 3 and not known):
        holder[key] = random.choice(ODD)()
    elif way <= 2:  # one of the same kind
        alike = [odd for odd in (make() for make in ODD) if type(odd) is type(holder[key])]
        holder[key] = random.choice(alike or [None])
    elif way == 3:
        holder[key] = copy.deepcopy(random.choice(known))
    elif way == 4:
        del holder[key]
    elif way == 5:
        other, there = random.choice(places)
        if key in holder if isinstance(holder, dict) else key < len(holder):
            holder[key] = copy.deepcopy(other[there])
    elif way == 6:
        if isinstance(holder, list):
            holder[key : key + 1] = [holder[key]] * random.choice([0, 2, 3, 50])
        else:
            holder[random.choice([f"{key}x", key.upper(), "", *map(str, known[:50])])] = holder[key]
    elif way == 7:
        now = holder[key]
        if isinstance(now, (int, float)) and abs(now) < 2**65:
            holder[key] = random.choice(
                [-now, now + 1, now - 1, now * 2, now * 10**6, now + 0.5, str(now)]
            )
        elif isinstance(now, str):
            holder[key] = random.choice(
                [now * 2, now[:-1], now.upper(), f" {now}", [now], {now: 1}]
            )
        else:
            holder[key] = [now]
    else:
        holder[key] = {"a": holder[key]}


def _places(value: Any, depth: int = 0) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    if depth > 30 or not isinstance(value, (list, dict)):
        return found
    keys = list(value)[:50] if isinstance(value, dict) else range(min(len(value), 50))
    for key in keys:
        found.append((value, key))
        found += _places(value[key], depth + 1)
    return found


def dumped(value: Any, random: Random) -> bytes:
    """JSON as bytes, now and then wrong ones."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.7)
    content = text.encode(errors="surrogatepass")
    return content if random.random() < 0.85 else change_bytes(content, random)


def change_bytes(content: bytes, random: Random, words: Sequence[bytes] = ()) -> bytes:
    """Bytes with one to eight changes. words: what is put among them, too."""
    found = bytearray(content)
    for _ in range(random.choice([1, 1, 2, 4, 8])):
        at = random.randrange(len(found) + 1)
        way = random.randrange(8)
        if way == 0 and found:
            found[min(at, len(found) - 1)] ^= 1 << random.randrange(8)
        elif way == 1:
            found[at : at + 1] = random.randbytes(1)
        elif way == 2:
            width = random.choice([1, 2, 4, 8])
            number = random.choice(_NUMBERS) % 256**width
            found[at : at + width] = number.to_bytes(width, "little")
        elif way == 3:
            del found[at : at + random.choice([1, 2, 8, 64, 1000])]
        elif way == 4:
            found[at:at] = found[at : at + random.choice([1, 8, 64])]
        elif way == 5:
            found[at:at] = random.randbytes(random.choice([1, 4, 16]))
        elif way == 6:
            found[at:at] = random.choice(words or _WORDS)
        else:
            other = random.randrange(len(found) + 1)
            found[at : at + 16] = found[other : other + 16]
    return bytes(found)
