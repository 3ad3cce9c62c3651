"""Files: atomic writes, locks, transactions and fingerprints."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from fwdllm.engine.errors import ConfigError

# A file name may have 255 bytes on common file systems, and one character up to four.
MAX_NAME_CHARACTERS = 40
# Bytes at either end of a model file that identify it: its header, and the last tensors.
_FINGERPRINT_BYTES = 1 << 20


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


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read; otherwise as ``atomic_write``."""
    with atomic_write(path) as temporary:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with open(descriptor, "wb") as file:
            file.write(data)


def check_destination(path: Path) -> None:
    """Raise ConfigError, as ``atomic_write`` would, if no file can be written at ``path``."""
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: the folder {path.parent} does not exist")


def is_unused(folder: Path, *beginnings: str) -> bool:
    """Whether a folder has only what a process leaves behind when it dies at its start.

    That is files whose names start with one of ``beginnings``, and empty folders.
    """
    return all(
        path.name.startswith(beginnings) or (path.is_dir() and not any(path.iterdir()))
        for path in folder.iterdir()
    )


def lock(path: Path) -> sqlite3.Connection:
    """Lock ``path`` until the connection is closed or the process ends, however it ends.

    SQLite is used for its file lock alone: the standard library has no other that works the
    same on every system.
    """
    with contextlib.ExitStack() as stack:
        try:
            connection = sqlite3.connect(
                path, timeout=0, isolation_level=None, check_same_thread=False
            )
            stack.callback(connection.close)
            connection.execute("PRAGMA journal_mode=MEMORY")  # no second file beside the lock
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if "locked" in str(error):
                raise ConfigError(f"{path.parent} is in use by another process") from error
            raise ConfigError(f"cannot lock {path}: {error}") from error
        stack.pop_all()
        return connection


@contextlib.contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    """Commit all that is written inside this context at its end, or on an exception none of it.

    connection: with ``isolation_level=None``. A transaction within another one is part of it.
    """
    if connection.in_transaction:
        yield connection
        return
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield connection
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # a full disk may have rolled back already
            connection.execute("ROLLBACK")
        raise


def fingerprint(*paths: Path) -> dict[str, int | str]:
    """Identifies a model without reading all of it: its size and a hash of its files' ends.

    paths: all files of the model, in order, see ``GGUFFile.paths``.
    """
    size, digest = 0, hashlib.sha256()
    for path in paths:
        n_bytes = path.stat().st_size
        with open(path, "rb") as file:
            digest.update(file.read(_FINGERPRINT_BYTES))
            file.seek(max(0, n_bytes - _FINGERPRINT_BYTES))
            digest.update(file.read(_FINGERPRINT_BYTES))
        size += n_bytes
    return {"bytes": size, "sha256_of_ends": digest.hexdigest()}


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _flush(path: Path) -> None:
    # Without this a power cut after the rename could leave a file of the right name, empty.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
