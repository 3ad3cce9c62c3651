"""JSON bodies: read away from the event loop, and only if they have few enough values.

A body of a few MB can hold millions of values; each would become an object, and a fault that says
what is wrong with it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from fwdllm.http import limits

_MARKS = b",:[{"
# A smaller body is read in less time than a thread needs to start with it.
_SMALL_BYTES = 2**15
_BLOCK_BYTES = 2**18
# One at a time, so that they leave Python's lock to others.
_reading_large = asyncio.Lock()


class Route(APIRoute):
    """A route whose JSON body is read by ``parsed``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As of the base class."""
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            return await handle(_Request(request.scope, request.receive))

        return handler


class _Request(Request):
    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body = await self.body()
            if len(body) <= _SMALL_BYTES:
                self._json = parsed(body)
            else:
                async with _reading_large:
                    self._json = await run_in_threadpool(parsed, body)
        return self._json


def parsed(body: bytes) -> Any:
    """The value of a body. Errors: HTTPException; JSONDecodeError."""
    most = limits.MAX_BODY_VALUES
    # Texts have such marks too, but few have as many as that.
    if sum(body.count(mark) for mark in _MARKS) > most and _n_marks_outside(body) > most:
        raise HTTPException(413, f"a request may have {most:,} values")
    try:
        return json.loads(body)
    except json.JSONDecodeError:
        raise
    except RecursionError as error:
        raise HTTPException(400, "the body is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits; bytes that are no text
        raise HTTPException(400, f"the body is not JSON: {error}") from error


def _n_marks_outside(body: bytes) -> int:
    """How many of ``_MARKS`` are outside of strings, counted until they are too many."""
    plain = np.frombuffer(body.replace(rb"\\", b"").replace(rb"\"", b""), np.uint8)
    marks = np.zeros(256, bool)
    marks[list(_MARKS)] = True
    n, quotes = 0, 0
    for start in range(0, len(plain), _BLOCK_BYTES):
        block = plain[start : start + _BLOCK_BYTES]
        before = quotes + np.cumsum(block == ord('"'), dtype=np.int32)
        n += int(np.count_nonzero(marks[block] & (before % 2 == 0)))
        quotes = int(before[-1])
        if n > limits.MAX_BODY_VALUES:
            break
    return n
