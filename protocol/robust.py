"""Rules for clients whose directions are their own, so that their scalars cannot be compared.

A slope along a random direction is about normal with the gradient's norm for a deviation. So the
sizes of clients' slopes are comparable, and so is how well they agree with an earlier gradient,
which predicts them. "bounded" scales large slopes down; "screened" also lets clients count for less
whose agreement, over all that they have answered, is not like the others'. Both are functions of
the answers alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fwdllm.protocol.aggregate import Answer, weight_of
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.report import Report
from fwdllm.protocol.space import HEAD, Layers, Space

# Nobody's slopes are larger than this quantile of sizes. Bounds that leave honest clients alone, at
# 1.5 times that, leave liars 1.5 times as much to say; one that is too low costs little.
_QUANTILE = 0.4
# Earlier answers that tell what is usual: liars are half of ten clients by chance, but not of many.
_SIZES = 64

# The correlation of fewer slopes with anything is mostly chance: of one slope it is a sign.
LEAST_SLOPES = 8
# Share of a client's evidence that is left at its next answer: about the last 20 count, so that
# nobody can lie for long after many true answers.
_KEPT = 0.95
# Share of the reference that is left at the next round: it is a mean of about ten gradients, as
# the directions of one round say too little of a gradient.
_REFERENCE_KEPT = 0.9
# The least standard deviation of an answer's agreement from the part's median: 1 for the chance of
# directions, and that of a median of ten.
_LEAST_SPREAD = 1.14
# Standard deviations from what is typical at which a client counts in full, and not any more.
_FULL, _NOTHING = 1.5, 2.5

_GROUPS = 2  # the adapter's slopes and the head's


def bounded(answers: Sequence[Answer], standing: Standing) -> tuple[list[Answer], Standing]:
    """A part's answers with slopes that are too large scaled down, and too many examples fewer.

    A client's slopes of the adapter, and of the head, have a root mean square of at most what is
    usual in the part and in earlier answers, whatever their scopes: most honest clients' are scaled
    down a little. It counts for at most the median number of examples. The standing given back has
    these answers' sizes.
    """
    if not answers:
        return [], standing
    sizes = np.array([[_size(r.derivatives), _size(r.head_derivatives)] for _, r in answers])
    known = np.concatenate([standing.sizes, sizes])
    limits = np.array([_usual(*columns) for columns in zip(standing.sizes.T, sizes.T, strict=True)])
    factors = np.where(sizes > limits, limits / np.maximum(sizes, np.finfo(float).tiny), 1.0)
    most = statistics.median_low([report.n_examples for _, report in answers])
    found = [
        (
            assignment,
            replace(
                report,
                n_examples=min(report.n_examples, most),
                derivatives=_scaled(report.derivatives, factor),
                head_derivatives=_scaled(report.head_derivatives, head_factor),
            ),
        )
        for (assignment, report), (factor, head_factor) in zip(answers, factors, strict=True)
    ]
    return found, replace(standing, sizes=known[-_SIZES:])


@dataclass(frozen=True, eq=False)
class Standing:
    """What earlier answers say about clients. Instances are never changed.

    reference: float32 [space.size], a running mean of the rounds' gradients, not normalized.
    evidence: of each client, float64 [2, 2]: of the adapter's and the head's slopes the sum of
    deviations from what was typical, and its variance if the client is like the others.
    sizes: float64 [n, 2], root mean squares of the slopes of the last answers, oldest first.
    "bounded" needs sizes alone.
    """

    reference: np.ndarray
    evidence: Mapping[int, np.ndarray]
    sizes: np.ndarray

    @staticmethod
    def initial(space: Space) -> Standing:
        """Before the first round."""
        return Standing(np.zeros(space.size, np.float32), {}, np.zeros((0, _GROUPS)))

    def heard(self, space: Space, answers: Sequence[Answer]) -> Standing:
        """With a part's answers as further evidence."""
        found = np.array([_agreements(space, self.reference, *answer) for answer in answers])
        evidence = dict(self.evidence)
        for group in range(_GROUPS) if answers else []:
            known: list[int] = np.flatnonzero(~np.isnan(found[:, group])).tolist()
            trusted = np.array([self.share(answers[i][0].client) >= 0.5 for i in known], bool)
            deviations = _deviations(found[known, group], trusted)
            for i, deviation in zip(known, deviations, strict=True):
                client = answers[i][0].client
                mine = evidence.get(client, np.zeros((_GROUPS, 2))).copy()
                mine[group] = mine[group] * (_KEPT, _KEPT**2) + (deviation, 1)
                evidence[client] = mine
        return replace(self, evidence=evidence)

    def moved(self, gradient: np.ndarray) -> Standing:
        """After a round with this gradient, float32 [space.size]."""
        kept = np.float32(_REFERENCE_KEPT)
        return replace(self, reference=self.reference * kept + gradient * (1 - kept))

    def share(self, client: int) -> float:
        """What a client counts, from 0 to 1: by the worse of its two kinds of slopes."""
        share = 1.0
        for total, variance in self.evidence.get(client, ()):
            away = abs(total) / math.sqrt(variance) if variance else 0.0
            share = min(share, (_NOTHING - away) / (_NOTHING - _FULL))
        return max(share, 0.0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As vectors."""
        clients = sorted(self.evidence)
        evidence = [self.evidence[client] for client in clients]
        return {
            "reference": self.reference,
            "clients": np.array(clients, np.int64),
            "evidence": np.array(evidence, np.float64).ravel(),
            "sizes": self.sizes.ravel(),
        }

    @staticmethod
    def from_arrays(arrays: Mapping[str, np.ndarray], size: int) -> Standing:
        """The inverse of ``to_arrays``; ValueError unless the reference is float32 [size]."""
        reference = arrays["reference"]
        if reference.shape != (size,) or reference.dtype != np.float32:
            raise ValueError(f"a reference of {reference.size} is not {size}")
        clients = arrays["clients"].tolist()
        evidence = arrays["evidence"].reshape(len(clients), _GROUPS, 2).copy()
        sizes = arrays["sizes"].reshape(-1, _GROUPS).copy()
        return Standing(reference.copy(), dict(zip(clients, evidence, strict=True)), sizes)


def screened(
    config: FederationConfig, answers: Sequence[Answer], standing: Standing
) -> tuple[list[Answer], list[float]]:
    """Those of a part's answers that count, and what each counts in the mean.

    answers: as ``bounded`` gives them.  standing: with these answers heard.
    """
    shares = [standing.share(assignment.client) for assignment, _ in answers]
    kept = [(answer, share) for answer, share in zip(answers, shares, strict=True) if share > 0]
    return [answer for answer, _ in kept], [weight_of(config, a) * share for a, share in kept]


def _usual(before: np.ndarray, sizes: np.ndarray) -> float:
    """The most that slopes of a part may have, by its sizes and those of earlier answers.

    Earlier ones of 0 say nothing: in the first round of a run with a head all slopes of the adapter
    are, as the head is empty, and those of the second round would be scaled to nothing.
    """
    known = np.concatenate([before[before > 0], sizes])
    return float(np.quantile(known, _QUANTILE, method="lower"))


def _size(values: np.ndarray) -> float:
    """The root mean square, 0 without values."""
    squares = np.square(values, dtype=np.float64)
    return math.sqrt(float(squares.mean())) if squares.size else 0.0


def _scaled(values: np.ndarray, factor: float) -> np.ndarray:
    return values if factor == 1 else (values * factor).astype(np.float32)


def _agreements(
    space: Space, reference: np.ndarray, assignment: Assignment, report: Report
) -> tuple[float, float]:
    """How well an answer's slopes of the adapter and the head agree with the reference.

    The correlation times the root of the number of slopes: by chance of variance 1 around 0. NaN
    where there are too few slopes or no reference.
    """
    return (
        _agreement(space, reference, assignment.layers, assignment.seeds, report.derivatives),
        _agreement(space, reference, HEAD, assignment.head_seeds, report.head_derivatives),
    )


def _agreement(
    space: Space, reference: np.ndarray, layers: Layers, seeds: np.ndarray, slopes: np.ndarray
) -> float:
    if seeds.size < LEAST_SLOPES:
        return math.nan
    predicted = space.dot(reference, layers, seeds.ravel())
    norm = math.sqrt(float(np.sum(predicted * predicted)))
    if norm == 0:
        return math.nan
    values = slopes.ravel().astype(np.float64)
    size = math.sqrt(float(np.sum(values * values)))
    if size == 0:
        return 0.0
    # Sums rather than BLAS, whose order of addition may depend on where arrays lie in memory.
    return math.sqrt(seeds.size) * float(np.sum(values / size * (predicted / norm)))


def _deviations(agreements: np.ndarray, trusted: np.ndarray) -> np.ndarray:
    """From what is typical, in units of its spread, which hostile clients cannot make small.

    trusted: whose agreement tells what is typical, unless they are fewer than half of all: known
    liars would move the median from the middle of the honest.
    """
    if not agreements.size:
        return agreements
    typical = agreements[trusted] if 3 * trusted.sum() >= 2 * len(trusted) else agreements
    middle = np.median(typical)
    # Of normal numbers, the median distance is 0.6745 standard deviations.
    spread = float(np.median(np.abs(typical - middle))) / 0.6745
    return (agreements - middle) / max(_LEAST_SPREAD, spread)
