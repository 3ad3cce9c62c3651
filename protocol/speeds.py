"""How fast clients are, from what a ledger has of their answers: they need not say it.

A report has the seconds it took by the client's own clock, and its assignment tells the work. The
tokens of a client's batches are in both what it took and what it will take, so they cancel.
A device with little memory runs lanes one after the other, or reads layers again: it is slow.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass, field

from fwdllm.protocol import wire
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.load import passes
from fwdllm.protocol.space import Space

# A client's last assignments that tell its speed: a phone's changes with its load, and one slow
# answer, as that of a device that had to load the model, does not move their median.
_WINDOW = 5


@dataclass(eq=False)
class Speeds:
    """Of all clients that were asked in closed parts: a function of these parts alone.

    Of each of a client's last assignments: seconds of a pass, and whether it was answered.
    """

    space: Space
    _last: dict[int, deque[tuple[float, bool]]] = field(default_factory=dict)

    def observe_rounds(self, ledger: Ledger) -> None:
        """Take all parts of the closed rounds."""
        for round in range(ledger.n_rounds):
            for part, _, _ in ledger.parts(round):
                self.observe(ledger, round, part)

    def observe(self, ledger: Ledger, round: int, part: int) -> None:
        """Take a closed part; parts must come in their order.

        Who has not answered, or with what was refused, has taken the deadline at least.
        """
        config = self.space.config
        reports = dict(ledger.contributions(round, part))
        for client, message in ledger.assignments(round, part):
            a = wire.decode_assignment(message, client)
            work = passes(self.space, a.layers, a.seeds.shape[1])
            answered = client in reports
            seconds = wire.decode_report(reports[client]).seconds if answered else config.deadline
            last = self._last.setdefault(client, deque(maxlen=_WINDOW))
            last.append((seconds / work, answered))

    def pass_seconds(self) -> dict[int, float]:
        """Seconds that each known client takes for a pass (``load.passes``) of a batch.

        The median of its last answers. Assignments that it has not answered count only if it has
        answered none of the last ones.
        """
        found = {}
        for client, last in self._last.items():
            answers = [seconds for seconds, answered in last if answered]
            found[client] = statistics.median_low(answers or [seconds for seconds, _ in last])
        return found
