"""Ledgers where nothing can be written, by users who may not, and beside what a kill has left."""

from __future__ import annotations

import contextlib
import os
import shutil
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_runs import Cli
from ledger_runs import create, eventful, reopen

from fwdllm.protocol.figures import traffic
from fwdllm.protocol.ledger import NAME, Ledger, LedgerError
from fwdllm.protocol.replay import verify

NOBODY = 65534

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs users of a Unix system")


@contextlib.contextmanager
def unwritable(folder: Path) -> Iterator[None]:
    """A folder that all may read, and only root could write to."""
    places = [folder, *folder.iterdir()]
    opened = [parent for parent in folder.parents if not parent.stat().st_mode & 0o001]
    modes = {path: path.stat().st_mode for path in [*places, *opened]}
    for path in places:
        path.chmod(0o555 if path.is_dir() else 0o444)
    for path in opened:
        path.chmod(modes[path] | 0o011)
    try:
        yield
    finally:
        for path, mode in modes.items():
            path.chmod(mode & 0o7777)


def as_nobody(act: Callable[[], object]) -> str:
    """What a child without root's rights says: the error of ``act``, or nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        told = "it did not end"
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            act()
            told = ""
        except LedgerError as error:
            told = str(error)
        except BaseException:
            told = traceback.format_exc()
        finally:
            os.write(writer, told.encode())
            os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        told = pipe.read()
    os.waitpid(child, 0)
    return told


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    eventful(folder / NAME)
    (folder / f"{NAME}.lock").unlink(missing_ok=True)
    return folder


def check(folder: Path, n_nodes: int = 2) -> Callable[[], None]:
    def act() -> None:
        with Ledger(folder / NAME) as ledger:
            assert verify(ledger).rounds == 3
            assert ledger.query("SELECT count(*) FROM node") == [(n_nodes,)]
            assert len(traffic(ledger)) == 3

    return act


def test_reading_needs_nothing_to_be_written(run: Path) -> None:
    with unwritable(run):
        before = contents(run)
        assert as_nobody(check(run)) == ""
        assert contents(run) == before


def test_writing_there_is_a_sentence(run: Path) -> None:
    with unwritable(run):
        told = as_nobody(lambda: Ledger(run / NAME, writable=True))
        assert told
        assert "Traceback" not in told
        assert len(told.splitlines()) == 1


@pytest.fixture
def killed(run: Path) -> Path:
    """The folder as a server leaves it that is killed after a write: with its log."""
    copy = run.parent / "killed"
    with reopen(run / NAME) as ledger:
        ledger.client_of("west")
        shutil.copytree(run, copy)
    assert (copy / f"{NAME}-wal").stat().st_size > 0
    return copy


def test_what_a_killed_server_wrote_last_is_read_there_too(killed: Path) -> None:
    with unwritable(killed):
        before = contents(killed)
        assert as_nobody(check(killed, n_nodes=3)) == ""
        assert contents(killed) == before


def test_a_log_that_cannot_be_read_there_is_told_of(killed: Path) -> None:
    """Without it the ledger would be an older one, and signed: nobody could tell."""
    (killed / f"{NAME}-shm").unlink()
    with unwritable(killed):
        told = as_nobody(check(killed))
    assert "ledger.sqlite-wal has its last writes" in told
    assert len(told.splitlines()) == 1
    check(killed, n_nodes=3)()  # where it can be written it is read


def test_without_its_log_a_ledger_is_an_older_one_which_a_head_shows(
    killed: Path, run: Path
) -> None:
    with Ledger(run / NAME) as ledger:
        assert ledger.journal is not None
        head = ledger.journal.head.hash
    for suffix in ("-wal", "-shm"):
        (killed / f"{NAME}{suffix}").unlink()
    check(killed)()
    with Ledger(killed / NAME) as ledger, pytest.raises(LedgerError, match="or older"):
        verify(ledger, head=head)


def test_commands_read_it_there(run: Path, fwdllm: Cli) -> None:
    with unwritable(run):
        before = contents(run)
        for command in ("show", "verify", "replay"):
            assert fwdllm("ledger", command, run).code == 0
        assert contents(run) == before


def test_a_reader_sees_the_ledger_as_it_was_when_it_was_opened(tmp_path: Path) -> None:
    with create(tmp_path / NAME) as writer:
        with Ledger(tmp_path / NAME) as reader:
            writer.client_of("west")
            assert reader.query("SELECT * FROM node") == []
            verify(reader)
        with Ledger(tmp_path / NAME) as reader:
            assert reader.query("SELECT name FROM node") == [("west",)]


@pytest.mark.parametrize("name", ["a b", "100%", "what?", "#1", "ü"])
def test_any_folder_can_be_read(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    folder.mkdir()
    with create(folder / NAME, rounds=1):
        pass
    with unwritable(folder):
        assert as_nobody(lambda: verify(Ledger(folder / NAME))) == ""
