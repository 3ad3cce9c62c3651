"""Waiting lines of a bounded length."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from fwdllm.http.api_error import ApiError


class Queue:
    """Those who wait for something, or have it. waiting: how many."""

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
        """Be done, or give up."""
        with self._lock:
            self.waiting -= 1

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue for a block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()
