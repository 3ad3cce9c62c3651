"""What the system tells about memory: the process's own, what is free, what a container allows."""

from __future__ import annotations

import re
from pathlib import Path

# Measured after ``Engine.load``: pages of Python, NumPy and llama.cpp, without and with their data.
_LIBRARY_BYTES, _PROCESS_BYTES = 60 * 2**20, 150 * 2**20


def resident_bytes() -> int:
    """Bytes this process has resident: all but pages of files, plus an estimate for its libraries.

    If the system does not tell, an estimate for Python with NumPy and llama.cpp loaded.
    """
    own = _kibibytes(Path("/proc/self/status"), "RssAnon")
    return _PROCESS_BYTES if own is None else own + _LIBRARY_BYTES


def available_bytes() -> int | None:
    """Bytes that a process can get before the system swaps; None if the system does not tell."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def limit_bytes() -> int | None:
    """Bytes that a container, as a control group of version 2, allows; None without a limit."""
    return _number(Path("/sys/fs/cgroup/memory.max"), r"(\d+)\s*")  # "max" is no limit


def _kibibytes(path: Path, name: str) -> int | None:
    found = _number(path, rf"{name}:\s+(\d+) kB")
    return None if found is None else found * 1024


def _number(path: Path, pattern: str) -> int | None:
    try:
        found = re.search(pattern, path.read_text())
    except OSError:
        return None
    return int(found[1]) if found else None
