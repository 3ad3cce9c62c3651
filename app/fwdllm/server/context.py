"""What the routes share: one ``Context`` for an application."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from fwdllm.server import limits
from fwdllm.server.errors import ApiError

if TYPE_CHECKING:
    from fwdllm.server.jobs import Jobs
    from fwdllm.server.models import Models
    from fwdllm.server.perturbations import AdapterEngine
    from fwdllm.server.runs import Runs
    from fwdllm.server.store import Store


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


@dataclass
class Context:
    """folder: the server's.  queue: for the models.

    started: Unix seconds.  n_tokens, n_requests: generated and answered since.  streams: open now.
    """

    folder: Path
    store: Store
    models: Models
    jobs: Jobs
    engine: AdapterEngine
    runs: Runs
    queue: Queue = field(default_factory=lambda: Queue(limits.MAX_WAITING))
    started: float = field(default_factory=time.time)
    n_tokens: int = 0
    n_requests: int = 0
    streams: int = 0

    def check_room(self) -> None:
        """ApiError 413 if the store has as many bytes of adapters as it may."""
        if self.store.adapters_bytes() > limits.MAX_ADAPTERS_BYTES:
            raise ApiError(413, "the server keeps no more adapters; delete some")


def _context(request: Request) -> Context:
    found: Context = request.app.state.context
    return found


# What a route takes to get at the context of its application.
Served = Annotated[Context, Depends(_context)]
