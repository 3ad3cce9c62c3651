"""The machine: what its processor is, and what was found out about it, kept in the user's cache."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any


def cache_file(name: str) -> Path:
    """Where answers are kept: in XDG_CACHE_HOME or ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "fwdllm" / name


def processor() -> dict[str, str]:
    """The processor's name and, where the system tells, the instructions it has ("flags")."""
    found = {"name": "", "flags": ""}
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = (part.strip() for part in line.partition(":"))
                if name == "model name":
                    found["name"] = value
                elif name in ("flags", "Features"):
                    found["flags"] = value
                elif not name:  # the end of the first processor; the others are like it
                    break
    except OSError:  # not Linux
        pass
    found["name"] = found["name"] or platform.processor() or platform.machine()
    return found


def remembered(name: str) -> dict[str, Any]:
    """All answers in a file of the cache; none if it is missing or damaged."""
    try:
        found = json.loads(cache_file(name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RuntimeError):  # RuntimeError: no home directory
        return {}
    return found if isinstance(found, dict) else {}


def remember(name: str, key: str, answer: object, n: int) -> None:
    """Add an answer to a file of the cache, which keeps the last n; if that fails, the next process
    finds out again."""
    answers = {**remembered(name), key: answer}
    try:
        path = cache_file(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            whole = Path(folder) / path.name  # so that nobody reads half of it
            whole.write_text(json.dumps(dict(list(answers.items())[-n:])))
            os.replace(whole, path)
    except (OSError, RuntimeError):
        pass
