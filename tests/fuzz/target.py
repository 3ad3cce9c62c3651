"""What can be fuzzed: a target writes an input made of a random seed, and checks one."""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from fwdllm.cli.console import explain

OK, REFUSED = "ok", "refused"


class Row(NamedTuple):
    """What came of a part of a case. ended: OK, REFUSED, or what is wrong."""

    what: str
    ended: str
    seconds: float = 0.0
    peak: int = 0
    output: str = ""

    @property
    def failed(self) -> bool:
        """Whether this is a bug."""
        return self.ended not in (OK, REFUSED)


@dataclass(frozen=True)
class Target:
    """Something that inputs are thrown at.

    make: writes files that all cases use into a folder; it must compute nothing in this process.
    write: writes an input made of a random seed into a case's folder, with what it needs from the
    first folder; returns the kind of the input.  open: a context that is entered once in a child,
    before its cases.  check: what comes of the input in a folder; it may raise anything, and die.
    seconds: of computing that a case may take.  chunk: cases one after another in a child: about as
    long for every target, which take turns.
    """

    make: Callable[[Path], None]
    write: Callable[[Random, Path, Path], str]
    check: Callable[[Any, Path], list[Row]]
    open: Callable[[Path], AbstractContextManager[Any]] = lambda folder: nullcontext()
    seconds: float = 10.0
    chunk: int = 200


def refused_or_ok(what: str, work: Callable[[], object]) -> Row:
    """What comes of some work: an error with a sentence is a refusal, another one a bug."""
    try:
        work()
    except Exception as error:
        if explain(error) is None or isinstance(error, MemoryError):
            return Row(what, "traceback", output=traceback.format_exc())
        return Row(what, REFUSED)
    return Row(what, OK)


@contextmanager
def without_warnings(_folder: Path) -> Iterator[None]:
    """What a target opens that says much on standard error."""
    warnings.simplefilter("ignore")
    yield
