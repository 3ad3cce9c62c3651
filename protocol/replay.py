"""Checks of a ledger: that nothing in it was changed, and that a replay gives its adapter."""

from __future__ import annotations

from collections.abc import Callable

from fwdllm.protocol import wire
from fwdllm.protocol.ledger import Ledger, LedgerError, theta_hash
from fwdllm.protocol.records import Round
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.server import update_of


def verify(ledger: Ledger) -> None:
    """LedgerError for a damaged file, or for the first round that is missing or was changed."""
    ledger.check_file()
    for at, closed in enumerate(ledger.rounds()):
        if closed.round != at:
            raise LedgerError(f"round {at + 1} is missing in {ledger.path}")
        if ledger.chain(closed) != closed.hash:
            raise LedgerError(f"round {at + 1} has been changed in {ledger.path}")
    ledger.check_snapshots()


def replay(ledger: Ledger, on_round: Callable[[Round], None] = lambda closed: None) -> Replica:
    """The state after the last round, from an empty adapter and the contributions alone.

    LedgerError for the first round whose update or adapter differs from the recorded one. That can
    also happen on a machine with another instruction set, which may round normals differently.
    """
    replica = Replica(ledger.meta.config, ledger.meta.empty_adapter())
    for closed in ledger.rounds():
        update, gradient = update_of(ledger, replica, closed.round)
        message = None if update.vector is not None else wire.encode_update(update)
        if closed.message is not None and message != closed.message:
            raise LedgerError(f"round {closed.round + 1} has another update than recorded")
        replica.apply(update, gradient)
        if theta_hash(replica.theta) != closed.theta:
            raise LedgerError(f"round {closed.round + 1} leads to another adapter than recorded")
        on_round(closed)
    return replica
