"""``fwdllm serve`` under load: latencies of many clients, without and with a tuning job.

The clients run on the same machine as the server, like apps on a laptop. Each client sends its next
request when it has received the answer to the last one.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import httpx
import numpy as np

from fwdllm.demo import asset
from fwdllm.engine.errors import ConfigError

# The length of an answer: a sentence or two.
_ANSWER_TOKENS = 32
_JOBS = 3
QUESTIONS = ("What does a cow say?", "What is the sun?", "Tell me about the sea.")

# More steps than fit in a measurement, so that the job never ends before the measurement.
_ENDLESS_STEPS = 100_000


def measure_serve(model: Path | None, clients: int, seconds: float, rounds: int) -> dict[str, Any]:
    """Latencies in seconds by kind of request, in turns without and with a tuning job.

    model: None: the bundled model.  clients: number of concurrent clients.  seconds: of each part;
    a round has two parts, without and with the job.  In the result, "ratio" is the p95 latency with
    the job over that without; "tuned_answer_s" is the time from a job's end to the first answer of
    its model, on an idle server; "jobs_lost" counts accepted jobs that the server did not list at
    the end.  Errors: ConfigError.
    """
    if min(clients, rounds) < 1 or not seconds > 0:
        raise ConfigError("clients, rounds and seconds must be above 0")
    model = model or asset("fwdllm-tiny.gguf")
    with tempfile.TemporaryDirectory(prefix="fwdllm-") as folder:
        began = time.perf_counter()
        with running(model, folder) as url:
            first_answer = _first_answer(url) - began
            tuned_answer = asyncio.run(_tuned_answer(url))
            load = asyncio.run(_measure(url, clients, seconds, rounds))
    parts = {part: summary(load.seconds[part]) for part in ("without", "with")}
    return {
        "command": "serve",
        "settings": {
            "model": model.stem,
            "clients": clients,
            "seconds": seconds,
            "rounds": rounds,
            "answer_tokens": _ANSWER_TOKENS,
        },
        "first_answer_s": first_answer,
        "tuned_answer_s": tuned_answer,
        "statuses": dict(load.statuses),
        "jobs_lost": load.jobs_lost,
        "steps_per_s": {"alone": load.steps_alone, "with": load.steps_beside},
        **parts,
        "ratio": {
            kind: parts["with"][kind]["p95"] / found["p95"]
            for kind, found in parts["without"].items()
        },
    }


# Sends a request; returns the status and the latency in seconds.
_Ask: TypeAlias = Callable[[httpx.AsyncClient, str], Awaitable[tuple[int, float]]]


class Load:
    """Figures of the clients. seconds: latencies by part and kind.  statuses: count of each."""

    def __init__(self) -> None:
        self.seconds: dict[str, dict[str, list[float]]] = {
            part: collections.defaultdict(list) for part in ("without", "with")
        }
        self.statuses: collections.Counter[str] = collections.Counter()
        self.steps_alone = self.steps_beside = 0.0
        self.jobs_lost = 0


async def _measure(url: str, clients: int, seconds: float, rounds: int) -> Load:
    load = Load()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits) as client:
        jobs = await _queue_jobs(client, _JOBS, _ENDLESS_STEPS)
        # While jobs are not paused, the first one runs and the others wait in the queue.
        await asyncio.sleep(_settle(seconds))
        load.steps_alone = await _pace(client, jobs[0], seconds / 2)
        for _ in range(rounds):
            await client.post(f"/v1/fine_tuning/jobs/{jobs[0]}/pause")
            for job in jobs[1:]:
                await client.post(f"/v1/fine_tuning/jobs/{job}/pause")
            await _until_idle(client)
            await send(client, clients, seconds, load, "without")
            for job in jobs:
                await client.post(f"/v1/fine_tuning/jobs/{job}/resume")
            await asyncio.sleep(_settle(seconds))
            pace, _ = await asyncio.gather(
                _pace(client, jobs[0], seconds), send(client, clients, seconds, load, "with")
            )
            load.steps_beside += pace / rounds
        found = {job["id"] for job in (await get(client, "/v1/fine_tuning/jobs"))["data"]}
        load.jobs_lost = len(set(jobs) - found)
    return load


def _settle(seconds: float) -> float:
    """Seconds to wait for the worker to start and read its data."""
    return min(5.0, seconds)


async def _queue_jobs(client: httpx.AsyncClient, n: int, steps: int) -> list[str]:
    data = asset("pirate.train.jsonl").read_bytes()
    files = {"file": ("pirate.jsonl", data)}
    uploaded = await client.post("/v1/files", files=files, data={"purpose": "fine-tune"})
    model = (await get(client, "/v1/server"))["model"]
    settings = {"steps": steps, "eval_every": steps}
    body = {"model": model, "training_file": uploaded.json()["id"], "fwdllm": settings}
    jobs = []
    for _ in range(n):
        created = await client.post("/v1/fine_tuning/jobs", json=body)
        jobs.append(created.raise_for_status().json()["id"])
    return jobs


async def send(
    client: httpx.AsyncClient, clients: int, seconds: float, load: Load, part: str
) -> None:
    """Ask in turn for chats, streams and embeddings, by so many clients; figures go to ``load``."""
    end = time.perf_counter() + seconds
    kinds: list[tuple[str, _Ask]] = [
        ("chat", _chat),
        ("chat, first token of a stream", _stream),
        ("embedding", _embedding),
    ]

    async def one(number: int) -> None:
        order = random.Random(number)
        while time.perf_counter() < end:
            kind, ask = order.choice(kinds)
            try:
                code, latency = await ask(client, order.choice(QUESTIONS))
                status = str(code)
            except httpx.HTTPError as error:
                status = type(error).__name__
            load.statuses[status] += 1
            if status == "200":
                load.seconds[part][kind].append(latency)
            else:
                await asyncio.sleep(1.0)

    await asyncio.gather(*(one(number) for number in range(clients)))


async def _chat(client: httpx.AsyncClient, question: str) -> tuple[int, float]:
    began = time.perf_counter()
    answer = await client.post("/v1/chat/completions", json=asking(question))
    return answer.status_code, time.perf_counter() - began


async def _stream(client: httpx.AsyncClient, question: str) -> tuple[int, float]:
    body = {**asking(question), "stream": True}
    began, first = time.perf_counter(), None
    async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
        async for _ in answer.aiter_lines():
            first = first or time.perf_counter() - began
    return answer.status_code, first or 0.0


async def _embedding(client: httpx.AsyncClient, question: str) -> tuple[int, float]:
    began = time.perf_counter()
    answer = await client.post("/v1/embeddings", json={"input": question})
    return answer.status_code, time.perf_counter() - began


def asking(text: str) -> dict[str, Any]:
    """A request to chat."""
    messages = [{"role": "user", "content": text}]
    return {"messages": messages, "max_tokens": _ANSWER_TOKENS, "temperature": 0.7}


async def _pace(client: httpx.AsyncClient, job: str, seconds: float) -> float:
    """Steps per second of a job."""
    first, began = await _steps(client, job), time.perf_counter()
    await asyncio.sleep(seconds)
    return (await _steps(client, job) - first) / (time.perf_counter() - began)


async def _steps(client: httpx.AsyncClient, job: str) -> int:
    runs = (await get(client, "/v1/runs"))["data"]
    return next(int(run["step"]) for run in runs if run["id"] == job)


async def _until_idle(client: httpx.AsyncClient) -> None:
    before = -1
    while (now := await _total_steps(client)) != before:
        before = now
        await asyncio.sleep(2.0)


async def _total_steps(client: httpx.AsyncClient) -> int:
    return sum(run["step"] for run in (await get(client, "/v1/runs"))["data"])


async def get(client: httpx.AsyncClient, path: str) -> Any:
    """The JSON of an answer, which must be a success."""
    return (await client.get(path)).raise_for_status().json()


def summary(found: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Number and percentiles of latencies by kind."""
    return {
        kind: {
            "requests": len(values),
            "p50": float(np.median(values)),
            "p95": float(np.percentile(values, 95)),
            "max": max(values),
        }
        for kind, values in sorted(found.items())
    }


def _first_answer(url: str) -> float:
    """Ask a question; the time of the answer, by ``time.perf_counter``."""
    with httpx.Client(base_url=url, timeout=None) as client:
        client.post("/v1/chat/completions", json=asking(QUESTIONS[0])).raise_for_status()
        return time.perf_counter()


async def _tuned_answer(url: str) -> float:
    """Seconds from the end of a short tuning job to the first answer of its model.

    They count from when the job was last seen running, so that they are rather too many.
    """
    async with httpx.AsyncClient(base_url=url, timeout=None) as client:
        [job] = await _queue_jobs(client, 1, steps=2)
        while True:
            asked = time.perf_counter()
            found = await get(client, f"/v1/fine_tuning/jobs/{job}")
            if found["status"] == "succeeded":
                break
            if found["status"] == "failed":
                raise ConfigError(f"the job failed: {found['error']['message']}")
            running = asked
            await asyncio.sleep(0.005)
        body = {**asking(QUESTIONS[0]), "model": found["fine_tuned_model"]}
        (await client.post("/v1/chat/completions", json=body)).raise_for_status()
        return time.perf_counter() - running


@contextlib.contextmanager
def running(model: Path, folder: str) -> Iterator[str]:
    """A context with a server's URL."""
    command = [sys.executable, "-m", "fwdllm", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--state", f"{folder}/state"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise ConfigError(f"the server did not start: it ended with {process.wait()}")
        yield url
    finally:
        process.terminate()
        process.wait()
