"""Files: atomic writes, locks, transactions and fingerprints."""

from __future__ import annotations

import contextlib
import functools
import glob
import hashlib
import os
import re
import secrets
import shutil
import sqlite3
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from fwdllm.engine.errors import ConfigError

if sys.platform != "win32":
    import fcntl

# A file name may have 255 bytes on common file systems, and one character up to four.
MAX_NAME_CHARACTERS = 40
_FOLDERS = "fwdllm-"
# Seconds after which a temporary file or folder without a holder was left by a process that died.
# Folders are locked only after they are made. Windows has no lock that a file can be renamed under.
_NEW_FOLDER, _LONG_AGO = 60, 86_400
# Bytes at either end of a model file that identify it: its header, and the last tensors.
_FINGERPRINT_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it replaces ``path`` in one step.

    The caller fills and closes the temporary file, which is there and empty. On any exception it is
    removed and ``path`` is as it was. A reader sees the old content or the new, never a mix. What
    processes that were killed left of earlier attempts is removed.

    Raises ConfigError, before anything is written, if the folder is missing or ``path`` is a
    folder or read-only. An OSError, such as a full disk, passes through.
    """
    path = Path(path)
    _check_place(path)
    _remove_leftovers(path)
    with _temporary_beside(path) as temporary:
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read; otherwise as ``atomic_write``.

    On return it is on disk under its name: a power cut does not lose it.
    """
    with atomic_write(path) as temporary:
        temporary.chmod(0o600)
        temporary.write_bytes(data)
    _flush_folder(path.parent)


def check_destination(path: Path) -> None:
    """Raise ConfigError if ``atomic_write`` could write no file at ``path``, of any size."""
    _check_place(path)
    _remove_leftovers(path)
    try:
        with _temporary_beside(path) as temporary:
            temporary.unlink()
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"cannot write {path}: it is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"cannot write {path}: the folder {path.parent} does not exist")
    # The mode, too, as root may write to every file: one that is read-only is so by intention.
    if path.exists() and not (os.access(path, os.W_OK) and path.stat().st_mode & 0o222):
        raise ConfigError(f"cannot write {path}: it is read-only")


def _beginning(path: Path) -> str:
    return f".{path.name[:MAX_NAME_CHARACTERS]}.tmp"


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A new empty file, locked where the system allows that; removed if it is still there."""
    temporary = path.with_name(f"{_beginning(path)}{os.getpid()}-{secrets.token_hex(4)}")
    with open(temporary, "xb") as file:
        try:
            if sys.platform != "win32":
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                file.close()  # it could not be renamed
            yield temporary
        finally:
            # The first failure is the one to report, not that of the cleaning up.
            with contextlib.suppress(OSError):
                temporary.unlink()


def _remove_leftovers(path: Path) -> None:
    """Remove temporary files for ``path`` whose processes are gone, with what SQLite put beside."""
    name = re.compile(re.escape(_beginning(path)) + r"[0-9]+-[0-9a-f]{8}")
    with contextlib.suppress(OSError):
        for found in [e for e in os.scandir(path.parent) if name.fullmatch(e.name)]:
            with contextlib.suppress(OSError):
                if found.is_file(follow_symlinks=False) and _is_abandoned(found.path):
                    for beside in glob.glob(f"{glob.escape(found.path)}-*"):
                        os.unlink(beside)
                    os.unlink(found.path)


def _is_abandoned(path: str) -> bool:
    age = time.time() - os.stat(path).st_mtime
    if sys.platform == "win32":
        return age > _LONG_AGO
    with open(path, "rb+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return age > 1  # else it may have been made just now, and be locked next


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder in the system's place for temporary files, removed at the end.

    Those that this user's killed processes left are removed, too.
    """
    _remove_folders()
    with tempfile.TemporaryDirectory(prefix=_FOLDERS) as name:
        folder = Path(name)
        with contextlib.closing(lock(folder / "lock")):
            yield folder


@functools.cache  # once in a process
def _remove_folders() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDERS}*"):
        held = folder / "lock"
        with contextlib.suppress(OSError, ConfigError):
            facts = folder.lstat()
            owned = stat.S_ISDIR(facts.st_mode) and facts.st_uid == getattr(os, "getuid", int)()
            if owned and held.is_file() and time.time() - held.stat().st_mtime > _NEW_FOLDER:
                lock(held).close()
                shutil.rmtree(folder, ignore_errors=True)


def identity(path: Path) -> tuple[int, int]:
    """What stays the same of a file for as long as it is there and open."""
    facts = path.stat()
    return facts.st_dev, facts.st_ino


def check_still_there(path: Path, known: tuple[int, int]) -> None:
    """ConfigError if the file with this ``identity`` is no longer at ``path``."""
    with contextlib.suppress(OSError):
        if identity(path) == known:
            return
    raise ConfigError(
        f"{path.parent} was deleted or replaced while a run was using it, so that nothing more is "
        "written there"
    )


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


def _flush_folder(path: Path) -> None:
    if sys.platform == "win32":  # it has no such call
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _flush(path: Path) -> None:
    # Without this a power cut after the rename could leave a file of the right name, empty.
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
