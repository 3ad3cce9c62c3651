"""The process that computes for a warm node: it holds the model and the data, and has no network.

It is the node's child, and the two talk through a pipe without a name: there is no socket that
somebody else could open, no file and no key. It ends with the node, however that ends; if it dies
alone, as by a lack of memory, the node starts another and asks again.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from fwdllm.engine.errors import FwdllmError
from fwdllm.protocol.flower.messages import Saved, Settings, Task
from fwdllm.protocol.flower.node import Node, NodeConfig

# Deaths over one message after which the message is to blame.
_MAX_DEATHS = 2


class WorkerError(FwdllmError):
    """A message that the process did not survive."""


@dataclass(frozen=True)
class Answer:
    """report, saved: see ``Node.answer``.  fault: the error instead, as Flower words it."""

    report: bytes | None = None
    saved: Saved | None = None
    fault: str | None = None


class Worker:
    """Starts the process when it is first needed. pid: its number, None while there is none."""

    def __init__(self, config: NodeConfig) -> None:
        self._config = config
        self._process: Any = None
        self._pipe: Connection | None = None
        self._lock = threading.Lock()  # several nodes of a process may share it

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    def ask(self, run_config: Mapping[str, Any], task: Task, saved: Saved) -> Answer:
        """The answer to a message; see ``Node.answer``. Errors: WorkerError."""
        for _ in range(_MAX_DEATHS):
            with self._lock:
                try:
                    if self._pipe is None:
                        self._start()
                    assert self._pipe is not None
                    self._pipe.send((dict(run_config), task, saved))
                    found = self._pipe.recv()
                    assert isinstance(found, Answer)
                    return found
                except (EOFError, OSError):  # it was killed, now or since the last message
                    self.end()
        raise WorkerError(f"the process that computes died {_MAX_DEATHS} times over one message")

    def end(self) -> None:
        """End the process, if there is one, and with it what it holds in memory."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()  # it has nothing to lose
            self._process.join()
        self._process = self._pipe = None

    def _start(self) -> None:
        # A new interpreter: forked from a process with threads, kernels would wait for ever.
        context = multiprocessing.get_context("spawn")
        self._pipe, far = context.Pipe()
        try:
            self._process = context.Process(
                target=_serve, args=(far, self._config), name="fwdllm worker", daemon=True
            )
            self._process.start()
        finally:
            far.close()  # else there would be no end of file when the process dies


def _serve(pipe: Connection, config: NodeConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the node, which ends this
    threading.Thread(target=_end_with_node, daemon=True).start()
    node = Node(config)
    while True:
        try:
            run_config, task, saved = pipe.recv()
        except EOFError:
            return
        try:
            answer = Answer(*node.answer(Settings.of(run_config), task, saved))
        except Exception as error:
            answer = Answer(fault=f"{type(error)}:<'{error}'>")
            if not isinstance(error, FwdllmError):  # then it may have left anything behind
                node = Node(config)
        pipe.send(answer)


def _end_with_node() -> None:
    """End this process when the node's has ended, in the middle of a pass, too."""
    node = multiprocessing.parent_process()
    assert node is not None
    node.join()
    os._exit(1)
