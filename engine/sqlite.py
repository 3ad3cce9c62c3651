"""Databases of SQLite that may be anywhere and of anybody: how to open and what to expect."""

from __future__ import annotations

import contextlib
import functools
import os
import sqlite3
from collections.abc import Container
from pathlib import Path

from fwdllm.engine.errors import ConfigError

# What reading a damaged database raises: a message of SQLite's may quote bytes of the file, which
# Python then cannot decode.
ERRORS = (sqlite3.Error, UnicodeDecodeError)
_LARGEST = 1.7976931348623157e308


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a database to read it, also where nothing can be written.

    All that is read is the database as it is now. A write-ahead log beside it (its name with
    "-wal") is read, too: it has what a process that was killed wrote last.
    Errors: ``ERRORS``; ConfigError if that log cannot be read here.
    """
    log = path.with_name(path.name + "-wal")
    # With a log, another process may be writing; SQLite can then read without files of its own.
    as_it_is = not log.exists() and not all(os.access(p, os.W_OK) for p in (path, path.parent))
    name = f"{path.absolute().as_uri()}?mode=ro&immutable=1" if as_it_is else path
    connection = sqlite3.connect(name, uri=as_it_is, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA query_only = 1")
        connection.execute("BEGIN")
        connection.execute("SELECT name FROM sqlite_master").fetchall()
    except ERRORS as error:
        connection.close()
        if log.exists() and not os.access(path.parent, os.W_OK):
            raise ConfigError(
                f"{path} cannot be read where nothing can be written: {log.name} has its last "
                "writes; copy all its files to another folder"
            ) from error
        raise
    return connection


def copy_to(path: Path, destination: Path) -> None:
    """Copy a database as it is at one moment, whoever writes to it meanwhile.

    destination: an empty file, or none; the copy has no other files beside it. Errors: as
    ``connect_to_read``'s.
    """
    with contextlib.closing(connect_to_read(path)) as connection:
        connection.execute("COMMIT")  # SQLite does not do it within a transaction,
        connection.execute("PRAGMA query_only = 0")  # and takes the copy for a change
        connection.execute("VACUUM INTO ?", (str(destination),))


def connect_to_write(path: Path) -> sqlite3.Connection:
    """Open a database with a write-ahead log; what is committed survives a power cut."""
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
    except ERRORS:
        connection.close()
        raise
    return connection


def unexpected(connection: sqlite3.Connection, script: str) -> str | None:
    """The first table, index, view or trigger that is not as ``script`` makes it, by name."""
    found, made = _schema(connection), _made(script)
    for name in sorted({*found, *made}):
        if found.get(name) != made.get(name):
            return name
    return None


@functools.cache
def _made(script: str) -> dict[str, str]:
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(script)
        return _schema(connection)


def _schema(connection: sqlite3.Connection) -> dict[str, str]:
    """What was created, as SQL by name; without what SQLite makes for itself."""
    query = "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"
    return {str(name): " ".join(str(sql).split()) for name, sql in connection.execute(query)}


def odd_value(connection: sqlite3.Connection, optional: Container[str]) -> str | None:
    """The first column, as "table.column", with a value that is not of its declared type.

    Negative and infinite numbers are not, nor is NULL but in the columns ``optional``.
    """
    tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    for (table,) in connection.execute(tables).fetchall():
        for _, name, kind, is_needed, *_ in connection.execute(f"PRAGMA table_info({table})"):
            odd = f"typeof({name}) != '{kind.lower()}'"
            if kind == "INTEGER":
                odd += f" OR {name} < 0"
            if kind == "REAL":
                odd += f" OR abs({name}) > {_LARGEST!r}"
            if name in optional and not is_needed:
                odd = f"{name} IS NOT NULL AND ({odd})"
            if connection.execute(f"SELECT 1 FROM {table} WHERE {odd} LIMIT 1").fetchall():
                return f"{table}.{name}"
    return None
