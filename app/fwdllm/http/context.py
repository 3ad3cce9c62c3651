"""What the routes share: each application has one ``Context``."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from fastapi import Depends, Request

from fwdllm.http import limits
from fwdllm.http.adapter_engine import AdapterEngine
from fwdllm.http.api_error import ApiError
from fwdllm.http.jobs import Jobs
from fwdllm.http.models import Models
from fwdllm.http.queue import Queue
from fwdllm.http.runs import Runs
from fwdllm.http.store import AdapterRow, Store


@dataclass
class Context:
    """What the routes of an application share.

    folder: the server's.  adapter_folder: where requests may load adapters from, or None.
    queue: requests that wait for ``models``.  grammars, trying: grammars that wait to be tried, and
    the lock of the one that is.  started: Unix seconds.
    n_tokens, n_requests: generated tokens and answered requests since then.  streams: open now.
    """

    folder: Path
    store: Store
    models: Models
    jobs: Jobs
    engine: AdapterEngine
    runs: Runs
    adapter_folder: Path | None = None
    queue: Queue = field(default_factory=lambda: Queue(limits.MAX_WAITING))
    grammars: Queue = field(default_factory=lambda: Queue(limits.MAX_WAITING_GRAMMARS))
    trying: asyncio.Lock = field(default_factory=asyncio.Lock)
    started: float = field(default_factory=time.time)
    n_tokens: int = 0
    n_requests: int = 0
    streams: int = 0

    def check_room(self) -> None:
        """ApiError 413 if the store's adapters are over the size limit."""
        if self.store.adapters_bytes() > limits.MAX_ADAPTERS_BYTES:
            raise ApiError(413, "the server keeps no more adapters; delete some")

    def check_unused(self, adapter: AdapterRow) -> None:
        """ApiError 403 for an adapter that requests without a model use."""
        if self.models.loras.scale(adapter):
            raise ApiError(403, "The model that is served cannot be deleted", "model")


def _context(request: Request) -> Context:
    found: Context = request.app.state.context
    return found


# The parameter type by which a route gets the context of its application.
Served = Annotated[Context, Depends(_context)]
