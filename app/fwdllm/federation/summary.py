"""Figures from a ledger, round by round, and whether it gives an adapter."""

from __future__ import annotations

import filecmp
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fwdllm.engine.adapters.io import save_gguf
from fwdllm.protocol.figures import traffic
from fwdllm.protocol.gathered import answers_of
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.privacy import spent_epsilon
from fwdllm.protocol.replay import replay
from fwdllm.protocol.shards.root import n_accepted, n_asked


@dataclass(frozen=True)
class RoundSummary:
    """One closed round.

    round: counted from 1.  n_asked: assignments.  n_accepted, n_rejected: answers.
    n_perturbations: perturbations of the adapter.  loss: mean of the clients' losses, in nats.
    variance: see ``protocol.pacing.variance``.  client_seconds: sum over accepted answers.
    held_out_loss, accuracy: after the round; None if there was no evaluation.
    """

    round: int
    parts: int
    n_asked: int
    n_accepted: int
    n_rejected: int
    n_perturbations: int
    loss: float | None
    variance: float | None
    client_seconds: float
    bytes_up: int
    bytes_down: int
    held_out_loss: float | None
    accuracy: float | None


def summarize(ledger: Ledger) -> list[RoundSummary]:
    """A summary of every closed round of a run."""
    rejected = Counter(round for round, _, _, _ in ledger.rejections())
    evaluations = {row[0]: row for row in ledger.evaluations()}
    sent = {row[0]: row for row in traffic(ledger)}
    found = []
    for closed in ledger.rounds():
        r = closed.round
        parts = ledger.parts(r)
        answers = [answer for part, _, _ in parts for answer in answers_of(ledger, r, part)]
        _, _, down, up = sent.get(r, (r, 0, 0, 0))
        evaluation = evaluations.get(r + 1)
        found.append(
            RoundSummary(
                round=r + 1,
                parts=len(parts),
                n_asked=sum(n_asked(ledger, r, part) for part, _, _ in parts),
                n_accepted=sum(n_accepted(ledger, r, part) for part, _, _ in parts),
                n_rejected=rejected[r],
                n_perturbations=closed.n_perturbations,
                loss=closed.loss,
                variance=closed.variance,
                client_seconds=sum(report.seconds for _, report in answers),
                bytes_up=up,
                bytes_down=down,
                held_out_loss=evaluation[1] if evaluation else None,
                accuracy=evaluation[2] if evaluation else None,
            )
        )
    return found


def check_adapter(ledger: Ledger, path: Path) -> None:
    """LedgerError unless a replay of the ledger gives the adapter at ``path``, byte for byte."""
    if not path.is_file():
        raise LedgerError(f"there is no {path} to compare")
    with tempfile.TemporaryDirectory(prefix="fwdllm-") as folder:
        again = Path(folder) / path.name
        save_gguf(replay(ledger).space.adapter, again)
        if not filecmp.cmp(again, path, shallow=False):
            raise LedgerError(f"{path} is not the adapter after the ledger's last round")


def epsilons(ledger: Ledger) -> list[float | None]:
    """Privacy loss after each closed round, None without privacy; takes 0.1 s for each round."""
    available: list[int] = []
    found = []
    for closed in ledger.rounds():
        available += [n for _, _, n in ledger.parts(closed.round)]
        found.append(spent_epsilon(ledger.meta.config, available))
    return found
