"""The page at "/", and the event stream that keeps it up to date."""

from __future__ import annotations

import asyncio
import importlib.metadata
import json
import time
from collections.abc import AsyncIterator
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from fwdllm.http import limits
from fwdllm.http.api_error import ApiError
from fwdllm.http.context import Context, Served
from fwdllm.protocol.config import TRAIN_METHODS
from fwdllm.resources import rss_bytes

_POLL_SECONDS = 0.5
_SERVER_SECONDS = 2.0

router = APIRouter(tags=["dashboard"])


@router.get("/", include_in_schema=False)
def index() -> FileResponse:
    """The page."""
    return FileResponse(_assets() / "index.html")


@router.get("/assets/{name}", include_in_schema=False)
def asset(name: str) -> FileResponse:
    """A file of the page."""
    found = {path.name: path for path in _assets().iterdir()}.get(name)
    if found is None:
        raise ApiError(404, f"there is no asset {name!r}")
    return FileResponse(found)


@router.head("/healthz", include_in_schema=False)
@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Answers if the server is running; needs no thread, as all may be taken."""
    return {"status": "ok"}


@router.get("/v1/server")
def server(served: Served) -> dict[str, Any]:
    """The model that is served, and the server's limits."""
    return {
        "model": served.models.base,
        "architecture": served.models.architecture,
        "encoder": not served.models.is_causal,
        "context": served.models.context,
        "version": importlib.metadata.version("fwdllm"),
        "methods": TRAIN_METHODS,
        "limits": {
            "upload_bytes": limits.MAX_UPLOAD_BYTES,
            "body_bytes": limits.MAX_BODY_BYTES,
            "examples": limits.MAX_EXAMPLES,
            "queued_jobs": limits.MAX_UNFINISHED_JOBS,
        },
    }


@router.get("/v1/runs")
def list_runs(served: Served) -> dict[str, Any]:
    """Jobs and watched folders, newest first."""
    return {"object": "list", "data": served.runs.summaries()}


@router.get("/v1/stream")
async def stream(request: Request, served: Served, run: str | None = None) -> EventSourceResponse:
    """Server-sent events: "runs" on changes, "points" of one run, "server" every few seconds."""
    if served.streams >= limits.MAX_STREAMS:
        raise ApiError(429, "too many pages are open", headers={"Retry-After": "10"})
    served.streams += 1
    return _Counted(served, _events(served, run))


class _Counted(EventSourceResponse):
    """A stream that counts in ``Context.streams`` until it ends."""

    def __init__(self, served: Context, events: AsyncIterator[dict[str, str]]) -> None:
        super().__init__(events, sep="\n")
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._served.streams -= 1
        # If the server closes, the stream is cut; without this uvicorn would log an error.
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _events(served: Context, run: str | None) -> AsyncIterator[dict[str, str]]:
    shown: list[dict[str, Any]] | None = None
    generation, n_sent = -1, 0
    told = -_SERVER_SECONDS
    while True:
        found = await run_in_threadpool(served.runs.summaries)
        if found != shown:
            shown = found
            yield _event("runs", {"data": found})
        if run is not None:
            now, points = await run_in_threadpool(served.runs.points, run, generation, n_sent)
            reset = now != generation
            if points or reset:
                generation, n_sent = now, 0 if reset else n_sent
                n_sent += len(points)
                yield _event("points", {"run": run, "reset": reset, "points": points})
        if time.monotonic() - told >= _SERVER_SECONDS:
            told = time.monotonic()
            yield _event("server", _state(served))
        await asyncio.sleep(_POLL_SECONDS)


def _state(served: Context) -> dict[str, Any]:
    return {
        "resident_bytes": rss_bytes(),
        "queue": served.queue.waiting,
        "requests": served.n_requests,
        "tokens": served.n_tokens,
    }


def _event(name: str, data: dict[str, Any]) -> dict[str, str]:
    return {"event": name, "data": json.dumps(data)}


def _assets() -> Path:
    return Path(str(resources.files("fwdllm") / "assets" / "dashboard"))
