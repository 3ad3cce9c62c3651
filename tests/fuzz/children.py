"""Work in forked children that may die: how they end, in what time and memory.

A fork starts in milliseconds with all that its parent has imported. The parent must have computed
nothing: threads of its libraries would be missing in the child.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import os
import resource
import select
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# How often a child's memory is looked at.
_WATCH_SECONDS = 0.05
# For the machine's sake: memory that was asked for, used or not, beyond what is looked at.
_ADDRESSES = 16 << 30


@dataclass(frozen=True)
class Ended:
    """How a child ended. code: None if it was killed.  signal: what killed it, or None.

    late, large: whether that was for its time or memory.  seconds: of the clock.  peak: resident
    bytes, its own children's too.  output: both streams.
    """

    code: int | None
    signal: int | None
    late: bool
    large: bool
    seconds: float
    peak: int
    output: str

    @property
    def fault(self) -> str | None:
        """What is wrong with this end, if anything is: only 0 and 2 are ends without a bug."""
        if self.late:
            return "hang"
        if self.large:
            return "memory"
        if self.signal is not None:
            return signal.Signals(self.signal).name
        if "Traceback (most recent call last)" in self.output or "Exception ignored" in self.output:
            return "traceback"
        if self.code not in (0, 2):
            return f"exit code {self.code}"
        if self.code == 2 and not self.output.strip():
            return "nothing said"
        return None


def run(work: Callable[[], int], log: Path, seconds: float, memory: int) -> Ended:
    """Do some work in a child whose exit code it returns.

    log: a file for its output.  seconds: it may take.  memory: bytes it may use beyond what it has
    of its parent.
    """
    began = time.monotonic()
    # The child waits until its first memory is known: it has less than its parent, whose pages of
    # files it does not get before it reads them.
    waiting, measured = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(measured)
        os.read(waiting, 1)
        os.close(waiting)
        _child(work, log)
    limit = memory + resident(pid)
    os.close(waiting)
    os.close(measured)
    late = large = False
    with _ended(pid) as ended:
        while not ended(_WATCH_SECONDS):
            late = time.monotonic() - began > seconds
            large = resident(pid) > limit
            if late or large:
                kill(pid)
                break
        _, status, used = os.wait4(pid, 0)
    kill(pid)  # what it has started
    peak = used.ru_maxrss * 1024
    code = os.waitstatus_to_exitcode(status)
    return Ended(
        code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        late=late,
        large=large or peak > limit,
        seconds=time.monotonic() - began,
        peak=peak,
        output=log.read_text(errors="replace"),
    )


def _child(work: Callable[[], int], log: Path) -> None:
    code = 1
    for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
        finalizer.atexit = False  # the parent's files are its own to remove
    try:
        isolate(log)
        code = work()
        atexit._run_exitfuncs()  # as at a process's end, where llama.cpp's memory is freed
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def isolate(log: Path) -> None:
    """Make this process the first of a group, without core dumps, with its output in a file."""
    os.setsid()
    faulthandler.disable()  # deaths are expected
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES, _ADDRESSES))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, target in ((nothing, 0), (file, 1), (file, 2)):
        os.dup2(number, target)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__


def kill(pid: int) -> None:
    """End a child and the processes it has started."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def resident(pid: int) -> int:
    """Bytes of memory that a process has; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except (OSError, IndexError):
        return 0


def processor_seconds(pid: int) -> float:
    """Time a process has computed; 0 once it has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def _ended(pid: int) -> Iterator[Callable[[float], bool]]:
    """A function that waits for a child's end at most so many seconds, and says if it has come."""
    handle = os.pidfd_open(pid)
    try:
        yield lambda seconds: bool(select.select([handle], [], [], seconds)[0])
    finally:
        os.close(handle)
