"""How a run stands, from its ledger, while its server writes to it."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

from fwdllm.protocol.figures import (
    answers_in_part,
    asked_and_answered,
    bytes_in_all,
    last_answers,
    rejections_by_reason,
    traffic,
)
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.privacy import spent_epsilon

# Closed rounds over which a round's seconds and bytes are taken, and clients' answers looked for.
RECENT, LATELY = 10, 100
# The words that reasons begin with, other than of values that are out of range.
_REASONS = ("duplicate", "foreign", "late", "malformed", "replayed", "version")
_OTHER = "out of range"


@dataclass(frozen=True)
class OpenPart:
    """round, part: counted from 1.  opened, last_answer: times of the ledger's clock."""

    round: int
    part: int
    asked: int
    answered: int
    opened: float
    last_answer: float | None


@dataclass(frozen=True)
class Seen:
    """A client.

    node: its name, None in a simulation.  answers: accepted in all.  last_round: of the last of
    them, counted from 1, None: there is none.  asked_lately, answered_lately: how often in the last
    ``LATELY`` closed rounds.
    """

    client: int
    node: str | None
    answers: int
    last_round: int | None
    asked_lately: int
    answered_lately: int

    @property
    def is_silent(self) -> bool:
        """Whether it was asked lately, and did not answer at all."""
        return self.asked_lately > 0 and not self.answered_lately


@dataclass(frozen=True)
class Evaluated:
    """The held-out evaluation after ``round`` rounds."""

    round: int
    loss: float
    accuracy: float | None


@dataclass(frozen=True)
class Status:
    """How a run stands.

    rounds: closed, of rounds_of.  open_part: None between rounds.  clients: those with a node or an
    answer, or asked lately.  rejected: by the word for the reason.  bytes_up_a_round,
    bytes_down_a_round: means over the last ``RECENT`` rounds.  seconds_a_round: median time from
    update to update of as many, None before there are two.  loss: mean of the clients' losses in
    the last round.  epsilon: so far, None without differential privacy.  simulated: whether times
    are seconds of a simulation; else they are of the server's clock, in seconds since 1970.
    """

    rounds: int
    rounds_of: int
    open_part: OpenPart | None
    clients: tuple[Seen, ...]
    rejected: dict[str, int]
    bytes_up: int
    bytes_down: int
    bytes_up_a_round: float
    bytes_down_a_round: float
    seconds_a_round: float | None
    loss: float | None
    held_out: Evaluated | None
    epsilon: float | None
    simulated: bool


def status_of(ledger: Ledger) -> Status:
    """How the run stands. Nothing is verified and no message decoded."""
    n = ledger.n_rounds
    closed = ledger.rounds(max(0, n - RECENT - 1))
    recent = [row for row in traffic(ledger, max(0, n - RECENT)) if row[0] < n]
    down, up = bytes_in_all(ledger)
    between = [after.closed - before.closed for before, after in pairwise(closed)]
    evaluations = ledger.evaluations()
    rejected: Counter[str] = Counter()
    for reason, count in rejections_by_reason(ledger):
        word = reason.partition(":")[0]
        rejected[word if word in _REASONS else _OTHER] += count
    return Status(
        rounds=n,
        rounds_of=ledger.meta.config.rounds,
        open_part=_open_part(ledger, n),
        clients=_clients(ledger, n),
        rejected=dict(sorted(rejected.items())),
        bytes_up=up,
        bytes_down=down,
        bytes_up_a_round=statistics.fmean(row[3] for row in recent) if recent else 0.0,
        bytes_down_a_round=statistics.fmean(row[2] for row in recent) if recent else 0.0,
        seconds_a_round=statistics.median(between) if between else None,
        loss=closed[-1].loss if closed else None,
        held_out=Evaluated(*evaluations[-1][:3]) if evaluations else None,
        epsilon=spent_epsilon(ledger.meta.config, ledger.available()),
        simulated="fleet" in ledger.meta.model,
    )


def _clients(ledger: Ledger, n_rounds: int) -> tuple[Seen, ...]:
    known = {row[0]: row for row in last_answers(ledger)}
    first = max(0, n_rounds - LATELY)
    lately = {row[0]: row for row in asked_and_answered(ledger, first, n_rounds)}
    found = []
    for client in sorted({*known, *lately}):
        _, node, answers, last = known.get(client, (client, None, 0, None))
        _, asked, answered = lately.get(client, (client, 0, 0))
        last_round = None if last is None else last + 1
        found.append(Seen(client, node, answers, last_round, asked, answered))
    return tuple(found)


def _open_part(ledger: Ledger, round: int) -> OpenPart | None:
    parts = ledger.parts(round)
    if not parts:
        return None
    part, opened, _ = parts[-1]
    asked, answered, last = answers_in_part(ledger, round, part)
    return OpenPart(round + 1, part + 1, asked, answered, opened, last)
