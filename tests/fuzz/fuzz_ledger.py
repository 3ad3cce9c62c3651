"""Changed ledgers, by SQL and in their bytes, through the commands that read them and a server."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

from changes import change_bytes, change_json
from children import run
from target import Row, Target, refused_or_ok

_VALUES: list[Any] = [None, 0, 1, -1, 2, 3, 100, 2**31, 2**63 - 1, -(2**63), 0.5, 1e308, -1e-9,
    float("inf"), "", "x", "ß", b"", b"\0", b"x" * 40, b"\x01\x03" + bytes(20)]  # fmt: skip


def _make(folder: Path) -> None:
    import sys

    import dp_accounting.rdp  # noqa: F401  # takes seconds
    import ledger_runs  # noqa: F401

    import fwdllm.cli.federation_console
    import fwdllm.federation.summary  # noqa: F401

    ended = run(lambda: _runs(folder), folder / "log", 120, 1 << 30)  # it computes
    if ended.code != 0:
        sys.exit(f"no ledgers: {ended.output}")


def _runs(folder: Path) -> int:
    """For every kind of run, its ledger after three rounds and a half."""
    from ledger_runs import RUNS, create, operations

    from fwdllm.protocol.server import Server

    for name, settings in RUNS.items():
        path = folder / name / "ledger.sqlite"
        path.parent.mkdir()
        with create(path, **settings) as ledger:
            server = Server(ledger)
            work = operations(server)
            while server.round < 3:
                next(work)
            next(work)
            ledger.evaluated(2, 1.5, 0.5, 10)
            ledger.reject(2, 0, 1, 1.0, "late", 30)
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("PRAGMA journal_mode = DELETE")
    return 0


def _write(random: Random, folder: Path, case: Path) -> str:
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    shutil.copytree(random.choice(runs), case, dirs_exist_ok=True)
    path = case / "ledger.sqlite"
    if random.random() < 0.25:
        content = path.read_bytes()
        cut = random.randrange(len(content))
        ways = [change_bytes(content, random), content[:cut], content[:cut] + bytes(4096), b""]
        path.write_bytes(random.choice([*ways[:1] * 5, *ways]))
        return "bytes"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA ignore_check_constraints = 1")
        kind = "none"
        for _ in range(random.choice([1, 1, 1, 2, 5])):
            with contextlib.suppress(sqlite3.Error):
                kind = _change(db, random)
        db.commit()
    return kind


def _change(db: sqlite3.Connection, random: Random) -> str:
    tables = [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    table = random.choice(tables)
    columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
    column = random.choice(columns)
    rows = db.execute(f"SELECT {', '.join(columns)} FROM {table}").fetchall()
    way = random.randrange(8)
    if way == 0:
        db.execute(f"DROP TABLE {table}")
        return "table"
    if way == 1:
        db.execute(f"ALTER TABLE {table} RENAME COLUMN {column} TO {random.choice(['x', 'json'])}")
        return "column"
    if not rows:
        return "none"
    row = random.choice(rows)
    here = " AND ".join(f"{name} IS ?" for name in columns)
    if way == 2:
        db.execute(f"DELETE FROM {table} WHERE {here}", row)
        return f"delete {table}"
    if way == 3:
        new = [v if random.random() < 0.6 else random.choice(_VALUES) for v in row]
        db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(new))})", new)
        return f"insert {table}"
    if table == "meta" or way == 4:
        found = db.execute("SELECT json FROM meta").fetchone()
        if found is None:
            return "none"
        new = change_json(
            json.loads(found[0]), random, ["spry", "fwdllm", "median", "lora-fa", 0, 7]
        )
        db.execute("UPDATE meta SET json = ?", (json.dumps(new),))
        return "meta"
    value: Any = random.choice(_VALUES)
    old = row[columns.index(column)]
    if isinstance(old, bytes) and random.random() < 0.6:
        value = change_bytes(old, random)
    where = here if random.random() < 0.7 else "1 OR " + here
    db.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (value, *row))
    return f"update {table}"


@contextmanager
def _open(folder: Path) -> Iterator[Any]:
    """The command line, which takes as long to make as to read a ledger."""
    import warnings

    import typer

    from fwdllm.cli.commands import app

    warnings.simplefilter("ignore")
    yield typer.main.get_command(app)


def _check(command: Any, case: Path) -> list[Row]:
    def run(*arguments: object) -> Row:
        texts = ["ledger", *map(str, arguments)]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            return refused_or_ok(texts[1], lambda: command(texts, standalone_mode=False))

    return [
        run("show", case),
        run("show", case, "--json"),
        run("verify", case),
        run("replay", case, "-o", case / "adapter.gguf"),
        refused_or_ok("resume", lambda: _resume(case / "ledger.sqlite")),
    ]


def _resume(path: Path) -> None:
    from ledger_runs import operations, reopen

    from fwdllm.protocol.replay import verify
    from fwdllm.protocol.server import Server

    with contextlib.closing(reopen(path)) as ledger:
        verify(ledger)
        server = Server(ledger)
        server.synchronize(0)
        work = operations(server)
        for _ in range(9):
            if next(work, 0) == 0:
                return


LEDGER = Target(_make, _write, _check, _open)
