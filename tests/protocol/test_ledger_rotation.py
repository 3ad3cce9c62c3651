"""Changes of the key that signs a ledger: who can make them, and what a kill leaves."""

from __future__ import annotations

import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from cli_runs import Cli
from ledger_runs import create, eventful, final, finish, operations, path, reopen

from fwdllm.engine.files import lock
from fwdllm.protocol import journal, keys
from fwdllm.protocol.journal import Entry, Head
from fwdllm.protocol.ledger import NAME, Ledger, LedgerError, open_run
from fwdllm.protocol.replay import Verified, replay, verify
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture


def public_of(file: Path) -> bytes:
    return keys.public_key(keys.load_key(file.read_bytes()))


def checked(path: Path, key: bytes | None = None, head: bytes | None = None) -> Verified:
    with Ledger(path) as ledger:
        return verify(ledger, key, head)


def rotate(path: Path) -> tuple[bytes, bytes]:
    """The key after and the key before."""
    before = public_of(keys.file_of(path))
    with reopen(path) as ledger:
        return ledger.rotate_key(), before


def test_a_run_goes_on_under_another_key_to_the_same_bits(path: Path, tmp_path: Path) -> None:
    want = final(tmp_path)
    signers = []
    with create(path) as ledger:
        first = public_of(keys.file_of(path))
        for i, _ in enumerate(operations(Server(ledger))):
            if i % 5 == 2:  # within rounds and between them
                signers.append(ledger.rotate_key())
        assert Server(ledger).replica.theta.tobytes() == want
    assert len(signers) > 3
    found = checked(path)
    assert found.key == signers[-1] == public_of(keys.file_of(path))
    assert [rotation.old for rotation in found.rotations] == [first, *signers[:-1]]
    assert not keys.next_file_of(path).exists()
    assert keys.file_of(path).stat().st_mode & 0o777 == 0o600
    for pin in (first, *signers):
        assert checked(path, pin).key == signers[-1]
    with pytest.raises(LedgerError, match="signed by another key"):
        checked(path, bytes(32))
    with Ledger(path) as ledger:
        assert replay(ledger).theta.tobytes() == want


def test_a_pin_on_the_new_key_and_a_head_hold_for_what_is_signed_since(path: Path) -> None:
    eventful(path)
    older = checked(path)
    shutil.copy(path, path.with_name("older"))
    new, old = rotate(path)
    with reopen(path) as ledger:
        assert ledger.journal is not None
        since = ledger.journal.head.hash
        ledger.client_of("west")
    assert older.head is not None
    assert checked(path, new, older.head.hash).since == 2
    assert checked(path, new, since).since == checked(path, old, since).since == 1
    with pytest.raises(LedgerError, match="signed by another key"):
        checked(path.with_name("older"), new)  # it was signed before


def test_only_its_new_key_lets_a_run_go_on(path: Path) -> None:
    eventful(path)
    pem = keys.file_of(path).read_bytes()
    rotate(path)
    kept = keys.file_of(path).read_bytes()
    keys.file_of(path).write_bytes(pem)
    with reopen(path) as ledger, pytest.raises(LedgerError, match="is not the key"):
        ledger.client_of("west")
    keys.file_of(path).write_bytes(kept)
    with reopen(path) as ledger:
        assert ledger.client_of("west") == 2


def test_a_server_with_one_key_for_all_its_runs_changes_to_its_next(tmp_path: Path) -> None:
    """Both are links; the file of the key before is other runs', and stays."""
    one, two = tmp_path / "one.pem", tmp_path / "two.pem"
    for file in (one, two):
        file.write_bytes(keys.new_key())
    path = tmp_path / "run" / NAME
    path.parent.mkdir()
    keys.file_of(path).symlink_to(one)
    eventful(path)
    keys.next_file_of(path).symlink_to(two)
    assert rotate(path) == (public_of(two), public_of(one))
    assert keys.file_of(path).resolve() == two
    keys.next_file_of(path).symlink_to(two)
    with reopen(path) as ledger, pytest.raises(LedgerError, match="signs already"):
        ledger.rotate_key()
    keys.next_file_of(path).unlink()
    keys.next_file_of(path).write_bytes(b"no key")
    with reopen(path) as ledger, pytest.raises(LedgerError, match=r"key.next: it is no private"):
        ledger.rotate_key()
    checked(path, public_of(one))


def test_a_run_of_an_older_version_has_no_key_to_change(path: Path) -> None:
    script = Path(__file__).with_name("old_ledger.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)
    with reopen(path) as ledger, pytest.raises(LedgerError, match="not signed, as it was begun"):
        ledger.rotate_key()
    assert not keys.next_file_of(path).exists()


def test_a_ledger_whose_key_never_changed_has_no_table_for_it(path: Path) -> None:
    """So that it is, byte for byte, what versions before can read."""
    eventful(path)
    with closing(sqlite3.connect(path)) as db:
        tables = "SELECT count(*) FROM sqlite_master WHERE name = 'rotation'"
        assert db.execute(tables).fetchall() == [(0,)]
    assert checked(path).rotations == ()


# Forgeries


@contextmanager
def editing(path: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        yield db


def sign_again(path: Path, pem: bytes) -> None:
    """All entries of the journal made again in the order they had, and signed with a key."""
    with editing(path) as db:
        rows = db.execute("SELECT round, number, name FROM entry ORDER BY number").fetchall()
        with Ledger(path) as ledger:
            assert ledger.journal is not None
            hashes = {
                name: hash
                for round in ledger.journal.rounds()
                for name, hash in ledger.journal.rows(round)
            }
        head = Head()
        for round, number, name in rows:
            db.execute("DELETE FROM entry WHERE number = ?", (number,))
            if name in hashes:
                entry = Entry(head.entries + 1, round, name, hashes[name])
                values = round, entry.number, name, entry.hash
                db.execute("INSERT INTO entry VALUES (?, ?, ?, ?)", values)
                head = head.after(entry)
        private = keys.load_key(pem)
        values = head.entries, head.hash, keys.public_key(private), journal.sign(private, head)
        db.execute("UPDATE head SET entries = ?, hash = ?, key = ?, signature = ?", values)


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three keys; a node has come after each change."""
    path = tmp_path_factory.mktemp("genuine") / NAME
    eventful(path)
    for name in ("west", "east"):
        rotate(path)
        with reopen(path) as ledger:
            ledger.client_of(name)
    return path


@pytest.fixture
def forged(genuine: Path, path: Path) -> Path:
    """A copy to change. Its key is not with it."""
    shutil.copy(genuine, path)
    return path


EDITS = [
    "DELETE FROM rotation WHERE number = 2",
    "DELETE FROM rotation",
    "DROP TABLE rotation",
    "UPDATE rotation SET number = 3 WHERE number = 2",
    "UPDATE rotation SET entries = entries + 1 WHERE number = 1",
    "UPDATE rotation SET hash = zeroblob(32) WHERE number = 1",
    "UPDATE rotation SET old = zeroblob(32) WHERE number = 1",
    "UPDATE rotation SET new = zeroblob(32) WHERE number = 2",
    "UPDATE rotation SET signature = zeroblob(64) WHERE number = 1",
    "INSERT INTO rotation SELECT 3, entries, hash, old, new, signature FROM rotation"
    " WHERE number = 2",
    "DELETE FROM entry WHERE name = 'rotation 1'",
    "UPDATE entry SET name = 'rotation 3' WHERE name = 'rotation 1'",
]


@pytest.mark.parametrize("query", EDITS)
def test_an_edited_change_is_found_with_and_without_hashes_made_again(
    query: str, genuine: Path, forged: Path
) -> None:
    pinned = [rotation.old for rotation in checked(genuine).rotations]
    pinned.append(checked(genuine).key or b"")
    with editing(forged) as db:
        assert db.execute(query).rowcount != 0
    with pytest.raises(LedgerError, match=r"has been changed|is missing|have been changed"):
        checked(forged)
    sign_again(forged, keys.new_key())
    for key in pinned:
        with pytest.raises(LedgerError, match=r"has been changed|is missing|another key"):
            checked(forged, key)


def test_who_has_no_key_of_the_ledger_cannot_change_it(genuine: Path, forged: Path) -> None:
    """A forger's rotation names the forger's key, and has the signature of the forger's key."""
    found = checked(genuine)
    assert found.key is not None
    mine = keys.load_key(pem := keys.new_key())
    with Ledger(forged) as ledger:
        assert ledger.journal is not None
        head = ledger.journal.head
        wrong = mine.sign(journal._statement(head, keys.public_key(mine)))
    row = 3, head.entries, head.hash, found.key, keys.public_key(mine), wrong
    with editing(forged) as db:
        db.execute("INSERT INTO rotation VALUES (?, ?, ?, ?, ?, ?)", row)
        entry = head.entries + 1, "rotation 3", bytes(32)
        db.execute("INSERT INTO entry VALUES (0, ?, ?, ?)", entry)
    sign_again(forged, pem)
    with pytest.raises(LedgerError, match="rotation 3 has been changed"):
        checked(forged)


def test_a_change_of_another_ledger_is_none_of_this_one(tmp_path: Path) -> None:
    """One key signs two runs. Who was given the key after it for one cannot sign the other."""
    pem = keys.new_key()
    given, kept = (tmp_path / name / NAME for name in ("given", "kept"))
    for run in (given, kept):
        run.parent.mkdir()
        keys.file_of(run).write_bytes(pem)
        eventful(run)
    for run, name in ((given, "west"), (kept, "east")):  # so they have as many entries
        with reopen(run) as ledger:
            ledger.client_of(name)
    rotate(given)
    checked(given, keys.public_key(keys.load_key(pem)))
    with editing(given) as db:
        row = db.execute("SELECT * FROM rotation").fetchone()
        entry = db.execute("SELECT * FROM entry WHERE name = 'rotation 1'").fetchone()
    with editing(kept) as db:
        db.execute(journal.ROTATIONS)
        db.execute("INSERT INTO rotation VALUES (?, ?, ?, ?, ?, ?)", row)
        db.execute("INSERT INTO entry VALUES (?, ?, ?, ?)", entry)
    sign_again(kept, keys.file_of(given).read_bytes())
    with pytest.raises(LedgerError, match="rotation 1 has been changed"):
        checked(kept, keys.public_key(keys.load_key(pem)))


# Kills

KILLED = """
import os, signal, sys
from pathlib import Path
from fwdllm.protocol import keys, ledger
from fwdllm.protocol.journal import Journal

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where = {
    "before the key is written": (keys, "prepare"),
    "before the ledger names it": (Journal, "rotate"),
    "before that is signed": (Journal, "sign"),
    "before the key has its place": (keys, "promote"),
}
opened = ledger.Ledger(Path(sys.argv[1]), writable=True)
opened._signing_key()
setattr(*where[sys.argv[2]], die)
opened.rotate_key()
"""


@pytest.mark.parametrize(
    ("where", "named"),
    [
        ("before the key is written", False),
        ("before the ledger names it", False),
        ("before that is signed", False),
        ("before the key has its place", True),
    ],
)
def test_a_kill_leaves_a_ledger_that_goes_on_with_one_of_the_two_keys(
    where: str, named: bool, path: Path
) -> None:
    eventful(path)
    old = public_of(keys.file_of(path))
    done = subprocess.run([sys.executable, "-c", KILLED, path, where], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    files = [file for file in (keys.file_of(path), keys.next_file_of(path)) if file.exists()]
    signs = checked(path, old).key
    assert [public_of(file) for file in files].count(signs or b"") == 1
    assert (signs != old) == named
    with reopen(path) as ledger:
        assert ledger.client_of("west") == 2  # it goes on as it is
    assert public_of(keys.file_of(path)) == signs
    new, before = rotate(path)  # and can be tried again
    assert before == signs
    found = checked(path, old)
    assert found.key == new == public_of(keys.file_of(path))
    assert len(found.rotations) == 1 + named
    assert not keys.next_file_of(path).exists()


def test_a_change_that_cannot_be_written_is_none(path: Path) -> None:
    eventful(path)
    old = public_of(keys.file_of(path))
    with reopen(path) as ledger:
        pages = ledger.query("PRAGMA page_count")[0][0]
        ledger.query(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(LedgerError, match="full"):
            ledger.rotate_key()
        ledger.query(f"PRAGMA max_page_count = {2**30}")
        assert ledger.client_of("west") == 2  # by the key that it has
        verify(ledger, old)
        new = ledger.rotate_key()
        ledger.client_of("east")
    assert checked(path, old).key == new == public_of(keys.file_of(path))


def test_a_new_run_does_not_begin_with_the_next_key(path: Path, tmp_path: Path) -> None:
    """What is left of a folder whose ledger is gone is no reason to refuse it."""
    eventful(path)
    with Ledger(path) as ledger:
        meta = ledger.meta
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    keys.next_file_of(fresh / NAME).write_bytes(keys.new_key())
    with open_run(fresh, meta, resume=False) as ledger:
        assert ledger.journal is not None
        assert ledger.journal.key == public_of(keys.file_of(fresh / NAME))
        finish(Server(ledger))
        verify(ledger)


# The commands


def test_the_commands_change_the_key_and_print_both(fwdllm: Cli, path: Path) -> None:
    eventful(path)
    old = public_of(keys.file_of(path)).hex()
    held = lock(path.with_name(f"{NAME}.lock"))
    refused = fwdllm("ledger", "rotate-key", path.parent)
    assert (refused.code, refused.out) == (2, "")
    assert "in use by another process" in refused.err
    held.close()
    done = fwdllm("ledger", "rotate-key", path.parent)
    assert done.code == 0
    new = public_of(keys.file_of(path)).hex()
    assert f"by key {new}" in done.out
    assert f"by key {old}" in done.out
    newest = fwdllm("ledger", "rotate-key", path.parent, "--json").json
    assert newest["key_before"] == new
    told = fwdllm("ledger", "verify", path.parent)
    assert told.code == 0
    entries = newest["entries"]
    assert f"signed by key {newest['key']}" in told.out
    assert f"to entry {entries - 1} by key {new}, which named it" in told.out
    assert f"to entry {entries - 2} by key {old}, which named it" in told.out
    for key in (old, new):
        pinned = fwdllm("ledger", "verify", path.parent, "--key", key, "--json").json
        assert (pinned["key"], pinned["earlier_keys"]) == (newest["key"], [old, new])
        assert any("if they have that earlier key" in what for what in pinned["not_covered"])
    pinned = fwdllm("ledger", "verify", path.parent, "--key", newest["key"], "--json").json
    assert not any("earlier key" in what for what in pinned["not_covered"])
    assert pinned["head"] == newest["head"]
