"""/metrics: numbers for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fastapi import FastAPI, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram
from prometheus_client import generate_latest as render
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fwdllm.http.context import Context
from fwdllm.http.store import CANCELLED, FAILED, PAUSED, QUEUED, RUNNING, SUCCEEDED
from fwdllm.resources import rss_bytes

_METHODS = ("GET", "HEAD", "POST", "DELETE", "OPTIONS")
# Seconds: from one token of a small model to a long answer of a large one.
_BUCKETS = (0.005, 0.02, 0.1, 0.5, 2.0, 10.0, 60.0, 300.0)


class Meter:
    """ASGI middleware that counts requests by route, not by path, as paths contain ids."""

    def __init__(self, app: ASGIApp, served: Context, registry: CollectorRegistry) -> None:
        self._app, self._served = app, served
        labels = ("method", "route", "status")
        self._requests = Counter(
            "fwdllm_http_requests", "Requests answered.", labels, registry=registry
        )
        self._seconds = Histogram(
            "fwdllm_http_request_seconds",
            "Time to the end of an answer.",
            ("route",),
            buckets=_BUCKETS,
            registry=registry,
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.perf_counter(), 500

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, watched)
        finally:
            self._served.n_requests += 1
            route = getattr(scope.get("route"), "path", "none")
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._requests.labels(method, route, status).inc()
            self._seconds.labels(route).observe(time.perf_counter() - began)


class _State:
    """A collector of figures that are read when Prometheus asks for them."""

    def __init__(self, served: Context) -> None:
        self._served = served

    def collect(self) -> Iterator[Metric]:
        """All figures."""
        served = self._served
        jobs = GaugeMetricFamily("fwdllm_jobs", "Tuning jobs.", labels=["status"])
        found = [job.status for job in served.store.jobs()]
        for status in (QUEUED, RUNNING, PAUSED, SUCCEEDED, FAILED, CANCELLED):
            jobs.add_metric([status], found.count(status))
        yield jobs
        text = "In the queue for the model, or answered now."
        yield GaugeMetricFamily("fwdllm_waiting_requests", text, value=served.queue.waiting)
        text = "Memory of the server."
        yield GaugeMetricFamily("fwdllm_resident_bytes", text, value=rss_bytes() or 0)
        text = "Generated since the start."
        yield CounterMetricFamily("fwdllm_generated_tokens", text, value=served.n_tokens)


def install(app: FastAPI, served: Context) -> None:
    """Count an application's requests and add the route /metrics."""
    registry = CollectorRegistry()
    registry.register(_State(served))
    app.add_middleware(Meter, served=served, registry=registry)

    @app.get("/metrics", tags=["server"])
    def metrics(request: Request) -> Response:
        """Numbers for Prometheus."""
        return Response(render(registry), media_type=CONTENT_TYPE_LATEST)
