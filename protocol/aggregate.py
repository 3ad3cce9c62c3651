"""From clients' reports to one gradient.

Scalars become terms: seeds with coefficients. Clients need only the terms to follow the server.
Terms come in two halves; the variance is computed from the halves' gradients
(``fwdllm.protocol.pacing``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from fwdllm.protocol.federation import COHORT, FederationConfig
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.privacy import private_sum
from fwdllm.protocol.report import Report
from fwdllm.protocol.space import HEAD, Layers, Space, covers

Answer: TypeAlias = "tuple[Assignment, Report]"


@dataclass(frozen=True, eq=False)
class Term:
    """sum_k coefficients[k] z(seeds[k]) in a scope: one summand of a weighted mean.

    half: 0 or 1.  layers: the scope.  seeds: uint64 [k].  coefficients: float32 [k].
    weight: what this term adds to the divisor of the mean.
    """

    half: int
    layers: Layers
    seeds: np.ndarray
    coefficients: np.ndarray
    weight: float


def terms_of(
    config: FederationConfig,
    answers: Sequence[Answer],
    part: int,
    weights: Sequence[float] | None = None,
) -> list[Term]:
    """The terms of a part's accepted answers. answers: must be sorted by client.

    weights: of the answers, above 0, where clients have seeds of their own; by default
    ``weight_of``.
    """
    if config.seeds == "shared" and config.one_step_of_seeds:
        return _shared_terms(config, answers)
    if weights is None:
        weights = [weight_of(config, answer) for answer in answers]
    weighed = list(zip(answers, weights, strict=True))
    found = []
    for layers in dict.fromkeys(assignment.layers for assignment, _ in answers):
        members = [one for one in weighed if one[0][0].layers == layers]
        found += _own_terms(config, layers, members, part)
    return found + _own_terms(config, HEAD, weighed, part)


def private_terms(
    config: FederationConfig,
    answers: Sequence[Answer],
    seeds: np.ndarray,
    head_seeds: np.ndarray,
    n_expected: float,
    noise_seed: int,
) -> list[Term]:
    """As ``terms_of``, with differential privacy: noise is added even if nobody has answered.

    seeds, head_seeds: uint64, the seeds that all clients of the part were given.  n_expected: the
    number of clients by which sums are divided.  noise_seed: seed of the noise; only the server may
    know it.
    """
    rows = [np.concatenate([r.derivatives[0], r.head_derivatives[0]]) for _, r in answers]
    size = len(seeds) + len(head_seeds)
    if config.secure:  # clients have clipped, and have added the noise
        total = rows[0].astype(np.float64) * answers[0][1].n_examples
    else:
        total = private_sum(np.array(rows).reshape(-1, size), config.clip, config.sigma, noise_seed)
    slopes, head = np.split(total, [len(seeds)])
    return _halves(None, seeds, slopes, n_expected) + _halves(HEAD, head_seeds, head, n_expected)


def _own_terms(
    config: FederationConfig, layers: Layers, weighed: Sequence[tuple[Answer, float]], part: int
) -> list[Term]:
    """Terms of clients with seeds of their own: each counts by its weight alone, whatever the
    number of its perturbations. weighed: answers, each with its weight.

    Every other client goes to the other half; of a single client, every other seed. A single client
    with a single seed goes to the half of the part's parity.
    """
    step = config.client_learning_rate if config.upload == "steps" else 1.0
    rows = []
    for (assignment, report), weight in weighed:
        is_head = layers == HEAD
        seeds = assignment.head_seeds if is_head else assignment.seeds
        slopes = report.head_derivatives if is_head else report.derivatives
        # What a perturbation of its counts for: less where ``adaptive`` has given it more of them.
        usual = config.head_perturbations if is_head else config.perturbations
        share = usual / max(1, seeds.shape[1])
        rows.append((seeds, slopes, weight * share))
    if not rows or rows[0][0].size == 0:
        return []
    if len(rows) > 1:
        halves = [rows[0::2], rows[1::2]]
    elif rows[0][0].shape[1] > 1:
        (seeds, slopes, weight) = rows[0]
        halves = [[(seeds[:, h::2], slopes[:, h::2], weight)] for h in (0, 1)]
    else:
        halves = [rows, []] if part % 2 == 0 else [[], rows]
    return [
        Term(
            half,
            layers,
            np.concatenate([seeds.ravel() for seeds, _, _ in members]),
            np.concatenate(
                [slopes.ravel() * np.float64(weight * step) for _, slopes, weight in members]
            ).astype(np.float32),
            sum(weight * seeds.shape[1] for seeds, _, weight in members),
        )
        for half, members in enumerate(halves)
        if members
    ]


def _shared_terms(config: FederationConfig, answers: Sequence[Answer]) -> list[Term]:
    """Terms of clients with the same seeds: the scalars of each seed are combined over clients."""
    found: list[Term] = []
    scopes = list(dict.fromkeys(assignment.layers for assignment, _ in answers))
    for layers in [*scopes, HEAD] if answers else []:
        is_head = layers == HEAD
        members = answers if is_head else [a for a in answers if a[0].layers == layers]
        first = members[0][0]
        slopes = np.stack(
            [(r.head_derivatives if is_head else r.derivatives)[0] for _, r in members]
        )
        weights = np.array([weight_of(config, answer) for answer in members])
        weight = float(weights.sum())
        seeds = (first.head_seeds if is_head else first.seeds)[0]
        found += _halves(layers, seeds, weight * combine(config, slopes, weights), weight)
    return found


def _halves(layers: Layers, seeds: np.ndarray, sums: np.ndarray, weight: float) -> list[Term]:
    """Two terms, each with every other seed.

    sums: of each seed, the sum over clients.  weight: the sum of the clients' weights.
    """
    return [
        Term(h, layers, seeds[h::2], sums[h::2].astype(np.float32), weight * len(seeds[h::2]))
        for h in (0, 1)
        if len(seeds[h::2])
    ]


def combine(config: FederationConfig, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Clients' values [n_clients, k] combined coordinate by coordinate: float64 [k].

    The mean is weighted. The trimmed mean and the median ignore weights, because a hostile client
    could choose a large one.
    """
    values = values.astype(np.float64)
    if config.aggregate == "mean":
        return weights @ values / weights.sum()
    if config.aggregate == "median":
        return np.median(values, axis=0)
    cut = int(config.trim * len(values))
    return np.sort(values, axis=0)[cut : len(values) - cut].mean(axis=0)


def mean_vector(
    config: FederationConfig, space: Space, answers: Sequence[Answer]
) -> np.ndarray | None:
    """The gradient where clients upload weights: float32 [space.size], or None without answers.

    A coordinate is combined over the clients whose scope includes it; it is zero if there are none.
    """
    if not answers:
        return None
    out = np.zeros(space.size, np.float32)
    for unit in space.units():
        # All clients train a head.
        members = [(a, r) for a, r in answers if unit == HEAD or covers(a.layers, unit)]
        if not members:
            continue
        weights = np.array([weight_of(config, answer) for answer in members])
        vectors = [space.unpack(_vector(report), a.layers) for a, report in members]
        for start, end in space.ranges(unit):
            values = np.stack([vector[start:end] for vector in vectors])
            out[start:end] = combine(config, values, weights)
    return out


@dataclass(eq=False)
class Sums:
    """The sums of a round's terms. halves: float32 [2, space.size].  weights: by half and scope."""

    space: Space
    halves: np.ndarray = field(init=False)
    weights: dict[tuple[int, Layers], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.halves = np.zeros((2, self.space.size), np.float32)

    def add(self, terms: Iterable[Term]) -> None:
        """Add terms. Bits match the server's only if the order of the terms is the server's."""
        for term in terms:
            self.space.add(self.halves[term.half], term.layers, term.seeds, term.coefficients)
            key = (term.half, term.layers)
            self.weights[key] = self.weights.get(key, 0.0) + term.weight

    def gradient(self) -> np.ndarray:
        """The mean forward gradient, zero in scopes without a term: float32 [space.size]."""
        return self._mean(self.halves[0] + self.halves[1], (0, 1))

    def half_gradients(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The gradients of the two halves; None unless both cover the same units, at least one."""
        covered = [
            [unit for unit in self.space.units() if self._weight(unit, (half,)) > 0]
            for half in (0, 1)
        ]
        if not covered[0] or covered[0] != covered[1]:
            return None
        return self._mean(self.halves[0], (0,)), self._mean(self.halves[1], (1,))

    def _mean(self, total: np.ndarray, halves: Sequence[int]) -> np.ndarray:
        out = np.zeros_like(total)
        for unit in self.space.units():
            weight = self._weight(unit, halves)
            for start, end in self.space.ranges(unit) if weight > 0 else []:
                out[start:end] = total[start:end] * np.float32(1 / weight)
        return out

    def _weight(self, unit: Layers, halves: Sequence[int]) -> float:
        found = self.weights.items()
        return sum(w for (half, layers), w in found if half in halves and covers(layers, unit))


def weight_of(config: FederationConfig, answer: Answer) -> float:
    """What an answer counts. The sum of many has the sum of their weights for its examples."""
    assignment, report = answer
    return float(report.n_examples) if config.weighted or assignment.client == COHORT else 1.0


def _vector(report: Report) -> np.ndarray:
    assert report.vector is not None
    return report.vector
