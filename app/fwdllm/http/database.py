"""The SQLite file of the server: its tables, and the class that runs all queries."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fwdllm.engine.errors import FwdllmError
from fwdllm.engine.files import transaction
from fwdllm.engine.sqlite import ERRORS

FORMAT = 1
# The folder of the jobs' runs, beside the file.
RUNS = "jobs"
_TABLES = {"meta", "file", "job", "event", "adapter"}

# Long enough for the other process to write an adapter of about 100 MB.
_BUSY_SECONDS = 30.0

_SCHEMA = f"""
CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 0), model TEXT NOT NULL);
CREATE TABLE file (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    filename TEXT NOT NULL, purpose TEXT NOT NULL, kind TEXT NOT NULL,
    n_examples INTEGER NOT NULL, content BLOB NOT NULL
);
CREATE TABLE job (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    started REAL, finished REAL, status TEXT NOT NULL, request TEXT NOT NULL,
    training INTEGER NOT NULL, validation INTEGER, adapter INTEGER,
    trained_tokens INTEGER, error TEXT
);
CREATE TABLE event (
    number INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL, created REAL NOT NULL,
    key TEXT, level TEXT NOT NULL, message TEXT NOT NULL, data TEXT, UNIQUE (job, key)
);
CREATE INDEX event_of_job ON event (job, number);
CREATE TABLE adapter (
    number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created REAL NOT NULL,
    model TEXT NOT NULL UNIQUE, job INTEGER, step INTEGER, version INTEGER NOT NULL,
    n_parameters INTEGER NOT NULL, content BLOB NOT NULL
);
PRAGMA user_version = {FORMAT};
"""


class StoreError(FwdllmError):
    """A store that is damaged, of another format, in use, or cannot be written."""


class Database:
    """An open database file. Threads may share it. Errors of all methods: StoreError.

    Reads use a second connection: with a write-ahead log they never wait for a writer.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing, self._reading = threading.RLock(), threading.Lock()
        with self._errors():
            if not path.exists():  # mode 0600: it holds users' uploads
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            self._writer, self._reader = _connect(path), _connect(path)
            with self.transaction() as db:
                [(version,)] = db.execute("PRAGMA user_version").fetchall()
                found = db.execute("SELECT name FROM sqlite_master").fetchall()
                tables = {name for (name,) in found}
                if version == 0:  # none yet, or a crash before the first transaction
                    _check_new(path, tables)
                    for statement in _SCHEMA.split(";"):
                        db.execute(statement)
                elif version != FORMAT:
                    raise StoreError(f"{path} is of another version of fwdllm: {version}")
                elif not tables >= _TABLES:
                    raise StoreError(f"{path} is not a store of fwdllm")

    def close(self) -> None:
        """Release the file."""
        self._reader.close()
        self._writer.close()

    def all(self, query: str, *values: Any) -> list[Any]:
        """The rows of a query; it does not see writes of an open transaction."""
        with self._reading, self._errors():
            return self._reader.execute(query, values).fetchall()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A context in which all writes are one transaction, which reaches the disk at its end."""
        with self._writing, self._errors(), transaction(self._writer) as db:
            yield db

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ERRORS as error:
            raise StoreError(f"cannot use {self.path}: {error}") from error


def _check_new(path: Path, tables: set[str]) -> None:
    """StoreError if a file without a version is of another program, or was a store once."""
    if tables:
        raise StoreError(f"{path} is not a store of fwdllm")
    jobs = path.parent / RUNS
    if jobs.is_dir() and any(jobs.iterdir()):
        raise StoreError(
            f"{path} is missing or empty, but {jobs} has the runs of its jobs: restore it from a "
            "copy, or choose another folder with --state"
        )


def _connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection
