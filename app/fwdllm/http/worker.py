"""The process that runs one tuning job.

    python -m fwdllm.http.worker FOLDER NUMBER MEMORY_BUDGET MODEL

It reads the job from the store and writes events, checkpoints and the result there. The run's
state is on disk as with ``fwdllm tune``, so the worker may be killed at any moment and started
again. The line "stop" on standard input makes it save its state and exit. The end of standard input
means that the server has died; then the worker exits at once.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import re
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fwdllm.cli.console import explain
from fwdllm.engine.backends import choose
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import atomic_write, lock
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.settings import DirectionsConfig, LoRAConfig
from fwdllm.http.adapter_bytes import to_bytes
from fwdllm.http.database import RUNS
from fwdllm.http.store import Job, Store
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import CheckpointDue, EvalResult, StepResult
from fwdllm.tuning.tune import Progress, Started, tune

# OpenAI keeps the same number.
MAX_CHECKPOINTS = 3

# The exit code if the disk is full: the store may be on it, and cannot be told.
FULL_DISK = 28

# How long to wait for the worker of a dead server to exit: milliseconds, or a large model's step.
_LOCK_SECONDS = 600.0


def work_folder(folder: Path, number: int) -> Path:
    """The folder of a job's data and run."""
    return folder / RUNS / str(number)


def run_folder(folder: Path, number: int) -> Path:
    """The run directory of a job, see ``fwdllm.tuning.run_directory``."""
    return work_folder(folder, number) / "run"


def tidy(folder: Path, number: int) -> None:
    """Delete files that an ended job no longer needs; its configuration and metrics stay."""
    work = work_folder(folder, number)
    if not (work / "training.jsonl").exists():
        return
    shutil.rmtree(run_folder(folder, number) / "checkpoints", ignore_errors=True)
    for path in (work / "adapter.gguf", work / "validation.jsonl", work / "training.jsonl"):
        path.unlink(missing_ok=True)


def model_name(job: Job) -> str:
    """The model name of a job's result, in OpenAI's format.

    As there, what cannot stand in a name becomes a hyphen: "my model" makes "my-model".
    """
    suffix = re.sub(r"[^A-Za-z0-9_.-]+", "-", job.request["suffix"])
    return f"ft:{job.request['model']}:{suffix}:{job.id[-8:]}"


def settings(request: Mapping[str, Any]) -> tuple[LoRAConfig, TrainConfig, DirectionsConfig]:
    """The settings of a job, from the JSON values of its request."""
    lora = {**request["lora"], "targets": tuple(request["lora"]["targets"])}
    if lora["layers"] is not None:
        lora["layers"] = tuple(lora["layers"])
    return LoRAConfig(**lora), TrainConfig.from_recorded(request["train"]), directions_of(request)


def directions_of(request: Mapping[str, Any]) -> DirectionsConfig:
    """The directions of a job; requests of version 0.1.0 have only their kind."""
    known = request.get("directions") or {"kind": request["kind"]}
    return DirectionsConfig(**known)


def main(arguments: list[str]) -> None:
    """Run the job; its outcome is written to the store, or is the exit code ``FULL_DISK``."""
    folder, number = Path(arguments[0]), int(arguments[1])
    budget, model = int(arguments[2]), Path(arguments[3])
    # Ctrl-C is for the server, which then stops its worker. A separate session would also keep
    # Ctrl-C away, but Linux gives sessions equal CPU shares, whatever the priority.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    lower_priority()
    stop = _obey(sys.stdin)
    with contextlib.closing(Store(folder)) as store, _only_worker(folder):
        job = store.job_of_number(number)
        try:
            _work(store, folder, job, model, budget, stop)
        except KeyboardInterrupt:  # told to stop before anything was worth saving
            pass
        except Exception as error:
            if is_full_disk(error):
                sys.exit(FULL_DISK)
            store.fail_job(number, explain(error) or f"{type(error).__name__}: {error}")
            if explain(error) is None:
                raise


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error, or what it comes from, is that nothing more can be written."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        # SQLite has a code of its own for a full disk, and none for a quota.
        if isinstance(error, sqlite3.Error) and (
            "disk is full" in str(error)
            or getattr(error, "sqlite_errorname", "") == "SQLITE_IOERR_WRITE"
        ):
            return True
        error = error.__cause__ or error.__context__
    return False


def lower_priority() -> None:
    """Lower this process's CPU priority, so that the server's answers come first."""
    with contextlib.suppress(AttributeError, OSError):
        os.nice(19)


def _obey(lines: Any) -> threading.Event:
    stop = threading.Event()

    def follow() -> None:
        for line in lines:
            if line.strip() == "stop":
                stop.set()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    return stop


@contextlib.contextmanager
def _only_worker(folder: Path) -> Iterator[None]:
    """A context entered when the worker of an earlier server has exited."""
    deadline = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            held = lock(folder / "worker.lock")
            break
        except ConfigError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    with contextlib.closing(held):
        yield


def _work(
    store: Store, folder: Path, job: Job, model: Path, budget: int, stop: threading.Event
) -> None:
    work = work_folder(folder, job.number)
    work.mkdir(parents=True, exist_ok=True)
    run = run_folder(folder, job.number)
    lora, train, directions = settings(job.request)
    validation = None
    if job.validation is not None:
        validation = _data(store, job.validation, work / "validation.jsonl")
    result = tune(
        model,
        _data(store, job.training, work / "training.jsonl"),
        work / "adapter.gguf",
        lora=lora,
        train=train,
        directions=directions,
        eval_data=validation,
        run_dir=run,
        resume=(run / "config.json").exists(),
        memory_budget=budget if choose(GGUFFile.open(model)).own else None,
        on_event=_Follower(store, job, train.steps),
        should_stop=stop.is_set,
    )
    if result.stopped_early:
        return
    adapter = store.add_adapter(
        model_name(job), result.adapter.read_bytes(), result.n_trainable, job=job.number
    )
    if not store.finish_job(job.number, adapter):
        store.delete_adapter(adapter.number)  # cancelled at the last moment


def _data(store: Store, number: int, path: Path) -> Path:
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_bytes(store.file_content(number))
    return path


class _Follower:
    """Writes the events of a run to the store."""

    def __init__(self, store: Store, job: Job, steps: int) -> None:
        self.store, self.job, self.steps = store, job, steps
        self._engine: Engine | None = None

    def __call__(self, event: Progress) -> None:
        if isinstance(event, Started):
            self._engine = event.engine
            self._started(event)
        elif isinstance(event, StepResult):
            message = f"Step {event.step}/{self.steps}: training loss={event.loss:.4f}"
            loss = event.loss if math.isfinite(event.loss) else None
            data = {"train_loss": loss, "n_tokens": event.n_tokens}
            self._metric(event.step, "step", message, data)
        elif isinstance(event, EvalResult):
            message = f"Step {event.step}/{self.steps}: held-out loss={event.loss:.4f}"
            data = {"valid_loss": event.loss, "full_valid_loss": event.loss}
            if event.accuracy is not None:
                message += f", accuracy={event.accuracy:.1%}"
                data["valid_accuracy"] = event.accuracy
            self._metric(event.step, "eval", message, data)
        else:
            self._checkpoint(event)

    def _started(self, event: Started) -> None:
        if event.step:
            self._say(f"Going on after step {event.step} of {event.steps}")
        else:
            text = f"Training on {event.n_examples} examples, {event.n_held_out} held out"
            self._say(text, key="started")

    def _checkpoint(self, event: CheckpointDue) -> None:
        assert self._engine is not None and self._engine.adapter is not None
        adapter = self._engine.adapter
        name = f"{model_name(self.job)}:ckpt-step-{event.step}"
        content, n = to_bytes(adapter), adapter.theta.size
        self.store.add_adapter(name, content, n, job=self.job.number, step=event.step)
        for old in self.store.checkpoints(self.job.number)[MAX_CHECKPOINTS:]:
            self.store.delete_adapter(old.number)

    def _metric(self, step: int, kind: str, message: str, data: dict[str, Any]) -> None:
        data = {"step": step, "total_steps": self.steps, **data}
        self.store.add_event(self.job.number, message, key=f"{kind} {step}", data=data)

    def _say(self, message: str, key: str | None = None) -> None:
        self.store.add_event(self.job.number, message, key=key)


if __name__ == "__main__":
    main(sys.argv[1:])
