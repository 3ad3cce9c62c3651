"""Where the ledgers of a run's shards are."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.shards.check import check_shard, check_sums, has_orders_of_shards


def folder_of(run_dir: Path, shard: int) -> Path:
    """The folder of a shard, counted from 0, in that of its run."""
    return run_dir / f"shard-{shard}"


def check_shards(ledger: Ledger, run_dir: Path) -> int:
    """As ``check_sums``, of the shards in a run's folder, or as ``check_shard`` of one of them."""
    if not has_orders_of_shards(ledger):
        return check_shard(ledger) if ledger.meta.shards else 0
    with ExitStack() as stack:
        paths = [folder_of(run_dir, i) / NAME for i in range(ledger.meta.shards)]
        return check_sums(ledger, [stack.enter_context(Ledger(path)) for path in paths])
