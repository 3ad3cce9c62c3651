"""Waiting lines of a bounded length."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

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
