"""A process for work on what may be hostile: it may hang, grow without bound or die, and we go on.

It answers one request after another; a request and its answer are lines of JSON. Where the system
can fork, each request may have a process of its own that begins with everything imported.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable
from importlib import import_module
from typing import IO, Any

# With our search path, so that it finds the packages that we would.
_MAIN = (
    "import sys; sys.path[:] = sys.argv[3:]; from fwdllm.engine import child; "
    "child.main(sys.argv[1], sys.argv[2] == 'True')"
)
# A process that has nothing to do ends, and is started again when it is needed (0.2 to 0.5 s).
_IDLE_SECONDS = 30
# Processors are shared: a request may wait this many times as long as it may compute.
_WAIT_FACTOR = 3
# How often a process looks at the memory it uses.
_LOOK_SECONDS = 0.02
_FOLDERS = re.compile(r"(?<!\S)/\S*/")
# Forked processes of a program on macOS may not use its system's libraries for computing.
FORKS = sys.platform == "linux"


class ChildError(Exception):
    """The process could not finish a request, by its own words or by how it ended.

    died: whether it died or had to be ended.
    """

    def __init__(self, reason: str, died: bool) -> None:
        super().__init__(reason)
        self.died = died


class Child:
    """A process that runs one function for each request.

    target: "module:function"; the function takes and returns what JSON can hold.  forks: whether
    each request has a process of its own, where the system can fork; what then dies is only that.
    """

    def __init__(self, target: str, forks: bool = False) -> None:
        self._arguments = [target, str(forks and FORKS)]
        self._lock = threading.Lock()
        self._running: _Running | None = None

    def ask(self, request: object, seconds: float, memory: int = 0) -> Any:
        """The function's answer to a request.

        seconds: of computing; waiting for processors may take three times as long.  memory: bytes
        beyond those that the process needs for itself (0: as many as it likes).
        Errors: ChildError, OSError if no process can be started here.
        """
        line = json.dumps([seconds, memory, request]).encode() + b"\n"
        with self._lock:
            for again in (True, False):
                running = self._started()
                try:
                    return running.answer(line, seconds * _WAIT_FACTOR)
                except _NothingRead:  # it has ended for want of work
                    self._running = None
                    if not again:
                        raise ChildError("the process for it ends at once", True) from None
                except ChildError as error:
                    if error.died:
                        self._running = None
                    raise
        raise AssertionError

    def _started(self) -> _Running:
        # After a fork of ours the process belongs to the parent.
        if self._running is None or self._running.owner != os.getpid():
            self._running = _Running(self._arguments)
        return self._running


class _NothingRead(Exception):
    """The process ended before it read a request."""


class _Running:
    """The process while it runs. owner: the process that started it."""

    def __init__(self, arguments: list[str]) -> None:
        if not sys.executable or getattr(sys, "frozen", False):
            raise OSError("this program is not Python's")  # it would start itself
        self.owner = os.getpid()
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the process)
        self._process = subprocess.Popen(
            [sys.executable, "-c", _MAIN, *arguments, *map(str, sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            # llama.cpp would start a debugger before it aborts.
            env={**os.environ, "GGML_NO_BACKTRACE": "1"},
            start_new_session=True,  # the keyboard's interrupt is for us
        )
        weakref.finalize(self, _end, self.owner, self._process, self._said)

    def answer(self, line: bytes, seconds: float) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        before = os.fstat(self._said.fileno()).st_size
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise _NothingRead from None
        late = threading.Event()

        def end() -> None:
            late.set()
            _kill(self._process)

        if os.name == "posix":
            if not _readable(self._process.stdout, seconds):
                end()
            answered = self._process.stdout.readline()
        else:  # which can wait for sockets only; a thread takes longer than most answers
            timer = threading.Timer(seconds, end)
            timer.start()
            answered = self._process.stdout.readline()
            timer.cancel()
        if answered.endswith(b"\n"):
            kind, answer = json.loads(answered)
            if kind == "answer":
                return answer
            if kind == "error":
                raise ChildError(answer, False)
            code, died = answer, False
        else:
            code, died = self._process.wait(), True
            if code == 0:
                raise _NothingRead
        if late.is_set():
            raise ChildError(f"it has not ended after {seconds:.0f} s", True)
        raise ChildError(self._cause(code, before), died)

    def _cause(self, code: int, before: int) -> str:
        """What the process died of, with its last words."""
        if code == -_signal("SIGPROF"):
            return "it computes without end"
        self._said.seek(before)
        words = [
            text for raw in self._said.read(1 << 20).splitlines()
            if (text := raw.decode("utf-8", "replace").strip())
        ]  # fmt: skip
        if code == _TOO_LARGE:
            return words[-1]
        how = f"exit code {code}"
        if code < 0:
            how = signal.strsignal(-code) or f"signal {-code}"
        # A file of llama.cpp's source is named with its place on the machine that built it.
        last = f": {_FOLDERS.sub('', words[-1])[:300]}" if words else ""
        return f"it ends with {how}{last}"


def main(target: str, forks: bool) -> None:
    """What the process does: answer the requests of standard input until there are no more."""
    leave_no_core()
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # what libraries print is no answer
    module, _, name = target.partition(":")
    function = getattr(import_module(module), name)
    used = _address_space()
    while (line := _next_line()) is not None:
        seconds, memory, request = json.loads(line)
        if not forks:
            _limit_memory(used + memory if used and memory else 0)
            print(_answer(function, request, seconds), file=answers, flush=True)
            continue
        if (child := os.fork()) == 0:
            if memory:
                threading.Thread(target=_watch, args=(memory,), daemon=True).start()
            print(_answer(function, request, seconds), file=answers, flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            code = os.waitstatus_to_exitcode(status)
            print(json.dumps(["died", code]), file=answers, flush=True)


def _answer(function: Callable[[Any], Any], request: Any, seconds: float) -> str:
    timer = getattr(signal, "ITIMER_PROF", None)
    if timer is not None:  # not on Windows
        # The signal ends the process, whatever it is doing.
        signal.setitimer(timer, seconds)
    try:
        answer = ["answer", function(request)]
    except MemoryError:
        answer = ["error", "it needs too much memory"]
    except Exception as error:  # foreign programs can raise anything
        answer = ["error", str(error)[:1000] or type(error).__name__]
    finally:
        if timer is not None:
            signal.setitimer(timer, 0)
    return json.dumps(answer)


def _next_line() -> str | None:
    if os.name == "posix" and not _readable(sys.stdin, _IDLE_SECONDS):
        return None
    return sys.stdin.readline() or None


def _readable(pipe: Any, seconds: float) -> bool:
    """Whether a pipe has something to read, or its end, within a time."""
    waiting = select.poll()  # select() refuses the large descriptors of a busy server
    waiting.register(pipe, select.POLLIN)
    return bool(waiting.poll(seconds * 1000))


_TOO_LARGE = 3  # exit code


def _watch(memory: int) -> None:
    """End this process when it uses too much. Address space would be the wrong measure: drivers of
    GPUs reserve more than there is memory."""
    import resource
    import time

    unit = 1 if sys.platform == "darwin" else 1024
    limit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit + memory
    while resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit <= limit:
        time.sleep(_LOOK_SECONDS)
    os.write(2, b"\nit needs too much memory\n")
    os._exit(_TOO_LARGE)


def _address_space() -> int:
    """Bytes of address space in use; 0 where the system does not tell."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[0]) * resource.getpagesize()
    return 0


def _limit_memory(limit: int) -> None:
    """Let allocations fail beyond a limit of address space, where the system can (Linux)."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit or most, most))


def leave_no_core() -> None:
    """Turn off core dumps: a crash is expected here, and the memory is of no use."""
    with contextlib.suppress(ImportError):  # not Unix
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _signal(name: str) -> int:
    return int(getattr(signal, name, 0))


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)  # with what it has forked
        else:
            process.kill()


def _end(owner: int, process: subprocess.Popen[bytes], said: IO[bytes]) -> None:
    if owner == os.getpid():
        _kill(process)
        process.wait()
    for pipe in (process.stdin, process.stdout, said):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
