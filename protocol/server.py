"""The server of a run: plans rounds, takes reports, makes updates, and writes all of it down.

It has no sockets and no clock. A transport gets assignments from ``open_part``, passes each answer
to ``receive``, and calls ``close_part`` when all clients have answered or the deadline has passed.
A server made from a ledger goes on where the previous one stopped, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from fwdllm.engine.errors import FwdllmError
from fwdllm.protocol import wire
from fwdllm.protocol.federation import COHORT
from fwdllm.protocol.gathered import Gathered, step_of
from fwdllm.protocol.intake import examine, largest_report
from fwdllm.protocol.ledger import Ledger, LedgerError, theta_hash
from fwdllm.protocol.pacing import enough, variance
from fwdllm.protocol.plan import Assignment, plan_part
from fwdllm.protocol.records import Round
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.report import expected_shapes, fault
from fwdllm.protocol.secure import history, sums
from fwdllm.protocol.secure.letters import Letter, Stage
from fwdllm.protocol.shards.messages import FIRST
from fwdllm.protocol.shards.root import clients_asked, n_accepted, n_asked, plan_orders, why_not
from fwdllm.protocol.speeds import Speeds


@dataclass(frozen=True)
class Closed:
    """A round that has ended.

    n_asked, n_accepted: clients asked and reports accepted, over all parts.  n_perturbations:
    perturbations of the adapter in the accepted reports, without the head's.  n_tokens, seconds:
    sums over the accepted reports.  loss: mean of the clients' losses, None without any.
    variance: see ``pacing.variance``.  moved: whether the adapter changed.
    """

    round: int
    parts: int
    n_asked: int
    n_accepted: int
    n_perturbations: int
    n_tokens: int
    seconds: float
    loss: float | None
    variance: float | None
    moved: bool


class Server:
    """See the module. round: number of closed rounds.  replica: the state after them."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.config = ledger, ledger.meta.config
        self.replica = restore(ledger)
        self._gathered = Gathered(ledger, self.replica)
        self._variances: list[float | None] = []
        self._part, self._part_is_closed = -1, False
        self._lost: set[int] = set()
        self._holders: set[int] = set()
        self._all_lost = False
        self._bytes_sent: dict[tuple[int, int, int], int] = {}
        self._resume_round()

    @property
    def round(self) -> int:
        return self.replica.round

    @property
    def done(self) -> bool:
        return self.round >= self.config.rounds

    @property
    def part(self) -> int:
        """The part that is open, -1 between rounds."""
        return self._part

    @property
    def opened(self) -> float:
        """When the open part was opened."""
        return self.ledger.parts(self.round)[-1][1]

    def outstanding(self) -> list[int]:
        """Clients of the open part that have not answered."""
        part = self.round, self._part
        answered = {client for client, _ in self.ledger.contributions(*part)}
        return [client for client, _ in self.ledger.assignments(*part) if client not in answered]

    def arrivals(self) -> list[float]:
        """When the open part's accepted contributions came."""
        return self.ledger.arrivals(self.round, self._part)

    def open_part(self, clients: Sequence[int], now: float) -> list[Assignment]:
        """The assignments to send now: those of the open part that have no answer yet.

        Opens a new part if none is open.  clients: those that can be asked. Assignments of other
        clients are not returned, but count as unanswered until the part is closed.
        ValueError if all rounds are done.
        """
        if self.ledger.meta.shards:
            raise ValueError("the clients of this run are asked by its shards")
        self._ensure_part(clients, now)
        waiting = set(clients).intersection(self.outstanding())
        return [
            wire.decode_assignment(message, client)
            for client, message in self.ledger.assignments(self.round, self._part)
            if client in waiting
        ]

    def open_shards(self, clients: Sequence[int], now: float) -> list[tuple[int, bytes]]:
        """As ``open_part``, of a run with shards: those without a sum yet, and their orders.

        clients: that can be asked, of all shards.
        """
        if not self.ledger.meta.shards:
            raise ValueError("this run has no shards")
        self._ensure_part(clients, now)
        waiting, rows = set(self.outstanding()), self.ledger.assignments(self.round, self._part)
        return [(row - FIRST, message) for row, message in rows if row in waiting]

    def synchronize(self, client: int) -> bytes:
        """A message that brings a client to the current state, which its assignment is about.

        It holds the updates since the round that the client last contributed to, or the whole
        state, whichever is smaller; where sums alone are seen, the updates, see ``history``. A
        client that has never contributed starts from the empty adapter.
        """
        if self._updates_size(client) is None:
            return wire.encode_many([wire.encode_state(self.replica.to_arrays(public=True))])
        rounds = self.ledger.rounds(self._base(client))
        return wire.encode_many([r.message or b"" for r in rounds])

    def synchronization_size(self, client: int) -> int:
        """The size in bytes of ``synchronize``'s message, without making it."""
        size = self._updates_size(client)
        return 6 + (self._state_size if size is None else size)

    def history(self) -> bytes:
        """What clients have been told up to the open round (``secure.history``)."""
        updates = [r.message or b"" for r in self.ledger.rounds()]
        return history.after(history.beginning(self.ledger.meta), updates)

    def forget(self, client: int) -> None:
        """Note that a client has lost its state and holds only the empty adapter."""
        self._holders.discard(client)
        self._lost.add(client)

    def forget_all(self) -> None:
        """As ``forget``, for all clients, each until it contributes again."""
        self._holders, self._all_lost = set(), True

    def sent(self, assignment: Assignment, n_bytes: int) -> None:
        """Note that n_bytes were sent for an assignment; they add to those of earlier sends."""
        a = assignment
        key = (a.round, a.part, a.client)
        self._bytes_sent[key] = self._bytes_sent.get(key, 0) + n_bytes
        self.ledger.set_bytes_down(*key, self._bytes_sent[key])

    def receive(self, client: int, data: bytes, now: float) -> str | None:
        """Accept a client's report (None), or reject it (the reason).

        Either way it is recorded: on disk on return, or at the end of ``Ledger.batch``.
        """
        reason, round, part = self._examine(client, data)
        if reason is None:
            self.ledger.accept(round, part, client, now, data)
            self._lost.discard(client)
            self._holders.add(client)
        else:
            self.ledger.reject(round, part, client, now, reason, len(data))
        return reason

    def refuse(self, client: int, reason: str, n_bytes: int, now: float) -> None:
        """Record that something a client has sent in the open part is not used."""
        self.ledger.reject(self.round, max(self._part, 0), client, now, reason, n_bytes)

    def receive_sum(
        self, vectors: Mapping[int, bytes], total: np.ndarray, now: float
    ) -> str | None:
        """As ``receive``, for what secure aggregation has come to: a sum, and whose vectors it has.

        vectors: by client the bytes of its masked vector; recorded, as nothing is seen in them.
        total: the sum of what is in them, uint64 [``sums.size``].
        ValueError if a client was not asked in the open part.
        """
        round, part = self.round, self._part
        assigned = dict(self.ledger.assignments(round, part))
        if not (vectors and vectors.keys() <= assigned.keys()):
            raise ValueError("a sum is of clients that were asked")
        assignment = wire.decode_assignment(next(iter(assigned.values())))
        report = sums.decode(self.config, assignment, total, len(vectors))
        known = report if self.config.sigma == 0 else dataclasses.replace(report, loss=0.0)
        reason = fault(self.config, known, len(vectors))
        message = wire.encode_report(report)
        with self.ledger.batch():
            if reason is not None:
                n_bytes = sum(map(len, vectors.values()))
                self.ledger.reject(round, part, COHORT, now, reason, n_bytes)
                return reason
            for client, vector in vectors.items():
                letter = Letter(round, part, Stage.VECTOR, {client: vector})
                self.ledger.accept(round, part, client, now, wire.encode_letter(letter))
            self.ledger.accept(round, part, COHORT, now, message)
        self._lost -= vectors.keys()
        self._holders |= vectors.keys()
        return None

    def receive_shard(self, shard: int, data: bytes, now: float) -> str | None:
        """As ``receive``, for what ``Shard.close`` has given."""
        here, is_open = (self.round, max(self._part, 0)), not self._part_is_closed
        reason = why_not(self.ledger, here, is_open, FIRST + shard, data)
        if reason:
            self.ledger.reject(*here, FIRST + shard, now, reason, len(data))
            return reason
        self.ledger.accept(*here, FIRST + shard, now, data)
        return None

    def left_out(self, client: int, version: int, now: float) -> str:
        """Record that a client speaks another version of the protocol; gives the reason."""
        reason = wire.why_left_out(version)
        self.refuse(client, reason, 0, now)
        return reason

    def close_part(self, now: float) -> Closed | None:
        """End the open part. None if the round needs another part, else the closed round.

        After a LedgerError the server is in the state of a new server made from the ledger.
        ValueError if no part is open.
        """
        if self._part < 0 or self._part_is_closed:
            raise ValueError("there is no open part to close")
        try:
            return self._close_part(now)
        except LedgerError:
            self.replica.load_arrays(restore(self.ledger).to_arrays())
            self._resume_round()
            raise

    def _close_part(self, now: float) -> Closed | None:
        config, part = self.config, self._part
        self._take(part)
        self._part_is_closed = True
        self._observe(self.round, part)
        is_last = part + 1 >= config.max_parts
        # The 1e-9 is for rounding errors: 0.28 * 25 is slightly above 7.
        needed = math.ceil(config.quorum * n_asked(self.ledger, self.round, part) - 1e-9)
        if n_accepted(self.ledger, self.round, part) < needed and not is_last:
            return None
        firsts = [r.first_variance for r in self.ledger.rounds() if r.first_variance is not None]
        if not enough(config, part, self._variances[-1], firsts):
            return None
        return self._close_round(now)

    @cached_property
    def _state_size(self) -> int:  # the same after every round
        return len(wire.encode_state(self.replica.to_arrays(public=True))) + 4

    def _updates_size(self, client: int) -> int | None:
        """Bytes of the updates that a client has missed; None if it is to get the state instead."""
        size = self.ledger.messages_size(self._base(client))
        if self.config.secure or (size is not None and size <= self._state_size):
            return size
        return None

    def _base(self, client: int) -> int:
        """The round whose state a client has."""
        if client in self._lost or (self._all_lost and client not in self._holders):
            return 0
        return self.ledger.last_round_of(client) or 0

    def _ensure_part(self, clients: Sequence[int], now: float) -> None:
        if self.done:
            raise ValueError("all rounds are done")
        if self._part < 0 or self._part_is_closed:
            self._new_part(clients, now)

    def _new_part(self, clients: Sequence[int], now: float) -> None:
        part = self._part + 1
        space, gradient = self.replica.space, self.replica.gradient
        asked = Counter(
            client
            for before in range(part)
            for client in clients_asked(self.ledger, self.round, before)
        )
        if self.ledger.meta.shards:
            orders = plan_orders(self.ledger, space, self.round, part, clients, asked)
            rows = [(row, message, len(message)) for row, message in orders]
            self.ledger.open_part(self.round, part, now, len(clients), rows)
            self._part, self._part_is_closed = part, False
            return
        planned = plan_part(
            self.config,
            space,
            self.round,
            part,
            clients,
            gradient,
            asked,
            self.ledger.meta.noise_seed,
            self._speeds.pass_seconds(),
            self.replica.pool,
        )
        rows = []
        for assignment in planned:
            message = wire.encode_assignment(assignment)
            down = len(message) + self.synchronization_size(assignment.client)
            rows.append((assignment.client, message, down))
        self.ledger.open_part(self.round, part, now, len(clients), rows)
        self._part, self._part_is_closed = part, False

    def _examine(self, client: int, data: bytes) -> tuple[str | None, int, int]:
        """As ``intake.examine``."""
        here = self.round, max(self._part, 0)
        if self.ledger.meta.sums_alone and wire.version_of_report(data) is None:
            return "foreign: this run takes sums alone", *here
        space, is_open = self.replica.space, not self._part_is_closed
        shapes_of = partial(expected_shapes, self.config, space)
        most = largest_report(self.config, space)
        return examine(self.config, self.ledger, here, is_open, shapes_of, most, client, data)

    def _take(self, part: int) -> None:
        """Add a part's answers to those of the round's earlier parts."""
        self._gathered.take(self.round, part)
        self._variances.append(variance(self._gathered.sums) if self._gathered.sums else None)

    def _close_round(self, now: float) -> Closed:
        parts = range(self._part + 1)
        answers = self._gathered.answers
        update, gradient, standing = self._gathered.step(self.round)
        self.replica.apply(update, gradient, standing)
        losses = [report.loss for _, report in answers if not math.isnan(report.loss)]
        accepted = sum(n_accepted(self.ledger, update.round, part) for part in parts)
        closed = Round(
            update.round,
            now,
            None if update.vector is not None else wire.encode_update(update),
            float(np.mean(losses)) if losses else None,
            self._variances[0],
            self._variances[-1],
            accepted * self.config.perturbations
            if self.ledger.meta.sums_alone
            else sum(assignment.seeds.size for assignment, _ in answers),
            theta_hash(self.replica.theta),
        )
        due = self.round % self.config.snapshot_every == 0 or self.done
        snapshot = wire.encode_state(self.replica.to_arrays()) if due else None
        self.ledger.close_round(closed, snapshot)
        self._between_rounds()
        return Closed(
            self.round,
            len(parts),
            sum(n_asked(self.ledger, update.round, part) for part in parts),
            accepted,
            closed.n_perturbations,
            sum(report.n_tokens for _, report in answers),
            sum(report.seconds for _, report in answers),
            closed.loss,
            closed.variance,
            not update.empty,
        )

    def _between_rounds(self) -> None:
        self._part, self._part_is_closed = -1, False
        self._gathered, self._variances = Gathered(self.ledger, self.replica), []

    def _resume_round(self) -> None:
        """Resume the open round, if there is one: only its last part is still open."""
        self._between_rounds()
        with sense_of(self.ledger):
            self._speeds = Speeds(self.replica.space)
            if self.config.adaptive:
                self._speeds.observe_rounds(self.ledger)
        parts = self.ledger.parts(self.round)
        for part, _, _ in parts[:-1]:
            self._take(part)
            self._observe(self.round, part)
        self._part = len(parts) - 1

    def _observe(self, round: int, part: int) -> None:
        if self.config.adaptive:
            self._speeds.observe(self.ledger, round, part)


def restore(ledger: Ledger) -> Replica:
    """The state after the last closed round: the latest snapshot and the updates since."""
    with sense_of(ledger):
        replica = Replica(ledger.meta.config, ledger.meta.empty_adapter())
        state = ledger.snapshot()
        if state is not None:
            replica.load_arrays(wire.decode_state(state))
        for round in range(replica.round, ledger.n_rounds):
            replica.apply(*step_of(ledger, replica, round))
        return replica


@contextlib.contextmanager
def sense_of(ledger: Ledger) -> Iterator[None]:
    """LedgerError for whatever goes wrong with what is in a ledger: anybody may have written it."""
    try:
        yield
    except (FwdllmError, MemoryError):
        raise
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise LedgerError(f"what is in {ledger.path} makes no sense ({what})") from error
