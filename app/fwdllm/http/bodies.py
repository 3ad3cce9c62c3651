"""JSON bodies: read away from the event loop, and only if they have few enough values.

A body of a few MB can hold millions of values; each would become an object, and a fault that says
what is wrong with it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import numpy as np
from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from fwdllm.http import limits
from fwdllm.http.api_error import ApiError
from fwdllm.http.queue import Turns

_MARKS = b",:[{"
# A smaller body is read in less time than a thread needs to start with it.
_SMALL_BYTES = 2**15
_BLOCK_BYTES = 2**18
_large = Turns(limits.MAX_WAITING_BODIES)


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
                try:
                    async with _large.turn():
                        self._json = await run_in_threadpool(parsed, body)
                except ApiError as error:  # FastAPI would make another one of it
                    raise HTTPException(error.status, error.message, error.headers) from error
        return self._json


@contextlib.asynccontextmanager
async def turn(request: Request) -> AsyncIterator[None]:
    """A context for work with a body whose cost grows with it. Errors: ApiError 429."""
    if len(await request.body()) <= _SMALL_BYTES:
        yield
        return
    async with _large.turn():
        yield


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
