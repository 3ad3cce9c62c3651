"""The journal of a ledger: an entry for whatever is written, and a signed head over all of them.

An entry has the name of a row and the row's hash, as they were when it was written. The head is a
hash over all entries in their order, so it stands for the whole ledger; a server signs it (Ed25519)
in the transaction that writes. Who knows an earlier head can tell whether it is of the same ledger.

The key may be changed: the old one then signs a statement that names the new one, which is a row
with an entry. It is about the head before it, so it is of no use for another ledger.
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
# Statements that change the key, in a table that is made with the first of them.
ROTATION = "rotation"
# Tables without rounds; their entries have round 0.
_RUN_WIDE = ("meta", "node", ROTATION)

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

ROTATIONS = """
CREATE TABLE rotation (
    number INTEGER PRIMARY KEY, entries INTEGER NOT NULL, hash BLOB NOT NULL,
    old BLOB NOT NULL, new BLOB NOT NULL, signature BLOB NOT NULL
);
"""

# What is signed begins with it, so that a signature for anything else is none for a ledger.
_PURPOSE = b"fwdllm ledger head 1\0"
_PURPOSE_OF_ROTATION = b"fwdllm ledger key 1\0"


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


@dataclass(frozen=True)
class Rotation:
    """A change of the key.

    number: counted from 1.  before: the head of which it is the next entry.  old, new: public keys,
    32 bytes.  signature: by the old one, 64 bytes.
    """

    number: int
    before: Head
    old: bytes
    new: bytes
    signature: bytes

    @property
    def name(self) -> str:
        """Of its entry."""
        return name_of(ROTATION, [self.number])

    @property
    def is_signed(self) -> bool:
        """Whether the old key has signed it."""
        return _verifies(self.old, _statement(self.before, self.new), self.signature)


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
        self._signer = self.key
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
        self._signer = public_key(private)
        query = (
            "UPDATE head SET entries = ?, hash = ?, key = ?, signature = ? WHERE hash = ?"
            " RETURNING id"
        )
        signed = self._next.entries, self._next.hash, self._signer, sign(private, self._next)
        return bool(list(self._query(query, *signed, self.head.hash)))

    def rotate(self, old: Ed25519PrivateKey, new: Ed25519PrivateKey) -> None:
        """Enter that the new key signs after the old one; it then has to sign this, too."""
        if not self._is_rotated:
            self._query(ROTATIONS)
        number, named, before = len(self.rotations()) + 1, public_key(new), self._next
        signature = old.sign(_statement(before, named))
        row = number, before.entries, before.hash, public_key(old), named, signature
        self._query("INSERT INTO rotation VALUES (?, ?, ?, ?, ?, ?)", *row)
        self.enter(ROTATION, [number], row)

    def rotations(self) -> list[Rotation]:
        """All changes of the key, as they are in the table, first to last."""
        if not self._is_rotated:
            return []
        rows = self._query("SELECT * FROM rotation ORDER BY number")
        return [Rotation(row[0], Head(*row[1:3]), *row[3:]) for row in rows]

    @property
    def _is_rotated(self) -> bool:
        return bool(list(self._query("SELECT 1 FROM sqlite_master WHERE name = ?", ROTATION)))

    @contextlib.contextmanager
    def advancing(self) -> Iterator[None]:
        """Around a transaction: entries of one that fails are forgotten."""
        self._next, self._signer = self.head, self.key
        yield
        self.head, self.key = self._next, self._signer

    def entries(self, round: int | None = None) -> Iterator[Entry]:
        """All entries in their order, or those of a round."""
        where, values = ("", ()) if round is None else ("WHERE round = ? ", (round,))
        query = f"SELECT number, round, name, hash FROM entry {where}ORDER BY number"
        for row in self._query(query, *values):
            yield Entry(*row)

    def rows(self, round: int) -> Iterator[tuple[str, bytes]]:
        """Name and hash, as they are now, of all rows that should have an entry of a round."""
        keys_of = {**KEYS, BYTES: KEYS["assignment"]}
        if self._is_rotated:
            keys_of[ROTATION] = ("number",)
        for kind, key in keys_of.items():
            if kind in _RUN_WIDE and round:
                continue
            table, columns = "assignment" if kind == BYTES else kind, _COLUMNS.get(kind, "*")
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
    return _verifies(public, _PURPOSE + _encoded((head.entries, head.hash)), signature)


def _statement(before: Head, new: bytes) -> bytes:
    return _PURPOSE_OF_ROTATION + _encoded((before.entries, before.hash, new))


def _verifies(public: bytes, data: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
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
