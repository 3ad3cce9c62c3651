"""Checks of a ledger: that nothing in it was changed, and that a replay gives its adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fwdllm.protocol import wire
from fwdllm.protocol.gathered import step_of
from fwdllm.protocol.journal import BYTES, Head, Journal, Rotation
from fwdllm.protocol.ledger import Ledger, LedgerError, theta_hash
from fwdllm.protocol.records import Round
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.server import sense_of


@dataclass(frozen=True)
class Verified:
    """What ``verify`` has found unchanged.

    rounds: how many are closed.  hash: of the last, empty without one.  head, key: of the journal,
    None without one.  since: entries written after the pinned head, None if none was given.
    rotations: how the key came to be the one it is, first to last.
    """

    rounds: int
    hash: bytes
    head: Head | None
    key: bytes | None
    since: int | None
    rotations: tuple[Rotation, ...] = ()


def verify(ledger: Ledger, key: bytes | None = None, head: bytes | None = None) -> Verified:
    """LedgerError for a damaged file, or for the first thing that is missing or was changed.

    key: the public key that must have signed, 32 bytes, or have named, itself or by those it named,
    the key that has.  head: the hash of an earlier head, whose
    ledger this must be, 32 bytes. Without either, whoever has written the ledger may have signed
    it, too. A ledger of format 1 has neither: its rounds alone are checked.
    """
    ledger.check_file()
    closed, since = None, None
    for at, closed in enumerate(ledger.rounds()):
        if closed.round != at:
            raise LedgerError(f"round {at + 1} is missing in {ledger.path}")
        if ledger.chain(closed) != closed.hash:
            raise LedgerError(f"round {at + 1} has been changed in {ledger.path}")
    ledger.check_snapshots()
    journal = ledger.journal
    rotations: tuple[Rotation, ...] = ()
    if journal is not None:
        rotations = _check_rotations(ledger, journal)
        since = _check_journal(ledger, journal, head)
    elif key or head:
        raise LedgerError(f"{ledger.path} is not signed, as it was begun by an older version")
    if key and journal and key not in (journal.key, *(rotation.old for rotation in rotations)):
        raise LedgerError(f"{ledger.path} is signed by another key, {journal.key.hex()}")
    return Verified(
        closed.round + 1 if closed else 0,
        closed.hash if closed else b"",
        journal.head if journal else None,
        journal.key if journal else None,
        since,
        rotations,
    )


def _check_rotations(ledger: Ledger, journal: Journal) -> tuple[Rotation, ...]:
    """All changes of the key; LedgerError unless they lead, each signed, to the one that signs."""
    found, named = journal.rotations(), journal.key
    for rotation in reversed(found):
        if rotation.new != named or not rotation.is_signed:
            raise LedgerError(f"{rotation.name} has been changed in {ledger.path}")
        named = rotation.old
    return tuple(found)


def _check_journal(ledger: Ledger, journal: Journal, pinned: bytes | None) -> int | None:
    """Entries after the pinned head, None without one; LedgerError for what does not fit."""
    for round in journal.rounds():
        entered: dict[str, bytes] = {}
        for entry in journal.entries(round):
            if entry.name in entered and not entry.name.startswith(f"{BYTES} "):
                raise LedgerError(f"{entry.name} has been changed in {ledger.path}")
            entered[entry.name] = entry.hash
        for name, hash in journal.rows(round):
            if entered.pop(name, None) != hash:
                raise LedgerError(f"{name} has been changed in {ledger.path}")
        for name in entered:
            raise LedgerError(f"{name} is missing in {ledger.path}")
    head, since = Head(), None
    before = {rotation.name: rotation.before for rotation in journal.rotations()}
    for entry in journal.entries():
        if entry.number != head.entries + 1:
            break
        if before.get(entry.name, head) != head:  # it is of another ledger, or another time
            raise LedgerError(f"{entry.name} has been changed in {ledger.path}")
        head = head.after(entry)
        if head.hash == pinned:
            since = journal.head.entries - head.entries
    if head != journal.head:
        raise LedgerError(f"entries of the journal have been changed in {ledger.path}")
    if pinned is not None and since is None:
        raise LedgerError(
            f"{pinned.hex()} is no head of {ledger.path}: it is another ledger, or older"
        )
    return since


def replay(ledger: Ledger, on_round: Callable[[Round], None] = lambda closed: None) -> Replica:
    """The state after the last round, from an empty adapter and the contributions alone.

    LedgerError for the first round whose update or adapter differs from the recorded one. That can
    also happen on a machine with another instruction set, which may round normals differently.
    """
    with sense_of(ledger):
        replica = Replica(ledger.meta.config, ledger.meta.empty_adapter())
        for closed in ledger.rounds():
            _replay_round(ledger, replica, closed)
            on_round(closed)
        return replica


def _replay_round(ledger: Ledger, replica: Replica, closed: Round) -> None:
    update, gradient, standing = step_of(ledger, replica, closed.round)
    message = None if update.vector is not None else wire.encode_update(update)
    if closed.message is not None and message != closed.message:
        raise LedgerError(f"round {closed.round + 1} has another update than recorded")
    replica.apply(update, gradient, standing)
    if theta_hash(replica.theta) != closed.theta:
        raise LedgerError(f"round {closed.round + 1} leads to another adapter than recorded")
