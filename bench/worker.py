"""Sides of a measurement, each in a separate process, so that peak memory is known for each.

A side is a class, named "module:Name". Its constructor loads what is needed, does the work once to
warm up and puts figures about itself into ``facts`` (JSON values); ``run()`` does the work again.
While one side works, the others block in a read of their pipe and use no CPU time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from fwdllm.resources import peak_rss_bytes


@dataclass(frozen=True)
class Answer:
    """value: returned by the side, JSON.  seconds: of the call.  peak_rss_bytes: the process's."""

    value: Any
    seconds: float
    peak_rss_bytes: int


class Worker:
    """A process with one side. facts: the side's, after its warm-up."""

    def __init__(
        self, side: str, options: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ) -> None:
        self._side = side
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fwdllm.bench.worker", side],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.facts: dict[str, Any] = self._ask(dict(options)).value
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def run(self) -> Answer:
        """Make the side do its work once."""
        return self._ask("run")

    def call(self, method: str) -> Any:
        """Call another method of the side; returns its value."""
        return self._ask(method).value

    def close(self) -> None:
        """End the process; if it is still busy after 5 seconds, it is killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _ask(self, request: object) -> Answer:
        from fwdllm.engine.errors import FwdllmError

        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):  # reported below: no answer will come either
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            if code == -signal.SIGKILL:
                raise FwdllmError(f"the system killed {self._side}; it needs too much memory")
            raise RuntimeError(f"{self._side} ended with code {code}; its error is above")
        answer = json.loads(line)
        if "error" in answer:
            raise FwdllmError(answer["error"])
        return Answer(**answer)


def serve(side: str) -> None:
    """Answer requests, one JSON line each, until stdin ends: first options, then method names."""
    module, name = side.split(":")
    # Output that libraries print must not mix with the answers, so it goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    target: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        try:
            if target is None:
                target = getattr(import_module(module), name)(**request)
                value = target.facts
            else:
                value = getattr(target, request)()
        except Exception as error:
            from fwdllm.cli.console import explain  # late: imports count in the side's memory

            sentence = explain(error)
            if sentence is None:
                raise
            print(json.dumps({"error": sentence}), file=answers, flush=True)
            continue
        seconds = time.perf_counter() - start
        answer = Answer(value, seconds, peak_rss_bytes())
        print(json.dumps(vars(answer)), file=answers, flush=True)


if __name__ == "__main__":
    try:
        serve(sys.argv[1])
    except KeyboardInterrupt:  # Ctrl-C reaches all processes; the parent reports it
        raise SystemExit(130) from None
