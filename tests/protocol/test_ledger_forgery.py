"""Forged ledgers: changed by somebody who makes all hashes again, but does not have the key."""

from __future__ import annotations

import hashlib
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from ledger_runs import eventful, finish, path, reopen

from fwdllm.engine.errors import FwdllmError
from fwdllm.protocol import journal, keys, wire
from fwdllm.protocol.journal import Entry, Head
from fwdllm.protocol.ledger import Ledger, LedgerError, open_run
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture

Database = sqlite3.Connection


@pytest.fixture(scope="module")
def genuine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("genuine") / "ledger.sqlite"
    eventful(path)
    return path


@pytest.fixture
def forged(genuine: Path, path: Path) -> Path:
    """A copy to change. Its key is not with it."""
    shutil.copy(genuine, path)
    return path


def of(path: Path) -> tuple[bytes, bytes]:
    """Key and head of a ledger."""
    with Ledger(path) as ledger:
        assert ledger.journal is not None
        return ledger.journal.key, ledger.journal.head.hash


# Changes to a run


def sql(*queries: str) -> Callable[[Database], None]:
    def change(db: Database) -> None:
        for query in queries:
            assert db.execute(query).rowcount > 0

    return change


def change_contribution(db: Database) -> None:
    ((message,),) = db.execute("SELECT message FROM contribution WHERE round = 1 LIMIT 1")
    report = wire.decode_report(message)
    report.derivatives[:] *= -1
    db.execute(
        "UPDATE contribution SET message = ? WHERE message = ?",
        (wire.encode_report(report), message),
    )


def change_coefficient(db: Database) -> None:
    ((message,),) = db.execute("SELECT message FROM round WHERE round = 1")
    update = wire.decode_update(message)
    update.terms[0].coefficients[0] += 1
    db.execute("UPDATE round SET message = ? WHERE round = 1", (wire.encode_update(update),))


def change_snapshot(db: Database) -> None:
    ((message,),) = db.execute("SELECT state FROM snapshot WHERE round = 3")
    state = wire.decode_state(message)
    state["theta"] = state["theta"] + np.float32(1)
    db.execute("UPDATE snapshot SET state = ? WHERE round = 3", (wire.encode_state(state),))


LAST_ROUND = [
    f"DELETE FROM {table} WHERE round = 2"
    for table in ("round", "part", "assignment", "contribution", "rejection")
] + ["DELETE FROM snapshot WHERE round = 3", "DELETE FROM evaluation WHERE round = 3"]
FORGERIES: dict[str, Callable[[Database], None]] = {
    "contribution": change_contribution,
    "coefficient": change_coefficient,
    "config": sql("UPDATE meta SET json = replace(json, '0.05', '0.06')"),
    "snapshot": change_snapshot,
    "assignment": sql("UPDATE assignment SET message = zeroblob(9) WHERE round = 1"),
    "clients available": sql("UPDATE part SET n_available = 7 WHERE round = 0"),
    "loss": sql("UPDATE round SET loss = loss / 2"),
    "adapter": sql("UPDATE round SET theta = zeroblob(32) WHERE round = 2"),
    "evaluation": sql("UPDATE evaluation SET accuracy = 0.99 WHERE round = 3"),
    "reason": sql("UPDATE rejection SET reason = 'late'"),
    "node": sql("UPDATE node SET name = 'east' WHERE name = 'south'"),
    "time of asking": sql("UPDATE part SET opened = opened + 1"),
    "time of an answer": sql("UPDATE contribution SET received = received + 1"),
    "time of a rejection": sql("UPDATE rejection SET received = received + 1"),
    "time of closing": sql("UPDATE round SET closed = closed + 1"),
    "bytes down": sql("UPDATE assignment SET bytes_down = bytes_down + 1"),
    "bytes rejected": sql("UPDATE rejection SET n_bytes = n_bytes + 1"),
    "no last round": sql(*LAST_ROUND),
    "no last contribution": sql(
        "DELETE FROM contribution WHERE (round, client) ="
        " (SELECT round, max(client) FROM contribution WHERE round = 2)"
    ),
    "no last evaluation": sql("DELETE FROM evaluation WHERE round = 3"),
    "no last rejection": sql("DELETE FROM rejection WHERE id = (SELECT max(id) FROM rejection)"),
    "no rejections": sql("DELETE FROM rejection"),
    "no last node": sql("DELETE FROM node WHERE name = 'south'"),
    "no snapshots": sql("DELETE FROM snapshot", "UPDATE round SET snapshot = NULL"),
    "nothing but settings": sql(
        *(f"DELETE FROM {t}" for t in journal.KEYS if t != "meta"), "DELETE FROM snapshot"
    ),
    "added contribution": sql(
        "INSERT INTO contribution SELECT round, part, 99, received, message FROM contribution"
        " WHERE round = 2 LIMIT 1"
    ),
}


def make_hashes_again(path: Path, key: bytes) -> None:
    """What a forger can do. key: a private key, of the forger's own."""
    with reopen(path) as ledger:
        db = ledger._db
        for round, state in db.execute("SELECT round, state FROM snapshot").fetchall():
            digest = hashlib.sha256(state).digest()
            db.execute("UPDATE round SET snapshot = ? WHERE round = ?", (digest, round - 1))
        for closed in ledger.rounds():
            values = ledger.chain(closed), closed.round
            db.execute("UPDATE round SET hash = ? WHERE round = ?", values)
        assert ledger.journal is not None
        db.execute("DELETE FROM entry")
        head = Head()
        for round in ledger.journal.rounds():
            for name, hash in ledger.journal.rows(round):
                entry = Entry(head.entries + 1, round, name, hash)
                values = round, entry.number, name, hash
                db.execute("INSERT INTO entry VALUES (?, ?, ?, ?)", values)
                head = head.after(entry)
        private = keys.load_key(key)
        values = head.entries, head.hash, keys.public_key(private), journal.sign(private, head)
        db.execute("UPDATE head SET entries = ?, hash = ?, key = ?, signature = ?", values)


@contextmanager
def editing(path: Path) -> Iterator[Database]:
    with closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA synchronous = OFF")
        yield db


@pytest.mark.parametrize("name", FORGERIES)
def test_a_forgery_with_all_hashes_made_again_is_found(
    name: str, genuine: Path, forged: Path
) -> None:
    key, head = of(genuine)
    with editing(forged) as db:
        signed = db.execute("SELECT key, signature FROM head").fetchone()
        FORGERIES[name](db)
    assert_found(forged, "has been changed|is missing")  # before hashes are made again
    make_hashes_again(forged, keys.new_key())
    with Ledger(forged) as ledger:
        verify(ledger)  # nothing was forgotten: only a key or a head speaks against it
        with pytest.raises(LedgerError, match="signed by another key"):
            verify(ledger, key=key)
        with pytest.raises(LedgerError, match="is no head of"):
            verify(ledger, head=head)
        for read in (replay, Server):
            with suppress(FwdllmError):
                read(ledger)
    with editing(forged) as db:
        db.execute("UPDATE head SET key = ?, signature = ?", signed)
    assert_found(forged, "its head is not signed by its key")


def assert_found(path: Path, words: str) -> None:
    with pytest.raises(LedgerError, match=words), Ledger(path) as ledger:
        verify(ledger)


def test_hashes_made_again_over_nothing_changed_are_another_ledger_too(
    genuine: Path, forged: Path
) -> None:
    make_hashes_again(forged, keys.new_key())
    with Ledger(forged) as ledger:
        verify(ledger)
        replay(ledger)
        with pytest.raises(LedgerError, match="is no head of"):
            verify(ledger, head=of(genuine)[1])


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("UPDATE entry SET hash = zeroblob(32) WHERE number = 5", "has been changed"),
        ("DELETE FROM entry WHERE number = 5", "has been changed"),
        ("DELETE FROM entry WHERE number = (SELECT max(number) FROM entry)", "has been changed"),
        ("UPDATE entry SET number = number + 100 WHERE number > 5", "have been changed"),
        ("UPDATE head SET entries = entries - 1", "not signed by its key"),
        ("UPDATE head SET hash = zeroblob(32)", "not signed by its key"),
        ("UPDATE head SET key = zeroblob(32)", "not signed by its key"),
        ("UPDATE head SET key = 5", "not signed by its key"),
        ("UPDATE head SET signature = zeroblob(64)", "not signed by its key"),
        ("DELETE FROM head", "has no head"),
        ("UPDATE meta SET json = replace(json, '\"format\": 2', '\"format\": 1')", "journal"),
    ],
)
def test_a_changed_journal_is_found(query: str, words: str, forged: Path) -> None:
    with editing(forged) as db:
        assert db.execute(query).rowcount > 0
    assert_found(forged, words)


def test_a_journal_that_is_taken_away_is_found(genuine: Path, forged: Path) -> None:
    """What is left looks like a run of an older version, but for who asks for the key or head."""
    with editing(forged) as db:
        db.execute("DROP TABLE head")
        db.execute("DROP TABLE entry")
    assert_found(forged, "its journal is gone")
    with editing(forged) as db:
        db.execute("UPDATE meta SET json = replace(json, '\"format\": 2', '\"format\": 1')")
    with reopen(forged) as ledger:
        for closed in ledger.rounds():
            values = ledger.chain(closed), closed.round
            ledger._db.execute("UPDATE round SET hash = ? WHERE round = ?", values)
        assert verify(ledger).head is None
        key, head = of(genuine)
        for pinned in ({"key": key}, {"head": head}):
            with pytest.raises(LedgerError, match="is not signed"):
                verify(ledger, **pinned)


# What a head proves


def test_a_head_that_was_noted_stays_one_of_the_ledger(genuine: Path, path: Path) -> None:
    heads = []
    with closing(sqlite3.connect(genuine)) as db:
        n_entries = db.execute("SELECT entries FROM head").fetchone()[0]
    with Ledger(genuine) as ledger:
        assert ledger.journal is not None
        head = Head()
        for entry in ledger.journal.entries():
            head = head.after(entry)
            heads.append(head.hash)
        assert len(heads) == n_entries > 30
        for i, hash in enumerate(heads):
            assert verify(ledger, head=hash).since == n_entries - 1 - i
        assert verify(ledger).since is None


def test_an_older_copy_is_found_by_a_head_that_was_noted_since(path: Path, tmp_path: Path) -> None:
    eventful(path)
    with reopen(path) as ledger:
        older = ledger.journal
        assert older is not None
        old_head = older.head.hash
    shutil.copy(path, tmp_path / "older")
    with reopen(path) as ledger:
        ledger.client_of("west")
    key, head = of(path)
    with Ledger(path) as ledger:
        assert verify(ledger, key, old_head).since == 1
    with Ledger(tmp_path / "older") as ledger:
        verify(ledger, key, old_head)
        with pytest.raises(LedgerError, match="is no head of"):
            verify(ledger, key, head)


def test_a_row_cannot_be_written_anew_behind_a_head_that_was_noted(forged: Path) -> None:
    """Not even by who has the key: else the head would stay, and what it stands for would not."""
    head = of(forged)[1]
    forged.with_name("ledger.sqlite.key").write_bytes(pem := keys.new_key())
    with editing(forged) as db:
        signed = keys.public_key(keys.load_key(pem))
        with Ledger(forged) as ledger:
            assert ledger.journal is not None
            signature = journal.sign(keys.load_key(pem), ledger.journal.head)
        db.execute("UPDATE head SET key = ?, signature = ?", (signed, signature))
        db.execute("UPDATE evaluation SET accuracy = 0.99 WHERE round = 3")
    with reopen(forged) as ledger, ledger._transaction():
        ledger._enter("evaluation", [3], (3, 1.25, 0.99, 8))
    with (
        Ledger(forged) as ledger,
        pytest.raises(LedgerError, match="evaluation 3 has been changed"),
    ):
        verify(ledger, head=head)


def test_bytes_that_are_sent_again_are_corrected(path: Path) -> None:
    eventful(path)
    head = of(path)[1]
    with reopen(path) as ledger:
        client = ledger.assignments(2, 0)[0][0]
        ledger.set_bytes_down(2, 0, client, 12345)
        ledger.set_bytes_down(2, 0, client, 23456)
        assert verify(ledger, head=head).since == 2
        ledger.evaluated(3, 9.0, 0.0, 8)  # the first one stays
        assert verify(ledger, head=head).since == 2


# The key


def test_the_key_is_beside_the_ledger_and_its_owners_alone(path: Path) -> None:
    eventful(path)
    file = path.with_name("ledger.sqlite.key")
    assert file.stat().st_mode & 0o777 == 0o600
    assert keys.public_key(keys.load_key(file.read_bytes())) == of(path)[0]
    assert file.read_bytes() not in path.read_bytes()
    secret = keys.load_key(file.read_bytes()).private_bytes_raw()
    assert secret not in path.read_bytes()


def test_without_its_key_a_run_is_read_but_does_not_go_on(path: Path, tmp_path: Path) -> None:
    eventful(path)
    file = path.with_name("ledger.sqlite.key")
    pem = file.read_bytes()
    file.unlink()
    with reopen(path) as ledger:
        verify(ledger)
        with pytest.raises(LedgerError, match="key is missing"):
            ledger.client_of("west")
    for wrong, words in (
        (keys.new_key(), "is not the key"),
        (b"", "no private key"),
        (b"x" * 99, "no private key"),
    ):
        file.write_bytes(wrong)
        with reopen(path) as ledger, pytest.raises(LedgerError, match=words):
            ledger.client_of("west")
    file.write_bytes(pem)
    with reopen(path) as ledger:
        assert ledger.client_of("west") == 2
        verify(ledger)


def test_a_server_can_have_one_key_for_all_its_runs(tmp_path: Path) -> None:
    """By putting it in the folder of a new run."""
    pem = keys.new_key()
    for name in ("first", "second"):
        path = tmp_path / name / "ledger.sqlite"
        path.parent.mkdir()
        path.with_name("ledger.sqlite.key").write_bytes(pem)
        eventful(path)
        assert of(path)[0] == keys.public_key(keys.load_key(pem))


def test_a_folder_with_a_key_alone_is_a_new_one(genuine: Path, tmp_path: Path) -> None:
    """Someone's own, or that of a start that was killed before there was a ledger."""
    pem = keys.new_key()
    (tmp_path / "ledger.sqlite.key").write_bytes(pem)
    (tmp_path / ".ledger.sqlite.key.tmp1").write_bytes(b"")
    with Ledger(genuine) as ledger:
        meta = ledger.meta
    with open_run(tmp_path, meta, resume=False) as ledger:
        assert ledger.journal is not None
        assert ledger.journal.key == keys.public_key(keys.load_key(pem))
        verify(ledger)


def test_what_somebody_else_writes_meanwhile_is_not_signed(path: Path) -> None:
    eventful(path)
    with reopen(path) as ledger:
        with editing(path) as db:
            db.execute("UPDATE head SET hash = zeroblob(32)")
        with pytest.raises(LedgerError, match="changed while it was in use"):
            ledger.client_of("west")
        assert ledger.query("SELECT count(*) FROM node") == [(2,)]


def test_what_failed_to_be_written_has_no_entry(path: Path) -> None:
    eventful(path)
    with reopen(path) as ledger:
        with suppress(ZeroDivisionError), ledger.batch():
            ledger.client_of("west")
            raise ZeroDivisionError
        assert ledger.query("SELECT count(*) FROM node") == [(2,)]
        with pytest.raises(LedgerError):
            ledger.accept(0, 0, ledger.contributions(0, 0)[0][0], 0.0, b"again")
        verify(ledger)
        ledger.client_of("west")
        verify(ledger)
        assert finish(Server(ledger))


# Older versions


@pytest.fixture
def old(path: Path) -> Path:
    """What an older version has written: two rounds of three, and half of the third."""
    script = Path(__file__).with_name("old_ledger.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(path)) as db:
        db.executescript(script)
    return path


def test_a_ledger_of_an_older_version_has_its_hashes_and_goes_on(old: Path) -> None:
    want = "54b20249ce3fd66534081ff087eacc3d97eeea23c925f4114b94e9cc3dd0c8a9"
    with reopen(old) as ledger:
        found = verify(ledger)
        assert (found.rounds, found.hash.hex(), found.head, found.key) == (2, want, None, None)
        for pinned in ({"key": bytes(32)}, {"head": bytes(32)}):
            with pytest.raises(LedgerError, match="is not signed"):
                verify(ledger, **pinned)
        assert len(ledger.rejections()) == len(ledger.evaluations()) == 2
        server = Server(ledger)
        assert server.outstanding() == []
        server.close_part(300.0)
        assert server.done
        ledger.evaluated(3, 1.0, 0.5, 8)
        ledger.client_of("b")
        assert verify(ledger).rounds == 3
    with Ledger(old) as ledger:
        assert verify(ledger).head is None
        assert ledger.meta.format == 1
    assert not old.with_name("ledger.sqlite.key").exists()
