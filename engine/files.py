"""Writing files so that a crash or a full disk never leaves half a file behind."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from fwdllm.engine.errors import ConfigError

# A file name may have 255 bytes on common file systems, and one character up to four.
MAX_NAME_CHARACTERS = 40


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step.

    The caller creates and closes the temporary file. On any exception the temporary file is
    removed and ``path`` is as it was. A reader sees the old content or the new, never a mix.

    Raises ConfigError, before anything is written, if the folder is missing or ``path`` is a
    folder. An OSError, such as a full disk, passes through.
    """
    path = Path(path)
    check_destination(path)
    unique = f"{os.getpid()}-{secrets.token_hex(4)}"
    temporary = path.parent / f".{path.name[:MAX_NAME_CHARACTERS]}.tmp{unique}"
    try:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except BaseException:
        # The first failure is the one to report, not that of the cleaning up.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def check_destination(path: Path) -> None:
    """Raise ConfigError, as ``atomic_write`` would, if no file can be written at ``path``."""
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: the folder {path.parent} does not exist")


def _flush(path: Path) -> None:
    # Without this a power cut after the rename could leave a file of the right name, empty.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
