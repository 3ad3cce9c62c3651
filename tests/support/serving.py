"""``fwdllm serve`` in a process of its own for tests, and what many of them ask of it."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import httpx
import psutil
from cli_runs import MODEL, pirate_rows

from fwdllm import LoRAConfig, TrainConfig, tune
from fwdllm.demo import asset


def lines(*rows: object) -> bytes:
    """A JSONL file."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


VALID = asset("pirate.valid.jsonl")
TRAIN_ROWS = lines(*pirate_rows(48)[8:])
VALID_ROWS = lines(*pirate_rows(8))
NAME = MODEL.stem

# A loaded machine takes several times the usual second or two.
START_TIMEOUT = 60.0
# What a closing server gives its worker and its answers, and some more.
STOP_TIMEOUT = 30.0
JOB_TIMEOUT = 90.0

FINISHED = ("succeeded", "failed", "cancelled")
ENVIRONMENT = {"NO_COLOR": "1"}

# A job of two seconds or so that learns something.
SETTINGS: dict[str, Any] = {
    "steps": 24,
    "method": "forward-ad",
    "perturbations": 2,
    "batch_size": 4,
    "optimizer": "momentum",
    "learning_rate": 2e-3,
    "rank": 2,
    "alpha": 4.0,
    "warmup": 5,
    "max_tokens": 48,
    "eval_every": 12,
    "checkpoint_every": 6,
}
# One of minutes, to be stopped.
LONG = {**SETTINGS, "steps": 2000, "eval_every": 0}


class Server:
    """A running server; leaving the block stops it as its owner would, and wants that to work.

    state: its folder, made if it is None there.  options: more of the command line.
    """

    def __init__(
        self,
        state: Path,
        *options: object,
        model: Path = MODEL,
        environment: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> None:
        self.state, self._model, self._options, self._key = state, model, options, key
        outer = {name: value for name, value in os.environ.items() if name != "FWDLLM_API_KEY"}
        self._environment = {**outer, **ENVIRONMENT, **(environment or {})}
        self._log = state.with_name(state.name + ".log")
        self.start()

    def start(self) -> None:
        """Starts it on the folder that it had, if it ran before."""
        out = self._log.with_suffix(".url")
        with open(out, "wb") as stdout, open(self._log, "ab") as stderr:
            self.process = subprocess.Popen(
                serve_command(self.state, *self._options, model=self._model),
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env=self._environment,
            )
        self._out = out
        try:
            self.url = self._await_url()
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        headers = {} if self._key is None else {"Authorization": f"Bearer {self._key}"}
        self.http = httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False)

    def _await_url(self) -> str:
        deadline = time.monotonic() + START_TIMEOUT
        while not (text := self._out.read_text()).endswith("\n"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start\n{self.output}")
            time.sleep(0.02)
        return text.splitlines()[0]

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.returncode is None:
            code = self.stop()
            assert error is not None or code == 0, f"exit code {code}\n{self.output}"

    def stop(self) -> int:
        """Ends it with SIGTERM and gives its exit code; nothing that it started is left."""
        started = self.descendants()
        self.http.close()
        self.process.terminate()
        try:
            code = self.process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._abandon(started)
            raise
        self._await_end(started)
        return code

    def kill(self) -> list[psutil.Process]:
        """Ends it with SIGKILL; gives the processes that it had started, which may still run."""
        started = self.descendants()
        self.http.close()
        self.process.kill()
        self.process.wait()
        return started

    def descendants(self) -> list[psutil.Process]:
        """Every process that it has started."""
        with suppress(psutil.NoSuchProcess):
            return cast(list[psutil.Process], psutil.Process(self.process.pid).children(True))
        return []

    @property
    def output(self) -> str:
        """All that it has written, on both streams and before every restart."""
        texts = [path.read_text(errors="replace") for path in (self._out, self._log)]
        return "".join(texts)

    def _await_end(self, processes: list[psutil.Process]) -> None:
        _, alive = psutil.wait_procs(processes, timeout=STOP_TIMEOUT)
        if alive:
            self._abandon(alive)
            raise RuntimeError(f"the server left processes behind: {alive}\n{self.output}")

    def _abandon(self, processes: list[psutil.Process]) -> None:
        self.process.kill()
        self.process.wait()
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()

    # Requests

    def get(self, path: str, **options: Any) -> Any:
        """The answer to a GET, which must succeed."""
        return succeeded(self.http.get(path, **options))

    def post(self, path: str, body: object = None) -> Any:
        """The answer to a POST of JSON, which must succeed."""
        return succeeded(self.http.post(path, json=body))

    def upload(self, content: bytes | Path, name: str = "data.jsonl") -> str:
        """The id of a new file."""
        data = content.read_bytes() if isinstance(content, Path) else content
        answer = self.http.post("/v1/files", files={"file": (name, data)}, data=PURPOSE)
        return str(succeeded(answer)["id"])

    def create_job(self, settings: Mapping[str, Any] = SETTINGS, **fields: Any) -> str:
        """The id of a new job, on a little of the bundled data if no other is given."""
        if "training_file" not in fields:
            fields = {
                "training_file": self.upload(TRAIN_ROWS),
                "validation_file": self.upload(VALID_ROWS),
                **fields,
            }
        body = {"model": self._model.stem, "fwdllm": dict(settings), **fields}
        return str(self.post("/v1/fine_tuning/jobs", body)["id"])

    def job(self, id: str) -> Any:
        """A job as it is now."""
        return self.get(f"/v1/fine_tuning/jobs/{id}")

    def events(self, id: str) -> list[Any]:
        """All events of a job, oldest first."""
        found = self.get(f"/v1/fine_tuning/jobs/{id}/events", params={"limit": 1000})
        assert not found["has_more"]
        return list(reversed(found["data"]))

    def step(self, id: str) -> int:
        """The last step of a job that its events tell of."""
        steps = [e["data"]["step"] for e in self.events(id) if e["data"]]
        return max(steps, default=0)

    def await_step(self, id: str, step: int) -> None:
        """Waits until a job has done this step, and wants it to go on."""
        deadline = time.monotonic() + JOB_TIMEOUT
        while self.step(id) < step:
            assert self.job(id)["status"] in ("queued", "running"), self.job(id)
            assert time.monotonic() < deadline, (self.job(id), self.output)
            time.sleep(0.02)

    def await_status(self, id: str, *status: str) -> Any:
        """Waits until a job has one of these statuses, and gives the job."""
        deadline = time.monotonic() + JOB_TIMEOUT
        while (job := self.job(id))["status"] not in status:
            assert job["status"] not in FINISHED, job
            assert time.monotonic() < deadline, (job, self.output)
            time.sleep(0.05)
        return job

    def result(self, id: str) -> bytes:
        """The adapter of a job, once it has succeeded."""
        return self.content(self.await_status(id, "succeeded")["adapter"])

    def content(self, adapter: str) -> bytes:
        """An adapter's GGUF file."""
        answer = self.http.get(f"/v1/adapters/{adapter}/content")
        assert answer.status_code == 200, answer.text
        return answer.content


PURPOSE = {"purpose": "fine-tune"}


def serve_command(state: Path, *options: object, model: Path = MODEL) -> list[str]:
    """The command line of a server on any free port."""
    command: Sequence[object] = [sys.executable, "-m", "fwdllm", "serve", model]
    return list(map(str, [*command, "--port", 0, "--state", state, *options]))


def succeeded(answer: httpx.Response) -> Any:
    """What an answer says, which must be a success."""
    assert answer.status_code == 200, f"{answer.request.url}: {answer.status_code} {answer.text}"
    return answer.json()


def error_of(answer: httpx.Response) -> Any:
    """The error in an answer, which must be one of the request and in OpenAI's shape."""
    assert 400 <= answer.status_code < 500, f"{answer.status_code} {answer.text}"
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"] and isinstance(error["message"], str)
    assert error["type"] and isinstance(error["type"], str)
    assert all(error[name] is None or isinstance(error[name], str) for name in ("param", "code"))
    return error


def adapter_of_tune(
    settings: Mapping[str, Any], folder: Path, *, seed: int = 0, data: Path, eval_data: Path
) -> bytes:
    """What ``fwdllm.tune`` makes with the settings of a job."""
    lora = LoRAConfig(settings["rank"], settings["alpha"])
    names = {field.name for field in dataclasses.fields(TrainConfig)} & set(settings)
    train = TrainConfig(**{name: settings[name] for name in names}, seed=seed)
    output = folder / "expected.gguf"
    tune(MODEL, data, output, lora=lora, train=train, eval_data=eval_data)
    return output.read_bytes()
