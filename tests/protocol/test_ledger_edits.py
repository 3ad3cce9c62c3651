"""Ledgers edited at random: whoever reads them gets what is there, or one sentence."""

from __future__ import annotations

import io
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Cli
from ledger_runs import eventful, reopen

from fwdllm.cli.federation_console import print_ledger
from fwdllm.engine.errors import FwdllmError
from fwdllm.federation.summary import summarize
from fwdllm.protocol.journal import KEYS
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.server import Server

OF_A_JOURNAL = {"entry": ("round", "number"), "head": ("id",), "rotation": ("number",)}
NAMED = {**KEYS, "snapshot": ("round",), **OF_A_JOURNAL}
VALUES = (None, "x", -1, 2**62, float("inf"), b"", b"\1\3" + bytes(40))
IN_META = [
    ('"rank": 2', '"rank": 100000000'),
    ('"rank": 2', '"rank": true'),
    ('"rounds": 3', '"rounds": 1'),
    ('"learning_rate": 0.05', '"learning_rate": 1e400'),
    ('"adapter_seed": 1', '"adapter_seed": "x"'),
    ('"noise_seed": 77', '"noise_seed": null'),
    ('"architecture": "llama"', '"architecture": 5'),
    ('"targets": [', '"targets": [5, '),
    ('"targets": [', '"targets": 5, "others": ['),
    ('"head": {', '"head": [], "other": {'),
    ('"config": {', '"config": [], "other": {'),
    ("{", "[" * 100_000),
    ("}", ""),
]


@pytest.fixture(scope="module")
def ledgers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of this version, and one that an older version has written."""
    folder = tmp_path_factory.mktemp("ledgers")
    eventful(folder / "new")
    with reopen(folder / "new") as ledger:
        ledger.rotate_key()
    script = Path(__file__).with_name("old_ledger.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(folder / "old")) as db:
        db.executescript(script)
    return {name: folder / name for name in ("new", "old")}


def edits(path: Path, table: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Queries with their values: rows deleted, values of other kinds, and another table."""
    key = NAMED[table]
    where = " AND ".join(f"{name} = ?" for name in key)
    with closing(sqlite3.connect(path)) as db:
        columns = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
        rows = db.execute(f"SELECT {', '.join(key)} FROM {table} ORDER BY 1").fetchall()
    first, middle, last = rows[0], rows[len(rows) // 2], rows[-1]
    for row in dict.fromkeys((first, middle, last)):
        yield f"DELETE FROM {table} WHERE {where}", row
    for i, column in enumerate(columns):
        for j, value in enumerate(VALUES):
            row = (first, middle, last)[(i + j) % 3]
            yield f"UPDATE {table} SET {column} = ? WHERE {where}", (value, *row)
    yield f"DELETE FROM {table}", ()
    yield f"DROP TABLE {table}", ()
    yield f"ALTER TABLE {table} RENAME TO other", ()
    yield f"ALTER TABLE {table} RENAME COLUMN {columns[-1]} TO other", ()
    yield f"ALTER TABLE {table} ADD COLUMN other", ()
    yield f"CREATE TRIGGER other AFTER INSERT ON {table} BEGIN DELETE FROM {table}; END", ()


def edited(source: Path, to: Path, query: str, values: tuple[Any, ...]) -> bool:
    """Whether SQLite has let a copy be changed."""
    shutil.copy(source, to)
    with closing(sqlite3.connect(to, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        try:
            before = db.total_changes
            db.execute(query, values)
        except sqlite3.Error:
            return False
        return db.total_changes > before or not query.startswith(("DELETE", "UPDATE"))


READERS: tuple[Callable[[Ledger], object], ...] = (replay, Server)


def complaints(path: Path, readers: Sequence[Callable[[Ledger], object]]) -> list[str]:
    """What each reader of a ledger says against it; empty where it says nothing."""
    return [complaint(path, read) for read in readers]


def complaint(path: Path, read: Callable[[Ledger], object]) -> str:
    try:
        with Ledger(path) as ledger:
            read(ledger)
    except FwdllmError as error:
        return str(error)
    return ""


def show(ledger: Ledger) -> None:
    verify(ledger)
    with redirect_stdout(io.StringIO()):
        print_ledger(ledger)
    json.dumps([asdict(closed) for closed in summarize(ledger)], allow_nan=False)


@pytest.mark.parametrize("version", ["new", "old"])
@pytest.mark.parametrize("table", NAMED)
def test_an_edit_of_a_table_is_a_sentence_or_nothing(
    table: str, version: str, ledgers: dict[str, Path], tmp_path: Path
) -> None:
    if version == "old" and table in OF_A_JOURNAL:
        pytest.skip("an older version has no journal")
    n_edited = 0
    for query, values in edits(ledgers[version], table):
        if edited(ledgers[version], tmp_path / "ledger", query, values):
            n_edited += 1
            told = complaints(tmp_path / "ledger", (show, *READERS))
            assert all(len(line.splitlines()) <= 1 for line in told)
            # What an older version wrote is not covered in full.
            assert told[0] or version == "old" or not differs(query, values), query
    assert n_edited > 8


def differs(query: str, values: tuple[Any, ...]) -> bool:
    """Not where NULL is put where it was: a round's snapshot that was not kept."""
    return not (query.startswith("UPDATE round SET snapshot") and values[0] is None)


@pytest.mark.parametrize("version", ["new", "old"])
def test_edited_settings_are_a_sentence(
    version: str, ledgers: dict[str, Path], tmp_path: Path
) -> None:
    query = "UPDATE meta SET json = replace(json, ?, ?)"
    for values in IN_META:
        assert edited(ledgers[version], tmp_path / "ledger", query, values)
        assert complaint(tmp_path / "ledger", show), values


def test_a_view_in_place_of_a_table_is_not_read(ledgers: dict[str, Path], tmp_path: Path) -> None:
    """Reading this one would not end."""
    path = tmp_path / "ledger"
    assert edited(ledgers["new"], path, "DROP TABLE meta", ())
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT i FROM n"
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"CREATE VIEW meta AS SELECT max(i) AS json FROM ({endless})")
    with pytest.raises(LedgerError, match="its meta is not as fwdllm makes it"):
        Ledger(path)


@pytest.mark.parametrize("writable", [False, True])
def test_sqlite_quotes_what_is_no_text(
    ledgers: dict[str, Path], tmp_path: Path, writable: bool
) -> None:
    """SQLite's own message then holds a byte that Python cannot decode."""
    path = tmp_path / "ledger.sqlite"
    content = ledgers["old"].read_bytes()
    assert content.count(b"CREATE TABLE snapshot") == 1
    path.write_bytes(content.replace(b"CREATE TABLE snapshot", b"CREATE \xefABLE snapshot"))
    with pytest.raises(LedgerError, match="cannot use the ledger"):
        Ledger(path, writable=writable)


def test_the_commands_say_so_in_a_sentence(
    fwdllm: Cli, ledgers: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "ledger.sqlite"
    assert edited(ledgers["new"], path, "DELETE FROM round WHERE round = ?", (1,))
    for command in ("show", "verify", "replay"):
        done = fwdllm("ledger", command, tmp_path)
        assert (done.code, done.out) == (2, "")
        assert "round 2 is missing" in done.err
        assert len(done.err.splitlines()) == 1
