"""A ledger's file: who may open it, what it holds, and how it comes to be there."""

from __future__ import annotations

import os
import re
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from ledger_runs import change, create, finish, make, path

from fwdllm.engine.adapters.adapter import Head
from fwdllm.engine.files import lock
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replay import verify
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture


def test_meta_comes_back(path: Path) -> None:
    with create(path, split=True) as ledger:
        meta = ledger.meta
    with Ledger(path) as ledger:
        assert ledger.meta == meta
        assert ledger.meta.config.recorded() == make(split=True).recorded()
        assert ledger.meta.head == Head(("a", "b"), 3)
    assert Meta.from_json(meta.to_json()) == meta


def test_a_second_writer_is_refused(path: Path) -> None:
    with create(path):
        with pytest.raises(LedgerError, match="in use by another process"):
            Ledger(path, writable=True)
        with Ledger(path) as reader:
            assert reader.n_rounds == 0
    with Ledger(path, writable=True) as ledger:
        assert ledger.n_rounds == 0


def test_creating_waits_for_nobody_who_holds_the_lock(path: Path) -> None:
    held = lock(path.with_name(path.name + ".lock"))
    with pytest.raises(LedgerError, match="in use by another process"):
        create(path)
    assert not path.exists()
    held.close()
    create(path).close()


def test_of_many_that_create_at_once_only_one_has_it(path: Path) -> None:
    start = threading.Barrier(8)

    def attempt(_: int) -> Ledger | str:
        start.wait()
        try:
            return create(path)
        except LedgerError as error:
            return str(error)

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(attempt, range(8)))
    made = [one for one in found if isinstance(one, Ledger)]
    assert len(made) <= 1
    for words in found:
        assert isinstance(words, Ledger) or re.search("in use|already holds", words)
    for ledger in made:
        ledger.close()
    assert [file.name for file in path.parent.glob(".*")] == []
    with Ledger(path) as ledger:
        verify(ledger)


def test_a_reader_cannot_write(path: Path) -> None:
    create(path).close()
    with Ledger(path) as reader, pytest.raises(LedgerError):
        reader.accept(0, 0, 0, 0.0, b"x")


def test_nobody_else_may_read_it(path: Path) -> None:
    with create(path) as ledger:
        finish(Server(ledger))
        for file in path.parent.glob("ledger.sqlite*"):
            if file.stat().st_size and not file.name.endswith(".lock"):
                assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_what_is_there_is_not_overwritten(path: Path) -> None:
    path.write_bytes(b"something dear")
    with pytest.raises(LedgerError, match="already holds a run"):
        create(path)
    assert path.read_bytes() == b"something dear"


def test_a_ledger_appears_whole_or_not_at_all(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("no")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(LedgerError, match="cannot write"):
            create(path)
    with monkeypatch.context() as patched:
        patched.setattr("fwdllm.protocol.ledger.SCHEMA", "CREATE TABLE nonsense;")
        with pytest.raises(LedgerError, match="cannot write"):
            create(path)
    assert [file.name for file in path.parent.iterdir()] == ["ledger.sqlite.lock"]
    create(path).close()


@pytest.mark.parametrize("content", [b"", b"hello", b"SQLite format 3\0" + bytes(200)])
def test_other_files_are_no_ledgers(path: Path, content: bytes) -> None:
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger(path)
    path.write_bytes(content)
    for writable in (False, True):
        with pytest.raises(LedgerError):
            Ledger(path, writable=writable)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"format": 2', '"format": 3'),
        ('"layout_version": 1', '"layout_version": 9'),
        ('"rounds": 4', '"rounds": -4'),
        ('"rounds": 4', '"rownds": 4'),
        ('"rank": 2', '"rank": "two"'),
        ('"config": {', '"config": 3, "other": {'),
    ],
)
def test_metadata_that_makes_no_sense_is_refused(path: Path, old: str, new: str) -> None:
    create(path).close()
    change(path, "UPDATE meta SET json = replace(json, ?, ?)", old, new)
    with pytest.raises(LedgerError, match="no ledger this version reads"):
        Ledger(path)


def test_a_ledger_cannot_be_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot"):
        create(tmp_path / "no folder" / "ledger")
