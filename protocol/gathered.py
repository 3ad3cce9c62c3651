"""What the parts of a round have brought so far, and the step that they lead to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from fwdllm.protocol import wire
from fwdllm.protocol.aggregate import (
    Answer,
    Sums,
    Term,
    mean_vector,
    private_terms,
    terms_of,
)
from fwdllm.protocol.federation import COHORT
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.plan import shared_head_seeds, shared_seeds
from fwdllm.protocol.replica import Replica, Update
from fwdllm.protocol.robust import Standing, bounded, screened
from fwdllm.protocol.seeds import derive_seeds
from fwdllm.protocol.shards.root import answer_of

# What ``Replica.apply`` takes.
Step: TypeAlias = "tuple[Update, np.ndarray | None, Standing | None]"


class Gathered:
    """A function of the ledger and of the state before the round, which it does not change.

    answers: those taken.  sums: of their terms, None before the first part and where clients upload
    weights.
    """

    def __init__(self, ledger: Ledger, replica: Replica) -> None:
        self.answers: list[Answer] = []
        self.sums: Sums | None = None
        self._ledger, self._config, self._space = ledger, ledger.meta.config, replica.space
        self._terms: list[Term] = []
        self._standing = replica.standing
        if self._config.aggregate in ("bounded", "screened") and self._standing is None:
            self._standing = Standing.initial(self._space)

    def take(self, round: int, part: int) -> None:
        """Add a part's accepted answers."""
        answers = answers_of(self._ledger, round, part)
        self.answers += answers
        if self._config.upload == "weights":
            return
        terms = self._terms_of(answers, round, part)
        if self.sums is None:
            self.sums = Sums(self._space)
        self.sums.add(terms)
        self._terms += terms

    def step(self, round: int) -> Step:
        """The round's update, its gradient, None without one, and what clients' standing is then.

        The standing is None unless the run has one.
        """
        if self._config.upload == "weights":
            vector = mean_vector(self._config, self._space, self.answers)
            return Update(round, vector=vector), vector, None
        if not self._terms or self.sums is None:
            return Update(round), None, self._standing
        gradient = self.sums.gradient()
        update = Update.of(round, self._terms, gradient, self._space.adapter.n_head)
        standing = self._standing
        if standing is not None and self._config.aggregate == "screened":
            standing = standing.moved(gradient)
        return update, gradient, standing

    def _terms_of(self, answers: Sequence[Answer], round: int, part: int) -> list[Term]:
        config, weights = self._config, None
        if config.sigma > 0 and (answers or not config.secure):
            return self._private_terms(answers, round, part)
        if self._standing is not None:
            answers, self._standing = bounded(answers, self._standing)
        if self._standing is not None and config.aggregate == "screened":
            self._standing = self._standing.heard(self._space, answers)
            answers, weights = screened(config, answers, self._standing)
        return terms_of(config, answers, part, weights)

    def _private_terms(self, answers: Sequence[Answer], round: int, part: int) -> list[Term]:
        config, ledger = self._config, self._ledger
        n_available = ledger.parts(round)[part][2]
        return private_terms(
            config,
            answers,
            shared_seeds(config, round, part)[0],
            shared_head_seeds(config, self._space, round, part)[0],
            max(1, min(config.per_round, n_available)),
            int(derive_seeds(ledger.meta.noise_seed, round, 1, part)[0]),
        )


def answers_of(ledger: Ledger, round: int, part: int) -> list[Answer]:
    """Assignments and accepted reports of a part, by client; only one where sums alone are seen."""
    if ledger.meta.shards:
        answer = answer_of(ledger, round, part)
        return [] if answer is None else [answer]
    messages, found = dict(ledger.assignments(round, part)), []
    if ledger.meta.config.secure:
        # All clients of the part have its seeds; who they are does not matter to the sum.
        messages = {COHORT: next(iter(messages.values()), b"")}
    for client, data in ledger.reports(round, part):
        if client not in messages:
            raise LedgerError(
                f"client {client} was not asked in round {round + 1} of {ledger.path}"
            )
        assignment = wire.decode_assignment(messages[client], client)
        found.append((assignment, wire.decode_report(data)))
    return found


def step_of(ledger: Ledger, replica: Replica, round: int) -> Step:
    """The step of a closed round, computed again from its contributions."""
    gathered = Gathered(ledger, replica)
    for part, _, _ in ledger.parts(round):
        gathered.take(round, part)
    return gathered.step(round)
