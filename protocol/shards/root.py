"""What the process with a run's ledger does with shards: functions of that ledger."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from fwdllm.protocol import wire
from fwdllm.protocol.federation import COHORT
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.plan import Assignment, choose, shared_head_seeds, shared_seeds
from fwdllm.protocol.report import Report, fault
from fwdllm.protocol.secure import sums
from fwdllm.protocol.shards.messages import FIRST, Order, ShardSum, shard_of
from fwdllm.protocol.space import Space
from fwdllm.protocol.wire import WireError


def plan_orders(
    ledger: Ledger,
    space: Space,
    round: int,
    part: int,
    clients: Sequence[int],
    asked: Mapping[int, int],
) -> list[tuple[int, bytes]]:
    """The orders of a part: rows of the ledger, and messages; as ``plan.plan_part``.

    A shard without a client gets no order.
    """
    config, n_shards = ledger.meta.config, ledger.meta.shards
    found = choose(config, round, part, clients, asked, ledger.meta.noise_seed)
    chosen = np.array(found, np.uint32)
    seeds = shared_seeds(config, round, part), shared_head_seeds(config, space, round, part)
    assignment = Assignment(round, part, 0, None, *seeds, 0, part * config.local_steps)
    dealt = [chosen[shard_of(chosen, n_shards) == shard] for shard in range(n_shards)]
    return [
        (FIRST + shard, wire.encode_order(Order(assignment, own)))
        for shard, own in enumerate(dealt)
        if len(own)
    ]


def clients_asked(ledger: Ledger, round: int, part: int) -> list[int]:
    """Clients of a part, whoever takes their reports; not sorted."""
    rows = ledger.assignments(round, part)
    if not ledger.meta.shards:
        return [client for client, _ in rows]
    return [int(c) for _, message in rows for c in wire.decode_order(message).clients]


def n_asked(ledger: Ledger, round: int, part: int) -> int:
    """How many clients were asked in a part."""
    rows = ledger.assignments(round, part)
    if not ledger.meta.shards:
        return len(rows)
    return sum(len(wire.decode_order(message).clients) for _, message in rows)


def n_accepted(ledger: Ledger, round: int, part: int) -> int:
    """Of how many clients a part has contributions."""
    if not ledger.meta.shards:
        return ledger.n_accepted(round, part)
    return sum(found.n_clients for found in sums_of(ledger, round, part))


def sums_of(ledger: Ledger, round: int, part: int) -> list[ShardSum]:
    """The sums of a part that shards have delivered."""
    return [wire.decode_sum(message) for _, message in ledger.contributions(round, part)]


def answer_of(ledger: Ledger, round: int, part: int) -> tuple[Assignment, Report] | None:
    """A part as the answer of one client that stands for all of its clients; None without any."""
    found = sums_of(ledger, round, part)
    if not any(one.n_clients for one in found):
        return None
    assignment = wire.decode_order(ledger.assignments(round, part)[0][1]).assignment
    return _answer(ledger, assignment, found)


def why_not(ledger: Ledger, here: tuple[int, int], is_open: bool, row: int, data: bytes) -> str:
    """Why a shard's sum is rejected, in a few words; empty if it is not.

    here, is_open: the last part, and whether it takes sums.  row: the shard's in the ledger.
    """
    try:
        found = wire.decode_sum(data)
    except WireError as error:
        return f"malformed: {error}"
    place = found.round, found.part
    message = ledger.assignment(*place, row)
    if message is None:
        return "foreign: it was not asked for"
    if ledger.has_contribution(*place, row):
        return "duplicate"
    if place != here or not is_open:
        return "late"
    config, order = ledger.meta.config, wire.decode_order(message)
    if len(found.total) != sums.size(config, order.assignment):
        return f"malformed: a sum of {len(found.total)} numbers"
    if found.n_clients > len(order.clients):
        return f"{found.n_clients} clients are more than the {len(order.clients)} that were asked"
    if not found.n_clients:
        return "a sum of nothing" if found.total.any() else ""
    _, report = _answer(ledger, order.assignment, [found])
    if report.n_examples < found.n_clients:
        return f"{report.n_examples} examples are not of {found.n_clients} clients"
    return fault(config, report, found.n_clients) or ""


def _answer(
    ledger: Ledger, assignment: Assignment, found: Sequence[ShardSum]
) -> tuple[Assignment, Report]:
    total = np.stack([one.total for one in found]).sum(axis=0, dtype=np.uint64)
    n_clients = sum(one.n_clients for one in found)
    report = sums.decode(ledger.meta.config, assignment, total, n_clients)
    return dataclasses.replace(assignment, client=COHORT), report
