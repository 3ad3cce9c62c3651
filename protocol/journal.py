"""The journal of a ledger: an entry for whatever is written, and a signed head over all of them.

An entry has the name of a row and the row's hash, as they were when it was written. The head is a
hash over all entries in their order, so it stands for the whole ledger; a server signs it (Ed25519)
in the transaction that writes. Who knows an earlier head can tell whether it is of the same ledger.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fwdllm.protocol.keys import public_key

# The columns that name a row of each table. Snapshots have no entries: rounds have their hashes.
KEYS: dict[str, tuple[str, ...]] = {
    "meta": ("id",),
    "node": ("name",),
    "part": ("round", "part"),
    "assignment": ("round", "part", "client"),
    "contribution": ("round", "part", "client"),
    "rejection": ("round", "id"),
    "round": ("round",),
    "evaluation": ("round",),
}
# What is sent down may be sent again: bytes have entries of their own, of which the last counts.
# All other entries are final.
BYTES = "bytes"
_COLUMNS = {"assignment": "message", BYTES: "bytes_down"}
# Tables without rounds; their entries have round 0.
_RUN_WIDE = ("meta", "node")

TABLES = """
CREATE TABLE entry (
    round INTEGER, number INTEGER, name TEXT NOT NULL, hash BLOB NOT NULL,
    PRIMARY KEY (round, number)
) WITHOUT ROWID;
CREATE TABLE head (
    id INTEGER PRIMARY KEY CHECK (id = 0), entries INTEGER NOT NULL, hash BLOB NOT NULL,
    key BLOB NOT NULL, signature BLOB NOT NULL
);
"""

# What is signed begins with it, so that a signature for anything else is none for a ledger.
_PURPOSE = b"fwdllm ledger head 1\0"


@dataclass(frozen=True)
class Entry:
    """number: counted from 1.  round: of the row, 0 if it has none.  name: see ``name_of``.

    hash: see ``row_hash``; 32 bytes.
    """

    number: int
    round: int
    name: str
    hash: bytes


@dataclass(frozen=True)
class Head:
    """entries: how many there are.  hash: SHA-256 over them, 32 bytes; zeros if there are none."""

    entries: int = 0
    hash: bytes = bytes(32)

    def after(self, entry: Entry) -> Head:
        """The head after one more entry."""
        data = _encoded((entry.number, entry.round, entry.name, entry.hash))
        return Head(entry.number, hashlib.sha256(self.hash + data).digest())


class Journal:
    """The journal in a ledger's tables.

    query: executes SQL with values, in place of its question marks, and gives the rows.
    head: as of the last transaction.  key: the public half of the key that signs, 32 bytes.
    ValueError if the head is not signed by that key.
    """

    def __init__(self, query: Callable[..., Iterator[Any]]) -> None:
        self._query = query
        found = list(query("SELECT entries, hash, key, signature FROM head"))
        if len(found) != 1:
            raise ValueError("it has no head")
        entries, hash, self.key, signature = found[0]
        self.head = self._next = Head(entries, hash)
        if not is_signed(self.key, self.head, signature):
            raise ValueError("its head is not signed by its key")

    @staticmethod
    def create(query: Callable[..., Iterator[Any]], private: Ed25519PrivateKey) -> Journal:
        """The journal in new tables: signed, without an entry."""
        head = Head()
        values = head.entries, head.hash, public_key(private), sign(private, head)
        query("INSERT INTO head VALUES (0, ?, ?, ?, ?)", *values)
        return Journal(query)

    def enter(self, kind: str, key: Sequence[Any], row: Sequence[Any]) -> None:
        """Add the entry of a row that is written in this transaction.

        kind: a table, or ``BYTES``.  key: its values in ``KEYS``.  row: all its columns; but of an
        assignment its message alone, of bytes their number.
        """
        name = name_of(kind, key)
        round = 0 if kind in _RUN_WIDE else key[0]
        entry = Entry(self._next.entries + 1, round, name, row_hash(name, row))
        self._query("INSERT INTO entry VALUES (?, ?, ?, ?)", round, entry.number, name, entry.hash)
        self._next = self._next.after(entry)

    def sign(self, private: Ed25519PrivateKey) -> bool:
        """Sign what has been entered. False if the journal is not as this object left it."""
        if self._next == self.head:
            return True
        signature = sign(private, self._next)
        query = "UPDATE head SET entries = ?, hash = ?, signature = ? WHERE hash = ? RETURNING id"
        values = self._next.entries, self._next.hash, signature, self.head.hash
        return bool(list(self._query(query, *values)))

    @contextlib.contextmanager
    def advancing(self) -> Iterator[None]:
        """Around a transaction: entries of one that fails are forgotten."""
        self._next = self.head
        yield
        self.head = self._next

    def entries(self, round: int | None = None) -> Iterator[Entry]:
        """All entries in their order, or those of a round."""
        where, values = ("", ()) if round is None else ("WHERE round = ? ", (round,))
        query = f"SELECT number, round, name, hash FROM entry {where}ORDER BY number"
        for row in self._query(query, *values):
            yield Entry(*row)

    def rows(self, round: int) -> Iterator[tuple[str, bytes]]:
        """Name and hash, as they are now, of all rows that should have an entry of a round."""
        for kind in (*KEYS, BYTES):
            if kind in _RUN_WIDE and round:
                continue
            table, columns = "assignment" if kind == BYTES else kind, _COLUMNS.get(kind, "*")
            key = KEYS[table]
            where, values = ("", ()) if kind in _RUN_WIDE else (" WHERE round = ?", (round,))
            query = f"SELECT {', '.join(key)}, {columns} FROM {table}{where}"
            for row in self._query(query, *values):
                name = name_of(kind, row[: len(key)])
                yield name, row_hash(name, row[len(key) :])

    def rounds(self) -> list[int]:
        """All rounds that have rows or entries, ascending; always 0."""
        tables = ["entry", *(table for table in KEYS if table not in _RUN_WIDE)]
        query = " UNION ".join(f"SELECT round FROM {table}" for table in tables)
        return sorted({0, *(row[0] for row in self._query(query))})


def name_of(kind: str, key: Sequence[Any]) -> str:
    """A row's name: its kind and its values in ``KEYS``, separated by spaces."""
    return " ".join(map(str, (kind, *key)))


def row_hash(name: str, row: Sequence[Any]) -> bytes:
    """SHA-256 of a row: None, int, float, str or bytes in each column."""
    return hashlib.sha256(_encoded((name, *row))).digest()


def sign(key: Ed25519PrivateKey, head: Head) -> bytes:
    """The signature of a head: 64 bytes."""
    return key.sign(_PURPOSE + _encoded((head.entries, head.hash)))


def is_signed(public: bytes, head: Head, signature: bytes) -> bool:
    """Whether a signature of a head is by the key whose public half is given."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(
            signature, _PURPOSE + _encoded((head.entries, head.hash))
        )
    except (InvalidSignature, TypeError, ValueError):
        return False
    return True


def _encoded(values: Sequence[Any]) -> bytes:
    """Values as bytes, no two sequences of them the same.

    Numbers are the same as integers and as floats, as SQLite keeps them in columns of reals.
    """
    told = repr([_told(value) for value in values]).encode()
    return b"".join([told, *(value for value in values if isinstance(value, bytes))])


def _told(value: Any) -> Any:
    if isinstance(value, bytes):
        return (len(value),)
    if isinstance(value, float):
        if math.isnan(value):  # SQLite keeps it as NULL
            return None
        return int(value) if value.is_integer() else float(value)
    return value
