"""Waiting lines of a bounded length."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator

from fwdllm.http.api_error import ApiError


class Queue:
    """A count of requests with a limit. waiting: requests that wait for a resource or use it."""

    def __init__(self, limit: int) -> None:
        self.waiting, self._limit = 0, limit
        self._lock = threading.Lock()

    def enter(self) -> None:
        """Join; ApiError 429 if the queue is too long."""
        with self._lock:
            if self.waiting >= self._limit:
                text = f"{self.waiting} requests are waiting already; try again in a moment"
                raise ApiError(429, text, code="rate_limit_exceeded", headers={"Retry-After": "1"})
            self.waiting += 1

    def leave(self) -> None:
        """Leave, when done or when giving up."""
        with self._lock:
            self.waiting -= 1

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A context that holds a place in the queue."""
        self.enter()
        try:
            yield
        finally:
            self.leave()


# Rest after costly work, in times of what it took: it has a tenth of a processor at most.
_REST = 9


class Turns:
    """Costly work that any request may ask for: one at a time, with a rest after each.

    So others keep most of the machine, however many ask.
    """

    def __init__(self, limit: int) -> None:
        self._queue, self._lock = Queue(limit), asyncio.Lock()

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A context that is entered when it is one's turn. ApiError 429 if too many wait."""
        with self._queue.place():
            await self._lock.acquire()
            began = time.perf_counter()
            try:
                yield
            finally:
                rest = _REST * (time.perf_counter() - began)
                asyncio.get_running_loop().call_later(rest, self._lock.release)
