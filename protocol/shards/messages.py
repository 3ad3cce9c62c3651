"""What root and shards send each other, and which runs may have shards; ``wire`` encodes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol.federation import COHORT, MOST_OF_A_SUM, FederationConfig
from fwdllm.protocol.plan import Assignment

MAX_SHARDS = 1024
# In the root's ledger the row of shard i has the client FIRST + i; in a shard's ledger its i-th
# batch has it. No client has such a number.
FIRST = COHORT + 1

# ``Report.n_examples`` is smaller, also where it stands for all clients of a part.
_MOST_EXAMPLES = 1 << 32

Clients = TypeVar("Clients", int, np.ndarray)


@dataclass(frozen=True, eq=False)
class Order:
    """What a shard is to do in a part.

    assignment: the same for all clients but for the client and its batch_seed, which are 0.
    clients: to ask, ascending; uint32 [n], at least one.
    """

    assignment: Assignment
    clients: np.ndarray


@dataclass(frozen=True, eq=False)
class ShardSum:
    """What the reports that a shard has accepted in a part come to.

    n_clients: of how many.  head: of the shard's journal before it was closed, 32 bytes; it stands
    for all that the shard had written.  total: sum of their ``secure.sums.vectors``, uint64 [n].
    """

    round: int
    part: int
    n_clients: int
    head: bytes
    total: np.ndarray


def shard_of(client: Clients, n_shards: int) -> Clients:
    """The shard that takes a client's reports, or those of many clients."""
    return client % n_shards


def check_shards(config: FederationConfig, n_shards: int) -> None:
    """ConfigError for settings with which sums of shards are not the sums of the plain server."""
    share = config.batch_size * config.max_derivative
    for wrong, sentence in [
        (
            not 1 <= n_shards <= MAX_SHARDS,
            f"a run has 1 to {MAX_SHARDS} shards, not {n_shards}",
        ),
        (
            config.seeds != "shared" or config.upload != "scalars",
            "shards add scalars along the same directions, so they need seeds=shared and "
            "upload=scalars",
        ),
        (
            config.aggregate != "mean",
            f"shards send sums, and {config.aggregate} needs each client's scalars: take "
            "aggregate=mean",
        ),
        (config.split, "shards need clients with the same scope, and split deals them out"),
        (
            config.secure,
            "masks come off the sum of all clients of a part alone, so secure runs have no shards",
        ),
        (
            config.sigma > 0,
            "shards do not clip what they add, so they cannot give differential privacy",
        ),
        (
            config.per_round * share > MOST_OF_A_SUM
            or config.per_round * config.batch_size >= _MOST_EXAMPLES,
            f"sums of shards have no room for {config.per_round} clients with scalars and batches "
            "of that size; lower max_derivative",
        ),
    ]:
        if wrong:
            raise ConfigError(sentence)
