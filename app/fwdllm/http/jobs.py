"""The queue of tuning jobs: one runs at a time, each in its own worker process."""

from __future__ import annotations

import contextlib
import logging
import math
import subprocess
import sys
import threading
import time
from pathlib import Path

from fwdllm.http.store import (
    CANCELLED,
    PAUSED,
    QUEUED,
    RUNNING,
    UNFINISHED,
    Job,
    Store,
)
from fwdllm.http.worker import FULL_DISK, tidy

# How long a closing server waits for the current step to end and be saved. Then it kills the
# worker; the job will resume from its last checkpoint.
_CLOSE_SECONDS = 10.0
_POLL_SECONDS = 0.2
_RETRY_SECONDS = 5.0

log = logging.getLogger(__name__)


class Jobs:
    """Runs the queued jobs of a store, oldest first, in a thread, until ``close``.

    model: the file that jobs tune.  memory_budget: bytes for each worker.
    Jobs that were running when a server died are queued again; they resume from their last
    checkpoint.
    """

    def __init__(self, store: Store, folder: Path, model: Path, memory_budget: int) -> None:
        self._store, self._folder = store, folder.absolute()
        self._model, self._memory_budget = model.absolute(), memory_budget
        self._changed = threading.Event()
        self._deadline: float | None = None  # of a closing server
        self._full: int | None = None  # the job that met a full disk, until the store says so
        self._thread = threading.Thread(target=self._loop, name="jobs")
        self._thread.start()

    def close(self) -> None:
        """Let the running job save its state and stop; it resumes at the server's next start.

        Threads may close it at once.
        """
        self._deadline = self._deadline or time.monotonic() + _CLOSE_SECONDS
        self._changed.set()
        self._thread.join()

    def notice(self) -> None:
        """Look at the store again: a job was queued, cancelled, paused or resumed."""
        self._changed.set()

    def cancel(self, job: Job) -> bool:
        """End a job for good. False if it had ended already."""
        done = self._store.change_status(job.number, (QUEUED, RUNNING, PAUSED), CANCELLED)
        if done:
            self._store.add_event(job.number, "The job was cancelled", key="cancelled")
            self.notice()
        return done

    def pause(self, job: Job) -> bool:
        """Pause a job until ``resume``. False if it is neither queued nor running."""
        done = self._store.change_status(job.number, (QUEUED, RUNNING), PAUSED)
        if done:
            self._store.add_event(job.number, "The job was paused")
            self.notice()
        return done

    def resume(self, job: Job) -> bool:
        """Queue a paused job again. False if it was not paused."""
        done = self._store.change_status(job.number, (PAUSED,), QUEUED)
        if done:
            self._store.add_event(job.number, "The job is queued again")
            self.notice()
        return done

    def _loop(self) -> None:
        while self._deadline is None:
            try:
                self._step()
            except Exception:  # such as a full disk; the thread must survive it
                log.exception("the queue of jobs has a problem and tries again")
                self._changed.wait(_RETRY_SECONDS)

    def _step(self) -> None:
        if self._full is not None:  # the store may have no room for that either: tried again
            self._store.pause_full(self._full)
            self._full = None
        for job in self._store.jobs(RUNNING):  # left by a server that died
            self._store.change_status(job.number, (RUNNING,), QUEUED)
            self._store.add_event(job.number, "The job goes on where it was interrupted")
        queued = self._store.jobs(QUEUED)
        if queued and self._store.change_status(queued[-1].number, (QUEUED,), RUNNING):
            self._run(queued[-1].number)
        else:
            self._tidy()
            self._changed.wait()
            self._changed.clear()

    def _tidy(self) -> None:
        for job in self._store.jobs():
            if job.status not in UNFINISHED:
                tidy(self._folder, job.number)

    def _run(self, number: int) -> None:
        arguments = [str(self._folder), str(number), str(self._memory_budget), str(self._model)]
        process = subprocess.Popen(
            [sys.executable, "-m", "fwdllm.http.worker", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            # Python looks for modules in the working directory first, so use a folder of our own.
            cwd=self._folder,
        )
        with contextlib.suppress(BrokenPipeError), process:  # it may end while its stdin is closed
            told = False
            while process.poll() is None:
                self._changed.wait(_POLL_SECONDS)
                self._changed.clear()
                status = self._store.job_of_number(number).status
                closing = self._deadline is not None
                if status == CANCELLED or time.monotonic() > (self._deadline or math.inf):
                    process.kill()
                elif not told and (closing or status in (QUEUED, PAUSED)):
                    _tell_to_stop(process)
                    told = True
        if process.returncode == FULL_DISK:
            self._full = number
        elif process.returncode and self._deadline is None:
            self._store.fail_job(number, f"its process ended with {_reason(process.returncode)}")


def _tell_to_stop(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # the worker has just ended
        process.stdin.write("stop\n")
        process.stdin.flush()


def _reason(code: int) -> str:
    return f"signal {-code}" if code < 0 else f"exit code {code}"
