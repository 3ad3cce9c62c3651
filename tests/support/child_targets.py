"""Functions that a process of its own runs, of which most end badly."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from typing import Any

_kept: list[Any] = []


def echo(request: Any) -> Any:
    return request


def number(_request: Any) -> int:
    return os.getpid()


def do(request: str) -> str | None:
    if request == "loop":
        while True:
            pass
    if request == "sleep":
        time.sleep(600)
    if request == "grow":
        _kept.append(bytes(400 << 20))
    if request == "keep growing":
        while True:
            _kept.append(b"x" * (16 << 20))
    if request == "segfault":
        ctypes.string_at(0)
    if request == "abort":
        os.write(2, b"at first\n/a/folder/file.c:7: it is odd\n")
        os.abort()
    if request == "raise":
        raise ValueError("the reason")
    if request == "print":
        print("not an answer")
    if request == "end later":
        threading.Timer(0.1, os._exit, [0]).start()
    return request
