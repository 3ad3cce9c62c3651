"""Whether shards' ledgers have the reports of which the run's ledger has the sums."""

from __future__ import annotations

from collections.abc import Sequence

from fwdllm.protocol import wire
from fwdllm.protocol.federation import COHORT
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.replay import verify
from fwdllm.protocol.server import sense_of
from fwdllm.protocol.shards.messages import FIRST
from fwdllm.protocol.shards.shard import recorded_part


def has_orders_of_shards(ledger: Ledger) -> bool:
    """Whether a ledger is a run's whose shards have been asked for something."""
    query = "SELECT 1 FROM assignment WHERE client >= ? LIMIT 1"
    return bool(ledger.query(query, FIRST))


def check_sums(ledger: Ledger, shards: Sequence[Ledger]) -> int:
    """LedgerError unless each sum is what the reports in its shard's ledger add to.

    ledger: the run's, itself checked by ``verify``.  shards: all of them, in their order; they are
    checked by ``verify``, too, with the heads that the run's ledger has.
    Gives the number of reports. Those of parts whose sums the run has not are not counted.
    """
    if len(shards) != ledger.meta.shards:
        raise LedgerError(f"{ledger.path} is of a run with {ledger.meta.shards} shards")
    return sum(_compare(ledger, FIRST + at, shard) for at, shard in enumerate(shards))


def check_shard(shard: Ledger) -> int:
    """LedgerError unless each sum in a shard's ledger is what its reports add to; their number."""
    n_reports = 0
    for round, part, message in _sums(shard, COHORT):
        with sense_of(shard):
            found, told = recorded_part(shard, round, part), wire.decode_sum(message)
        n_clients = int(found.answered.sum())
        if n_clients != told.n_clients or found.total.tobytes() != told.total.tobytes():
            where = f"round {round + 1}, part {part + 1}"
            raise LedgerError(f"the reports of {where} in {shard.path} add to another sum")
        n_reports += n_clients
    return n_reports


def _compare(ledger: Ledger, row: int, shard: Ledger) -> int:
    different = ledger.meta.difference(shard.meta)
    if different is not None:
        raise LedgerError(f"{shard.path} is of another run: {different}")
    head, n_reports = None, 0
    for round, part, message in _sums(ledger, row):
        where = f"round {round + 1}, part {part + 1}"
        if dict(shard.contributions(round, part)).get(COHORT) != message:
            raise LedgerError(f"{shard.path} has another sum of {where} than {ledger.path}")
        if shard.assignment(round, part, COHORT) != ledger.assignment(round, part, row):
            raise LedgerError(f"{shard.path} has another order of {where} than {ledger.path}")
        told = wire.decode_sum(message)
        head, n_reports = told.head, n_reports + told.n_clients
    verify(shard, head=head)
    check_shard(shard)
    return n_reports


def _sums(ledger: Ledger, row: int) -> list[tuple[int, int, bytes]]:
    """Round, part and message of all sums that a ledger has of a shard."""
    query = "SELECT round, part, message FROM contribution WHERE client = ? ORDER BY round, part"
    return ledger.query(query, row)
