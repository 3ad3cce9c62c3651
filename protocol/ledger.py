"""The record of a run: one SQLite file from which every state of the adapter can be rebuilt.

It holds every round, assignment, contribution, rejection and update; messages are encoded by
``protocol.wire``. Each round's hash covers the hash of the round before; the signed head of a
journal covers all that is written, in the transaction that writes it (``protocol.journal``). An
accepted contribution is on disk when ``accept`` returns, or, inside ``Ledger.batch``, when the
batch ends; a crash later does not lose it.

The file holds the seed of differential privacy's noise, so only the server may read it; the file
beside it has the private key. Ledgers of format 1 have no journal, and get none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fwdllm.engine.errors import ConfigError, FwdllmError
from fwdllm.engine.files import is_unused, lock, transaction
from fwdllm.engine.sqlite import ERRORS, connect_to_read, connect_to_write, odd_value, unexpected
from fwdllm.protocol import journal, keys
from fwdllm.protocol.federation import COHORT
from fwdllm.protocol.journal import BYTES, KEYS, Journal
from fwdllm.protocol.records import Meta, Round, round_hash
from fwdllm.protocol.tables import OPTIONAL, SCHEMA

NAME = "ledger.sqlite"


class LedgerError(FwdllmError):
    """A ledger that is missing, damaged, of another format, in use, or cannot be written."""


def open_run(folder: Path, meta: Meta, resume: bool | None) -> Ledger:
    """The ledger in a run's folder, writable.

    meta: an existing run must have the same, apart from the secret noise_seed.
    resume: True: the run must exist. False: it must not. None: either.
    Errors: ConfigError, LedgerError.
    """
    path = folder / NAME
    if resume and not path.is_file():
        raise ConfigError(f"there is no run in {folder} to resume")
    if (
        resume is False
        and folder.exists()
        and not is_unused(folder, f"{NAME}.lock", f"{NAME}{keys.SUFFIX}", f".{NAME}")
    ):
        raise ConfigError(f"{folder} is not empty; resume the run or name a new folder")
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        return Ledger.create(path, meta)
    ledger = Ledger(path, writable=True)
    changed = ledger.meta.difference(meta)
    if changed is not None:
        ledger.close()
        raise ConfigError(f"{changed} in the run in {folder}; go on with the same value")
    return ledger


class Ledger:
    """An open ledger. Use as a context manager, or ``close`` it.

    meta: what the run is.  journal: None in a ledger of format 1.  Errors of all methods:
    LedgerError.
    """

    def __init__(self, path: Path, *, writable: bool = False):
        """Open the ledger of a run.

        A writable one is locked until it is closed, one to read stays as it is now.
        """
        self.path = path
        self._private: Ed25519PrivateKey | None = None
        if not path.is_file():
            raise LedgerError(f"there is no ledger at {path}")
        with contextlib.ExitStack() as stack:
            if writable:
                stack.callback(_lock(path).close)
            self._db = _connect(path, writable)
            stack.callback(self._db.close)
            names = {name for (name,) in self.query("SELECT name FROM sqlite_master")}
            has_journal, is_rotated = "head" in names, journal.ROTATION in names
            script = SCHEMA + (journal.TABLES + journal.ROTATIONS * is_rotated) * has_journal
            with self._errors():
                other = unexpected(self._db, script)
            if other is not None:
                raise LedgerError(f"{path} is no ledger: its {other} is not as fwdllm makes it")
            found = self.query("SELECT json FROM meta")
            try:
                self._meta = str(found[0][0]) if found else ""
                self.meta = Meta.from_json(self._meta)
            except (KeyError, TypeError, ValueError, RecursionError, FwdllmError) as error:
                raise LedgerError(f"{path} is no ledger this version reads: {error}") from error
            if has_journal != (self.meta.format > 1):
                raise LedgerError(f"{path} has been changed: its journal is gone or added")
            self.journal = self._open_journal() if has_journal else None
            self._resources = stack.pop_all()

    @staticmethod
    def create(path: Path, meta: Meta) -> Ledger:
        """A new ledger, created atomically; LedgerError if the file already exists."""
        temporary = path.with_name(f".{path.name}.tmp{os.getpid()}")
        held = _lock(path)
        try:
            if path.exists():
                raise LedgerError(f"{path} already holds a run; resume it or name another folder")
            # Mode 0600: the file holds a secret and clients' contributions.
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            db = sqlite3.connect(temporary, isolation_level=None)
            try:
                db.executescript(f"BEGIN;{SCHEMA}{journal.TABLES}")
                db.execute("INSERT INTO meta VALUES (0, ?)", (meta.to_json(),))
                private = keys.make(path)
                made = Journal.create(lambda sql, *values: db.execute(sql, values), private)
                made.enter("meta", [0], [0, meta.to_json()])
                made.sign(private)
                db.execute("COMMIT")
            finally:
                db.close()
            os.replace(temporary, path)
        except (OSError, sqlite3.Error, ConfigError) as error:
            raise LedgerError(f"cannot write {path}: {error}") from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()
            held.close()
        return Ledger(path, writable=True)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; nothing can be written after."""
        self._resources.close()

    # Writing

    def open_part(
        self,
        round: int,
        part: int,
        now: float,
        n_available: int,
        assignments: Sequence[tuple[int, bytes, int]],
    ) -> None:
        """Record a part before clients are asked. assignments: client, message, bytes down."""
        with self._transaction():
            self._insert("part", round, part, now, n_available)
            for client, message, n_bytes in assignments:
                row = round, part, client, message, n_bytes
                self._db.execute("INSERT INTO assignment VALUES (?, ?, ?, ?, ?)", row)
                self._enter("assignment", row[:3], [message])
                self._enter(BYTES, row[:3], [n_bytes])

    def client_of(self, node: str) -> int:
        """The client number of a node; a node not seen before gets the next free number."""
        found = self.query("SELECT client FROM node WHERE name = ?", node)
        if found:
            return int(found[0][0])
        with self._transaction():
            client = int(self.query("SELECT count(*) FROM node")[0][0])
            self._insert("node", node, client)
            return client

    def set_bytes_down(self, round: int, part: int, client: int, n_bytes: int) -> None:
        """Correct the number of bytes sent with an assignment, which ``open_part`` estimated."""
        with self._transaction() as db:
            db.execute(
                "UPDATE assignment SET bytes_down = ? WHERE round = ? AND part = ? AND client = ?",
                (n_bytes, round, part, client),
            )
            self._enter(BYTES, (round, part, client), [n_bytes])

    def accept(self, round: int, part: int, client: int, now: float, message: bytes) -> None:
        """Record a contribution; it is on disk when this returns."""
        with self._transaction():
            self._insert("contribution", round, part, client, now, message)

    def reject(
        self, round: int, part: int, client: int, now: float, reason: str, n_bytes: int
    ) -> None:
        """Record a contribution that is not used.

        Rejections that differ only in the time of arrival are recorded once.
        """
        with self._transaction() as db:
            row = round, part, client, now, reason, n_bytes
            query = "INSERT OR IGNORE INTO rejection VALUES (NULL, ?, ?, ?, ?, ?, ?) RETURNING id"
            for (id,) in db.execute(query, row).fetchall():
                self._enter("rejection", (round, id), (id, *row))

    def close_round(self, closed: Round, snapshot: bytes | None) -> None:
        """Record a round with its hash. snapshot: the state after it, or None."""
        digest = None if snapshot is None else hashlib.sha256(snapshot).digest()
        closed = dataclasses.replace(closed, snapshot=digest)
        row = dataclasses.astuple(dataclasses.replace(closed, hash=self.chain(closed)))
        with self._transaction() as db:
            self._insert("round", *row)
            if snapshot is not None:
                db.execute("INSERT INTO snapshot VALUES (?, ?)", (closed.round + 1, snapshot))

    def evaluated(self, round: int, loss: float, accuracy: float | None, n_examples: int) -> None:
        """Record a held-out evaluation after ``round`` rounds; the first one stays."""
        with self._transaction() as db:
            row = round, loss, accuracy, n_examples
            query = "INSERT OR IGNORE INTO evaluation VALUES (?, ?, ?, ?) RETURNING round"
            if db.execute(query, row).fetchall():
                self._enter("evaluation", [round], row)

    def rotate_key(self) -> bytes:
        """Sign from now on with another key, which the one before names; gives its public half.

        It is the one in the file ``keys.next_file_of``, or made there, and takes the place of the
        other, which is removed, when the ledger has named it.
        """
        if self.journal is None:
            raise LedgerError(f"{self.path} is not signed, as it was begun by an older version")
        old = self._signing_key()
        with self._errors(), _told(self.path):
            new = keys.prepare(self.path)
            if keys.public_key(new) == self.journal.key:
                raise ConfigError(f"{keys.next_file_of(self.path)} is the key that signs already")
            with self.journal.advancing(), transaction(self._db):
                self.journal.rotate(old, new)
                self._sign(new)
            self._private = new
            keys.promote(self.path, self.journal.key)
        return self.journal.key

    # Reading

    def rounds(self, first: int = 0) -> list[Round]:
        """Closed rounds from ``first`` on."""
        query = "SELECT * FROM round WHERE round >= ? ORDER BY round"
        return [Round(*row) for row in self.query(query, first)]

    @property
    def n_rounds(self) -> int:
        """How many rounds are closed."""
        return int(self.query("SELECT count(*) FROM round")[0][0])

    def parts(self, round: int) -> list[tuple[int, float, int]]:
        """Parts of a round that have been opened: number, time, clients available."""
        return self.query(
            "SELECT part, opened, n_available FROM part WHERE round = ? ORDER BY part", round
        )

    def available(self) -> list[int]:
        """Clients available in each part of all rounds so far."""
        return [row[0] for row in self.query("SELECT n_available FROM part ORDER BY round, part")]

    def assignments(self, round: int, part: int) -> list[tuple[int, bytes]]:
        """Client and message of a part, by client."""
        return self.query(
            "SELECT client, message FROM assignment WHERE round = ? AND part = ? ORDER BY client",
            round,
            part,
        )

    def assignment(self, round: int, part: int, client: int) -> bytes | None:
        """The message of one assignment, if there is one."""
        found = self.query(
            "SELECT message FROM assignment WHERE round = ? AND part = ? AND client = ?",
            round,
            part,
            client,
        )
        return found[0][0] if found else None

    def contributions(self, round: int, part: int) -> list[tuple[int, bytes]]:
        """Client and message of a part's accepted contributions, by client."""
        return self.query(
            "SELECT client, message FROM contribution WHERE round = ? AND part = ? ORDER BY client",
            round,
            part,
        )

    def reports(self, round: int, part: int) -> list[tuple[int, bytes]]:
        """Of a part's contributions those that are reports: all, or where sums alone are seen one.

        Without that one the others are masked vectors, which say nothing.
        """
        found = self.contributions(round, part)
        return [row for row in found if (row[0] == COHORT) == self.meta.config.secure]

    def n_accepted(self, round: int, part: int) -> int:
        """Of how many clients a part has contributions."""
        query = "SELECT count(*) FROM contribution WHERE round = ? AND part = ? AND client < ?"
        return int(self.query(query, round, part, COHORT)[0][0])

    def arrivals(self, round: int, part: int) -> list[float]:
        """When a part's accepted contributions came."""
        query = "SELECT received FROM contribution WHERE round = ? AND part = ?"
        return [row[0] for row in self.query(query, round, part)]

    def has_contribution(self, round: int, part: int, client: int) -> bool:
        """Whether a client's contribution has been accepted."""
        return bool(
            self.query(
                "SELECT 1 FROM contribution WHERE round = ? AND part = ? AND client = ?",
                round,
                part,
                client,
            )
        )

    def last_round_of(self, client: int) -> int | None:
        """The last round to which a client contributed; it held the state at that round's start."""
        query = "SELECT max(round) FROM contribution WHERE client = ?"
        found: int | None = self.query(query, client)[0][0]
        return found

    def first_message_of(self, client: int) -> bytes | None:
        """A client's first accepted contribution, if there is one."""
        query = "SELECT message FROM contribution WHERE client = ? ORDER BY round, part LIMIT 1"
        found = self.query(query, client)
        return found[0][0] if found else None

    def messages_size(self, first: int) -> int | None:
        """Bytes of the update messages of rounds from ``first`` on, each with its 4-byte length.

        None if a round has no message.
        """
        count, whole, size = self.query(
            "SELECT count(*), count(message), sum(length(message) + 4) FROM round WHERE round >= ?",
            first,
        )[0]
        return None if whole < count else int(size or 0)

    def snapshot(self) -> bytes | None:
        """The state of the latest snapshot, or None; LedgerError if the snapshot was changed."""
        rounds = self.query("SELECT round FROM snapshot ORDER BY round DESC LIMIT 1")
        return self._checked_snapshot(rounds[0][0]) if rounds else None

    def check_snapshots(self) -> None:
        """LedgerError if a snapshot was changed, or is missing."""
        kept = [row[0] for row in self.query("SELECT round FROM snapshot ORDER BY round")]
        for round in kept:
            self._checked_snapshot(round)
        query = "SELECT round + 1 FROM round WHERE snapshot IS NOT NULL ORDER BY round"
        for (round,) in self.query(query):
            if round not in kept:
                raise LedgerError(f"the snapshot of round {round} is missing in {self.path}")

    def _checked_snapshot(self, round: int) -> bytes:
        state: bytes = self.query("SELECT state FROM snapshot WHERE round = ?", round)[0][0]
        closed = self.rounds(round - 1)[:1]
        if not closed or hashlib.sha256(state).digest() != closed[0].snapshot:
            raise LedgerError(f"the snapshot of round {round} has been changed in {self.path}")
        return state

    def rejections(self) -> list[tuple[int, int, int, str]]:
        """Round, part, client and reason of each rejection."""
        return self.query("SELECT round, part, client, reason FROM rejection ORDER BY id")

    def evaluations(self) -> list[tuple[int, float, float | None, int]]:
        """For each evaluation: number of rounds before it, loss, accuracy, number of examples."""
        return self.query("SELECT * FROM evaluation ORDER BY round")

    def chain(self, closed: Round) -> bytes:
        """The hash of a round, see ``records.round_hash``."""
        before = self.query("SELECT hash FROM round WHERE round = ?", closed.round - 1)
        r = closed.round
        parts = (
            (part, n_available, self.assignments(r, part), self.contributions(r, part))
            for part, _, n_available in self.parts(r)
        )
        return round_hash(before[0][0] if before else self._meta.encode(), closed, parts)

    def check_file(self) -> None:
        """LedgerError if SQLite finds the file damaged, or a value in it is of a wrong kind."""
        found = self.query("PRAGMA integrity_check")
        if found != [("ok",)]:
            raise LedgerError(f"{self.path} is damaged: {found[0][0]}")
        with self._errors():
            odd = odd_value(self._db, OPTIONAL)
        if odd is not None:
            raise LedgerError(f"{odd} in {self.path} has been changed to what no run writes")

    def _open_journal(self) -> Journal:
        try:
            return Journal(self._each)
        except ValueError as error:
            raise LedgerError(f"{self.path} has been changed: {error}") from error

    def query(self, query: str, *values: Any) -> list[Any]:
        return list(self._each(query, *values))

    def _each(self, query: str, *values: Any) -> Iterator[Any]:
        with self._errors():
            return self._fetched(self._db.execute(query, values))

    def _fetched(self, cursor: sqlite3.Cursor) -> Iterator[Any]:
        with self._errors():
            yield from cursor

    def _insert(self, table: str, *row: Any) -> None:
        """Write a row, whose first values are those of its key, with its entry."""
        self._db.execute(f"INSERT INTO {table} VALUES ({', '.join('?' * len(row))})", row)
        self._enter(table, row[: len(KEYS[table])], row)

    def _enter(self, kind: str, key: Sequence[Any], row: Sequence[Any]) -> None:
        if self.journal is not None:
            self.journal.enter(kind, key, row)

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """A context in which all writes are one transaction, which reaches the disk at its end.

        A commit takes about a millisecond: one for many contributions instead of one for each.
        """
        with self._transaction():
            yield

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if self.journal is None or self._db.in_transaction:
            with self._errors(), transaction(self._db) as db:
                yield db
            return
        private = self._signing_key()
        with self._errors(), self.journal.advancing(), transaction(self._db) as db:
            yield db
            self._sign(private)

    def _sign(self, private: Ed25519PrivateKey) -> None:
        assert self.journal is not None
        if not self.journal.sign(private):
            raise LedgerError(f"{self.path} has been changed while it was in use")

    def _signing_key(self) -> Ed25519PrivateKey:
        assert self.journal is not None
        if self._private is None:
            with _told(self.path):
                keys.promote(self.path, self.journal.key)  # where a rotation was killed
                self._private = keys.read(self.path, self.journal.key)
        return self._private

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except ERRORS as error:
            raise LedgerError(f"cannot use the ledger {self.path}: {error}") from error


def theta_hash(theta: np.ndarray) -> bytes:
    """SHA-256 of an adapter's parameters."""
    return hashlib.sha256(np.ascontiguousarray(theta, "<f4").tobytes()).digest()


def _connect(path: Path, writable: bool) -> sqlite3.Connection:
    try:
        return connect_to_write(path) if writable else connect_to_read(path)
    except (*ERRORS, ConfigError) as error:
        raise LedgerError(f"cannot use the ledger {path}: {error}") from error


def _lock(path: Path) -> sqlite3.Connection:
    with _told(path):
        return lock(path.with_name(path.name + ".lock"))


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What is wrong with the files beside a ledger, as a LedgerError."""
    try:
        yield
    except ConfigError as error:
        raise LedgerError(str(error)) from error
    except OSError as error:
        raise LedgerError(f"cannot use the files of {path}: {error}") from error
