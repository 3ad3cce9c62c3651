"""A process that takes the reports of some of a run's clients.

Its ledger has the run's description and for each part one order and, in the place of clients'
contributions, batches of reports as they were accepted, then the sum that closed the part. A shard
made from its ledger goes on where the previous one stopped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fwdllm.protocol import wire
from fwdllm.protocol.federation import COHORT, FederationConfig
from fwdllm.protocol.intake import Shapes, examine
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.report import Report, usable
from fwdllm.protocol.secure import sums
from fwdllm.protocol.seeds import client_keys
from fwdllm.protocol.shards.messages import FIRST, Order, ShardSum

# Fields of a report that are the same for all clients of a part, and known.
_FIXED = ("version", "kind", "round", "part", "steps", "perturbations", "head", "count")


class Shard:
    """See the module. ledger: with the run's ``Meta``.  Errors of all methods: LedgerError."""

    def __init__(self, ledger: Ledger) -> None:
        if not ledger.meta.shards or ledger.journal is None:
            raise LedgerError(f"{ledger.path} is not of a run with shards")
        self.ledger, self.config = ledger, ledger.meta.config
        self._journal = ledger.journal
        self._part = self._last_part()

    @property
    def part(self) -> tuple[int, int] | None:
        """Round and part of the last order, None before the first."""
        return None if self._part is None else self._part.place

    def outstanding(self) -> np.ndarray:
        """Clients of the last order that have not answered: int64 [n], ascending."""
        part = self._ordered()
        return part.clients[~part.answered]

    def assignment(self, round: int, part: int, client: int) -> bytes | None:
        """The message for a client that was asked in the last part, else None.

        Of parts before it the clients are not known: an empty message for any.
        """
        if (round, part) != self.part:
            return b"" if part in [number for number, *_ in self.ledger.parts(round)] else None
        order = self._ordered()
        if not order.asked(np.array([client]))[1][0]:
            return None
        key = int(client_keys(self.config.seed, round, 1, client)[0])
        assignment = dataclasses.replace(order.assignment, client=client, batch_seed=key)
        return wire.encode_assignment(assignment)

    def has_contribution(self, round: int, part: int, client: int) -> bool:
        """Whether a client's report was accepted in the last part; of others it is not known."""
        if (round, part) != self.part:
            return False
        rows, asked = self._ordered().asked(np.array([client]))
        return bool(asked[0] and self._ordered().answered[rows[0]])

    def open(self, message: bytes, now: float) -> None:
        """Take an order of the root's; the same one again changes nothing.

        WireError for what is no order; ValueError for another one than that of the part, or an
        older one.
        """
        order = wire.decode_order(message)
        place = order.assignment.round, order.assignment.part
        if self.part is not None and place <= self.part:
            if self.ledger.assignment(*place, COHORT) != message:
                raise ValueError(f"another order for round {place[0] + 1} came before")
            return
        row = COHORT, message, len(message)
        self.ledger.open_part(*place, now, len(order.clients), [row])
        self._part = _Part.of(self.config, order)

    def receive(
        self, clients: Sequence[int], messages: Sequence[bytes], now: float
    ) -> dict[int, str]:
        """Accept reports, or reject them: the reasons, by position in the sequences.

        All is recorded, and on disk on return. The checks are those of ``Server.receive``; but a
        report for an earlier part is "late", whoever sends it. ValueError before the first order.
        """
        part, numbers = self._ordered(), np.asarray(clients, np.int64)
        reports, is_good = part.decode(self.config, messages)
        rows, asked = part.asked(numbers)
        is_good &= asked & ~part.answered[rows] & (part.closed is None)
        # Of a client's reports the first good one counts.
        good = np.flatnonzero(is_good)
        accepted = np.sort(good[np.unique(rows[good], return_index=True)[1]])
        odd = np.delete(np.arange(len(numbers)), accepted)
        refused: dict[int, str] = {}
        try:
            with self.ledger.batch():
                if len(accepted):
                    batch = wire.encode_batch(numbers[accepted], reports[accepted].tobytes())
                    row = FIRST + part.n_batches
                    self.ledger.accept(*part.place, row, now, batch)
                    part.add(self.config, reports[accepted])
                done = 0
                for at in map(int, odd):
                    # What was accepted before this one came: it may be a duplicate.
                    before = int(np.searchsorted(accepted, at))
                    part.answered[rows[accepted[done:before]]] = True
                    done = before
                    refused[at] = self._reject(int(numbers[at]), messages[at], now)
                part.answered[rows[accepted[done:]]] = True
        except BaseException:
            self._part = None  # in case that the ledger cannot be read, either
            self._part = self._last_part()
            raise
        return refused

    def close(self, now: float) -> bytes:
        """End the part: the message for the root, the same each time. Later reports are late."""
        part = self._ordered()
        if part.closed is None:
            n_clients = int(part.answered.sum())
            head = self._journal.head.hash
            message = wire.encode_sum(ShardSum(*part.place, n_clients, head, part.total))
            self.ledger.accept(*part.place, COHORT, now, message)
            part.closed = message
        return part.closed

    def _ordered(self) -> _Part:
        if self._part is None:
            raise ValueError("there was no order yet")
        return self._part

    def _reject(self, client: int, message: bytes, now: float) -> str:
        part = self._ordered()
        most = wire.report_size(_shapes(part.assignment))
        is_open = part.closed is None
        reason, of_round, of_part = examine(
            self.config, self, part.place, is_open, _shapes, most, client, message
        )
        if reason is None:
            raise AssertionError("a report is refused without a reason")
        self.ledger.reject(of_round, of_part, client, now, reason, len(message))
        return reason

    def _last_part(self) -> _Part | None:
        query = "SELECT round, part FROM part ORDER BY round DESC, part DESC LIMIT 1"
        for place in self.ledger.query(query):
            return recorded_part(self.ledger, *place)
        return None


@dataclass(eq=False)
class _Part:
    """A part of a shard.

    clients: int64 [n], ascending.  answered: bool [n].  total: of the vectors of those who have,
    uint64.  n_batches: in the ledger.  closed: the sum's message, None while it is open.
    """

    assignment: Assignment
    clients: np.ndarray
    answered: np.ndarray
    total: np.ndarray
    n_batches: int = 0
    closed: bytes | None = None

    @staticmethod
    def of(config: FederationConfig, order: Order) -> _Part:
        total = np.zeros(sums.size(config, order.assignment), np.uint64)
        # Of the type that clients come in: a search would convert all of them each time.
        clients = order.clients.astype(np.int64)
        return _Part(order.assignment, clients, np.zeros(len(clients), bool), total)

    @property
    def place(self) -> tuple[int, int]:
        return self.assignment.round, self.assignment.part

    def asked(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of clients their rows in ``clients``, and whether they are there; without: any row."""
        rows = np.searchsorted(self.clients, numbers)
        rows = np.minimum(rows, len(self.clients) - 1)
        return rows, self.clients[rows] == numbers

    def decode(
        self, config: FederationConfig, messages: Sequence[bytes]
    ) -> tuple[np.ndarray, np.ndarray]:
        """As ``judge``, for messages of any size."""
        size = len(self._blank)
        if not {size}.issuperset(map(len, messages)):
            messages = [m if len(m) == size else self._blank for m in messages]
        return self.judge(config, b"".join(messages))

    def judge(self, config: FederationConfig, messages: bytes) -> tuple[np.ndarray, np.ndarray]:
        """Messages, one after another, as ``wire.report_dtype`` [n]; which may be used, bool [n].

        Who has sent them is not looked at.
        """
        slopes, head, _ = _shapes(self.assignment)
        dtype = wire.report_dtype(slopes[1] + head[1])
        reports, fixed = (np.frombuffer(data, dtype) for data in (messages, self._blank))
        r = reports
        is_good = usable(config, r["n_examples"], r["seconds"], r["loss"], r["scalars"])
        for name in _FIXED:
            is_good &= reports[name] == fixed[name]
        return reports, is_good

    @cached_property
    def _blank(self) -> bytes:
        """A report of zeros, which no client may send."""
        a = self.assignment
        scalars = (np.zeros(seeds.shape, np.float32) for seeds in (a.seeds, a.head_seeds))
        return wire.encode_report(Report(a.round, a.part, 0, 0, 0.0, 0.0, *scalars))

    def add(self, config: FederationConfig, reports: np.ndarray) -> None:
        r = reports
        found = sums.vectors(
            config, r["n_examples"], r["n_tokens"], r["seconds"], r["loss"], r["scalars"]
        )
        self.total = self.total + found.sum(axis=0, dtype=np.uint64)
        self.n_batches += 1


def recorded_part(ledger: Ledger, round: int, part: int) -> _Part:
    """A part as a shard's ledger has it, added up again; LedgerError if that makes no sense."""
    order = ledger.assignment(round, part, COHORT)
    if order is None:
        raise LedgerError(f"the order of round {round + 1} is missing in {ledger.path}")
    found = _Part.of(ledger.meta.config, wire.decode_order(order))
    for row, message in ledger.contributions(round, part):
        if row == COHORT:
            found.closed = message
            continue
        clients, messages = wire.decode_batch(message)
        reports, is_good = found.judge(ledger.meta.config, messages)
        rows, asked = found.asked(clients)
        is_good &= asked & ~found.answered[rows]
        if not is_good.all() or len(np.unique(rows)) < len(rows):
            raise LedgerError(f"a batch of round {round + 1} in {ledger.path} is not of its order")
        found.add(ledger.meta.config, reports)
        found.answered[rows] = True
    return found


def _shapes(assignment: Assignment) -> Shapes:
    return assignment.seeds.shape, assignment.head_seeds.shape, 0
