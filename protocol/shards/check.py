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


def check_sums(ledger: Ledger, shards: Sequence[Ledger]) -> int:
    """LedgerError unless each sum is what the reports in its shard's ledger add to.

    ledger: the run's, itself checked by ``verify``.  shards: all of them, in their order.
    Gives the number of reports. Reports of parts whose sums the run has not are not counted.
    """
    if len(shards) != ledger.meta.shards:
        raise LedgerError(f"{ledger.path} is of a run with {ledger.meta.shards} shards")
    return sum(_check_shard(ledger, FIRST + at, shard) for at, shard in enumerate(shards))


def _check_shard(ledger: Ledger, row: int, shard: Ledger) -> int:
    different = ledger.meta.difference(shard.meta)
    if different is not None:
        raise LedgerError(f"{shard.path} is of another run: {different}")
    query = "SELECT round, part, message FROM contribution WHERE client = ? ORDER BY round, part"
    head, n_reports = None, 0
    for round, part, message in ledger.query(query, row):
        what = f"round {round + 1}, part {part + 1}"
        if dict(shard.contributions(round, part)).get(COHORT) != message:
            raise LedgerError(f"{shard.path} has another sum of {what} than {ledger.path}")
        if shard.assignment(round, part, COHORT) != ledger.assignment(round, part, row):
            raise LedgerError(f"{shard.path} has another order of {what} than {ledger.path}")
        with sense_of(shard):
            found, told = recorded_part(shard, round, part), wire.decode_sum(message)
        same = (found.total == told.total).all() and found.answered.sum() == told.n_clients
        if not same:
            raise LedgerError(f"the reports of {what} in {shard.path} add to another sum")
        head, n_reports = told.head, n_reports + told.n_clients
    verify(shard, head=head)
    return n_reports
