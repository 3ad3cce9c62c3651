"""The server's side of secure aggregation: the clients of a part, from their keys to their sum."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.secure import masks
from fwdllm.protocol.secure.letters import Letter, SecureError, Stage
from fwdllm.protocol.secure.member import commitment_of, mask_key_of
from fwdllm.protocol.secure.sums import threshold

# Bytes of what a client sends at a stage, for each row; a vector's depend on the run.
_WIDTHS = {
    Stage.KEYS: 2 * masks.PUBLIC + masks.COMMITMENT,
    Stage.SHARES: 2 * masks.SECRET + 16,
    Stage.OPENING: masks.SECRET,
}


class Cohort:
    """A part's clients. A client that leaves a stage out is left out of those that follow.

    size: of a vector.  history: see ``Server.history``.  ``letters`` are to be sent, answers to be
    given to ``take``, and ``close`` goes on to the next stage, until ``vectors`` and ``total`` are
    known after the last.
    """

    def __init__(
        self,
        config: FederationConfig,
        round: int,
        part: int,
        clients: Sequence[int],
        size: int,
        history: bytes,
    ) -> None:
        self._config, self._here, self._size = config, (round, part), size
        self._history = history
        self._stage = Stage.KEYS
        self._asked = set(clients)
        self._answers: dict[int, dict[int, bytes]] = {}
        self._least = threshold(config, len(clients))
        self._roster: dict[int, bytes] = {}
        self._sealed: dict[int, dict[int, bytes]] = {}
        self.vectors: dict[int, bytes] = {}
        self.total = np.zeros(size, np.uint64)
        self.done = False

    @property
    def stage(self) -> Stage:
        return self._stage

    def letters(self) -> dict[int, Letter]:
        """What to send to each client whose answer of this stage is missing."""
        return {
            client: Letter(*self._here, self._stage, self._rows_for(client))
            for client in sorted(self._asked - self._answers.keys())
        }

    def take(self, client: int, letter: Letter) -> str | None:
        """Take a client's answer; why it is refused, or None."""
        if (letter.round, letter.part, letter.stage) != (*self._here, self._stage):
            return "late"
        if client not in self._asked or client in self._answers:
            return "foreign: it was not asked for"
        width = _WIDTHS.get(self._stage, 8 * self._size)
        expected = self._expected_rows(client)
        if set(letter.rows) != expected or any(len(r) != width for r in letter.rows.values()):
            return f"malformed: {self._stage.name.lower()} of another form"
        self._answers[client] = dict(letter.rows)
        return None

    def close(self) -> None:
        """Go on with those who have answered. SecureError if they are too few."""
        n = len(self._answers)
        if n < self._least:
            raise SecureError(
                f"{n} of {len(self._asked)} clients have sent their "
                f"{self._stage.name.lower()}, fewer than the {self._least} that a sum needs"
            )
        answers = dict(sorted(self._answers.items()))
        if self._stage == Stage.KEYS:
            self._roster = {client: rows[client] for client, rows in answers.items()}
            self._least = threshold(self._config, n)
        elif self._stage == Stage.SHARES:
            self._sealed = answers
        elif self._stage == Stage.VECTOR:
            self.vectors = {client: rows[client] for client, rows in answers.items()}
        else:
            self._open(answers)
            self.done = True
            return
        self._stage = Stage(self._stage + 1)
        self._asked, self._answers = set(answers), {}

    def _rows_for(self, client: int) -> dict[int, bytes]:
        if self._stage == Stage.KEYS:
            return {client: b""}
        if self._stage == Stage.SHARES:
            return self._roster
        if self._stage == Stage.VECTOR:
            return {c: rows[client] for c, rows in self._sealed.items() if c != client}
        return dict.fromkeys(self.vectors, b"")

    def _expected_rows(self, client: int) -> set[int]:
        if self._stage == Stage.SHARES:
            return set(self._roster) - {client}
        return set(self._sealed) if self._stage == Stage.OPENING else {client}

    def _open(self, answers: dict[int, dict[int, bytes]]) -> None:
        """The sum: of the masked vectors, without the masks."""
        places = {client: place for place, client in enumerate(self._roster)}
        # As many as are needed: each more makes a secret's shares slower to combine.
        openers = list(answers)[: self._least]
        total = np.zeros(self._size, np.uint64)
        for vector in self.vectors.values():
            total += np.frombuffer(vector, "<u8")
        for client in self._sealed:
            shares = [(places[opener], answers[opener][client]) for opener in openers]
            secret = masks.combine(shares)
            if client in self.vectors:
                if masks.commitment(secret) != commitment_of(self._roster[client]):
                    raise SecureError(f"the shares of client {client}'s mask do not fit")
                total -= masks.own_mask(secret, self._size)
                continue
            if masks.public_key(secret) != mask_key_of(self._roster[client]):
                raise SecureError(f"the shares of client {client}'s key do not fit")
            for other in self.vectors:  # its pairs' masks are in their vectors alone
                key = masks.pair_key(secret, mask_key_of(self._roster[other]), self._history)
                total += masks.pair_mask(key, client, other, self._size)
        self.total = total
