"""The record of a run: one SQLite file from which every state of the adapter can be rebuilt.

It holds every round, assignment, contribution, rejection and update; messages are encoded by
``protocol.wire``. Each round's hash covers the hash of the round before. An accepted contribution
is on disk when ``accept`` returns, or, inside ``Ledger.batch``, when the batch ends; a crash later
does not lose it.

The file holds the seed of differential privacy's noise, so only the server may read it.
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

from fwdllm.engine.errors import ConfigError, FwdllmError
from fwdllm.engine.files import is_unused, lock, transaction
from fwdllm.protocol.records import Meta, Round

NAME = "ledger.sqlite"

_SCHEMA = """
CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 0), json TEXT NOT NULL);
CREATE TABLE node (name TEXT PRIMARY KEY, client INTEGER NOT NULL UNIQUE);
CREATE TABLE part (
    round INTEGER, part INTEGER, opened REAL NOT NULL, n_available INTEGER NOT NULL,
    PRIMARY KEY (round, part)
) WITHOUT ROWID;
CREATE TABLE assignment (
    round INTEGER, part INTEGER, client INTEGER, message BLOB NOT NULL, bytes_down INTEGER NOT NULL,
    PRIMARY KEY (round, part, client)
) WITHOUT ROWID;
CREATE TABLE contribution (
    round INTEGER, part INTEGER, client INTEGER, received REAL NOT NULL, message BLOB NOT NULL,
    PRIMARY KEY (round, part, client)
) WITHOUT ROWID;
CREATE INDEX contribution_of_client ON contribution (client, round);
CREATE TABLE rejection (
    id INTEGER PRIMARY KEY, round INTEGER, part INTEGER, client INTEGER, received REAL NOT NULL,
    reason TEXT NOT NULL, n_bytes INTEGER NOT NULL, UNIQUE (round, part, client, reason, n_bytes)
);
CREATE TABLE round (
    round INTEGER PRIMARY KEY, closed REAL NOT NULL, message BLOB, loss REAL,
    first_variance REAL, variance REAL, n_perturbations INTEGER NOT NULL,
    theta BLOB NOT NULL, snapshot BLOB, hash BLOB NOT NULL
);
CREATE TABLE snapshot (round INTEGER PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE evaluation (
    round INTEGER PRIMARY KEY, loss REAL NOT NULL, accuracy REAL, n_examples INTEGER NOT NULL
);
"""


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
        and not is_unused(folder, f"{NAME}.lock", f".{NAME}.tmp")
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

    meta: what the run is.  Errors of all methods: LedgerError.
    """

    def __init__(self, path: Path, *, writable: bool = False):
        """Open the ledger of a run; a writable one is locked until it is closed."""
        self.path = path
        if not path.is_file():
            raise LedgerError(f"there is no ledger at {path}")
        with contextlib.ExitStack() as stack:
            if writable:
                stack.callback(_lock(path).close)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            stack.callback(self._db.close)
            with self._errors():
                if writable:
                    self._db.execute("PRAGMA journal_mode = WAL")
                    self._db.execute("PRAGMA synchronous = FULL")
                else:
                    self._db.execute("PRAGMA query_only = 1")
                row = self._db.execute("SELECT json FROM meta").fetchone()
            try:
                self._meta, self.meta = row[0], Meta.from_json(row[0])
            except (KeyError, TypeError, ValueError, FwdllmError) as error:
                raise LedgerError(f"{path} is no ledger this version reads: {error}") from error
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
                db.executescript(f"BEGIN;{_SCHEMA}")
                db.execute("INSERT INTO meta VALUES (0, ?)", (meta.to_json(),))
                db.execute("COMMIT")
            finally:
                db.close()
            os.replace(temporary, path)
        except (OSError, sqlite3.Error) as error:
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
        with self._transaction() as db:
            db.execute("INSERT INTO part VALUES (?, ?, ?, ?)", (round, part, now, n_available))
            db.executemany(
                "INSERT INTO assignment VALUES (?, ?, ?, ?, ?)",
                [(round, part, *assignment) for assignment in assignments],
            )

    def client_of(self, node: str) -> int:
        """The client number of a node; a node not seen before gets the next free number."""
        found = self._all("SELECT client FROM node WHERE name = ?", node)
        if found:
            return int(found[0][0])
        with self._transaction() as db:
            query = "INSERT INTO node SELECT ?, count(*) FROM node RETURNING client"
            return int(db.execute(query, (node,)).fetchall()[0][0])

    def set_bytes_down(self, round: int, part: int, client: int, n_bytes: int) -> None:
        """Correct the number of bytes sent with an assignment, which ``open_part`` estimated."""
        with self._transaction() as db:
            db.execute(
                "UPDATE assignment SET bytes_down = ? WHERE round = ? AND part = ? AND client = ?",
                (n_bytes, round, part, client),
            )

    def accept(self, round: int, part: int, client: int, now: float, message: bytes) -> None:
        """Record a contribution; it is on disk when this returns."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO contribution VALUES (?, ?, ?, ?, ?)",
                (round, part, client, now, message),
            )

    def reject(
        self, round: int, part: int, client: int, now: float, reason: str, n_bytes: int
    ) -> None:
        """Record a contribution that is not used.

        Rejections that differ only in the time of arrival are recorded once.
        """
        with self._transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO rejection VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                (round, part, client, now, reason, n_bytes),
            )

    def close_round(self, closed: Round, snapshot: bytes | None) -> None:
        """Record a round with its hash. snapshot: the state after it, or None."""
        digest = None if snapshot is None else hashlib.sha256(snapshot).digest()
        closed = dataclasses.replace(closed, snapshot=digest)
        row = dataclasses.astuple(dataclasses.replace(closed, hash=self.chain(closed)))
        with self._transaction() as db:
            db.execute("INSERT INTO round VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
            if snapshot is not None:
                db.execute("INSERT INTO snapshot VALUES (?, ?)", (closed.round + 1, snapshot))

    def evaluated(self, round: int, loss: float, accuracy: float | None, n_examples: int) -> None:
        """Record a held-out evaluation after ``round`` rounds."""
        with self._transaction() as db:
            db.execute(
                "INSERT OR REPLACE INTO evaluation VALUES (?, ?, ?, ?)",
                (round, loss, accuracy, n_examples),
            )

    # Reading

    def rounds(self, first: int = 0) -> list[Round]:
        """Closed rounds from ``first`` on."""
        query = "SELECT * FROM round WHERE round >= ? ORDER BY round"
        return [Round(*row) for row in self._all(query, first)]

    @property
    def n_rounds(self) -> int:
        """How many rounds are closed."""
        return int(self._all("SELECT count(*) FROM round")[0][0])

    def parts(self, round: int) -> list[tuple[int, float, int]]:
        """Parts of a round that have been opened: number, time, clients available."""
        return self._all(
            "SELECT part, opened, n_available FROM part WHERE round = ? ORDER BY part", round
        )

    def available(self) -> list[int]:
        """Clients available in each part of all rounds so far."""
        return [row[0] for row in self._all("SELECT n_available FROM part ORDER BY round, part")]

    def assignments(self, round: int, part: int) -> list[tuple[int, bytes]]:
        """Client and message of a part, by client."""
        return self._all(
            "SELECT client, message FROM assignment WHERE round = ? AND part = ? ORDER BY client",
            round,
            part,
        )

    def assignment(self, round: int, part: int, client: int) -> bytes | None:
        """The message of one assignment, if there is one."""
        found = self._all(
            "SELECT message FROM assignment WHERE round = ? AND part = ? AND client = ?",
            round,
            part,
            client,
        )
        return found[0][0] if found else None

    def contributions(self, round: int, part: int) -> list[tuple[int, bytes]]:
        """Client and message of a part's accepted contributions, by client."""
        return self._all(
            "SELECT client, message FROM contribution WHERE round = ? AND part = ? ORDER BY client",
            round,
            part,
        )

    def arrivals(self, round: int, part: int) -> list[float]:
        """When a part's accepted contributions came."""
        query = "SELECT received FROM contribution WHERE round = ? AND part = ?"
        return [row[0] for row in self._all(query, round, part)]

    def has_contribution(self, round: int, part: int, client: int) -> bool:
        """Whether a client's contribution has been accepted."""
        return bool(
            self._all(
                "SELECT 1 FROM contribution WHERE round = ? AND part = ? AND client = ?",
                round,
                part,
                client,
            )
        )

    def last_round_of(self, client: int) -> int | None:
        """The last round to which a client contributed; it held the state at that round's start."""
        query = "SELECT max(round) FROM contribution WHERE client = ?"
        found: int | None = self._all(query, client)[0][0]
        return found

    def first_message_of(self, client: int) -> bytes | None:
        """A client's first accepted contribution, if there is one."""
        query = "SELECT message FROM contribution WHERE client = ? ORDER BY round, part LIMIT 1"
        found = self._all(query, client)
        return found[0][0] if found else None

    def messages_size(self, first: int) -> int | None:
        """Bytes of the update messages of rounds from ``first`` on, each with its 4-byte length.

        None if a round has no message.
        """
        count, whole, size = self._all(
            "SELECT count(*), count(message), sum(length(message) + 4) FROM round WHERE round >= ?",
            first,
        )[0]
        return None if whole < count else int(size or 0)

    def snapshot(self) -> bytes | None:
        """The state of the latest snapshot, or None; LedgerError if the snapshot was changed."""
        rounds = self._all("SELECT round FROM snapshot ORDER BY round DESC LIMIT 1")
        return self._checked_snapshot(rounds[0][0]) if rounds else None

    def check_snapshots(self) -> None:
        """LedgerError if a snapshot was changed."""
        for (round,) in self._all("SELECT round FROM snapshot ORDER BY round"):
            self._checked_snapshot(round)

    def _checked_snapshot(self, round: int) -> bytes:
        state: bytes = self._all("SELECT state FROM snapshot WHERE round = ?", round)[0][0]
        closed = self.rounds(round - 1)[:1]
        if not closed or hashlib.sha256(state).digest() != closed[0].snapshot:
            raise LedgerError(f"the snapshot of round {round} has been changed in {self.path}")
        return state

    def rejections(self) -> list[tuple[int, int, int, str]]:
        """Round, part, client and reason of each rejection."""
        return self._all("SELECT round, part, client, reason FROM rejection ORDER BY id")

    def evaluations(self) -> list[tuple[int, float, float | None, int]]:
        """For each evaluation: number of rounds before it, loss, accuracy, number of examples."""
        return self._all("SELECT * FROM evaluation ORDER BY round")

    def traffic(self) -> list[tuple[int, int, int, int]]:
        """For each round: the round, clients asked, bytes down, bytes up (rejected ones too)."""
        return self._all(
            "SELECT a.round, count(*), sum(a.bytes_down), coalesce(sum(length(c.message)), 0)"
            " + (SELECT coalesce(sum(n_bytes), 0) FROM rejection r WHERE r.round = a.round)"
            " FROM assignment a LEFT JOIN contribution c USING (round, part, client)"
            " GROUP BY a.round ORDER BY a.round"
        )

    def traffic_by_client(self) -> list[tuple[int, int, int, int, int]]:
        """For each client: the client, times asked, answers accepted, bytes down and bytes up."""
        return self._all(
            "SELECT a.client, count(*), count(c.message), sum(a.bytes_down),"
            " coalesce(sum(length(c.message)), 0)"
            " + (SELECT coalesce(sum(n_bytes), 0) FROM rejection r WHERE r.client = a.client)"
            " FROM assignment a LEFT JOIN contribution c USING (round, part, client)"
            " GROUP BY a.client ORDER BY a.client"
        )

    def chain(self, closed: Round) -> bytes:
        """The hash of a round: SHA-256 over the previous round's hash and this round's data.

        The data: parts, assignments, contributions, update, figures, theta hash, snapshot hash.
        """
        before = self._all("SELECT hash FROM round WHERE round = ?", closed.round - 1)
        digest = hashlib.sha256(before[0][0] if before else self._meta.encode())
        for part, _, n_available in self.parts(closed.round):
            _feed(digest, closed.round, part, n_available)
            for rows in (
                self.assignments(closed.round, part),
                self.contributions(closed.round, part),
            ):
                _feed(digest, len(rows))
                for client, message in rows:
                    _feed(digest, client, len(message))
                    digest.update(message)
        message = closed.message or b""
        _feed(digest, len(message))
        digest.update(message)
        figures = (closed.loss, closed.first_variance, closed.variance, closed.n_perturbations)
        digest.update(repr(figures).encode())
        digest.update(closed.theta)
        digest.update(closed.snapshot or b"")
        return digest.digest()

    def check_file(self) -> None:
        """LedgerError if SQLite finds the file damaged."""
        found = self._all("PRAGMA integrity_check")
        if found != [("ok",)]:
            raise LedgerError(f"{self.path} is damaged: {found[0][0]}")

    def _all(self, query: str, *values: Any) -> list[Any]:
        with self._errors():
            return self._db.execute(query, values).fetchall()

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """A context in which all writes are one transaction, which reaches the disk at its end.

        A commit takes about a millisecond: one for many contributions instead of one for each.
        """
        with self._transaction():
            yield

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._errors(), transaction(self._db) as db:
            yield db

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise LedgerError(f"cannot use the ledger {self.path}: {error}") from error


def theta_hash(theta: np.ndarray) -> bytes:
    """SHA-256 of an adapter's parameters."""
    return hashlib.sha256(np.ascontiguousarray(theta, "<f4").tobytes()).digest()


def _lock(path: Path) -> sqlite3.Connection:
    try:
        return lock(path.with_name(path.name + ".lock"))
    except ConfigError as error:
        raise LedgerError(str(error)) from error


def _feed(digest: Any, *numbers: int) -> None:
    for number in numbers:
        digest.update(number.to_bytes(8, "little"))
