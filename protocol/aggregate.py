"""From clients' reports to one gradient.

Scalars become terms, coefficients of seeds, which are all that clients need to follow the server.
Terms come in two halves, whose gradients tell the variance (``fwdllm.protocol.pacing``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.privacy import private_sum
from fwdllm.protocol.report import Report
from fwdllm.protocol.space import HEAD, Layers, Space

Answer: TypeAlias = "tuple[Assignment, Report]"


@dataclass(frozen=True, eq=False)
class Term:
    """sum_k coefficients[k] z(seeds[k]) in a scope: part of a sum that ``weight`` divides.

    half: 0 or 1.  seeds: uint64 [k].  coefficients: float32 [k].
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
    n_expected: float = 0.0,
    noise_seed: int = 0,
) -> list[Term]:
    """The terms of a part's accepted answers; they must be in order of clients.

    n_expected: clients that differential privacy divides by.  noise_seed: of its noise, which
    nobody but the server may know.
    """
    if config.seeds == "shared" and config.upload == "scalars":
        return _shared_terms(config, answers, n_expected, noise_seed)
    found = []
    for layers in dict.fromkeys(assignment.layers for assignment, _ in answers):
        members = [answer for answer in answers if answer[0].layers == layers]
        found += _own_terms(config, layers, members, part)
    return found + _own_terms(config, HEAD, answers, part)


def _own_terms(
    config: FederationConfig, layers: Layers, answers: Sequence[Answer], part: int
) -> list[Term]:
    """Halves are every other client, or of a single client every other seed."""
    step = config.client_learning_rate if config.upload == "steps" else 1.0
    rows = []
    for assignment, report in answers:
        is_head = layers == HEAD
        seeds = assignment.head_seeds if is_head else assignment.seeds
        slopes = report.head_derivatives if is_head else report.derivatives
        rows.append((seeds, slopes, _weight(config, report)))
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


def _shared_terms(
    config: FederationConfig, answers: Sequence[Answer], n_expected: float, noise_seed: int
) -> list[Term]:
    """Scalars of a seed are combined over clients; halves are every other seed."""
    if not answers:
        return []
    first, found = answers[0][0], []
    if config.sigma > 0:
        rows = [np.concatenate([r.derivatives[0], r.head_derivatives[0]]) for _, r in answers]
        total = private_sum(np.stack(rows), config.clip, config.sigma, noise_seed)
        sums = np.split(total, [config.perturbations])
        weight = n_expected
    scopes = [(s, i) for i, s in enumerate(dict.fromkeys(a.layers for a, _ in answers))]
    for layers, _ in [*scopes, (HEAD, 0)]:
        is_head = layers == HEAD
        members = answers if is_head else [a for a in answers if a[0].layers == layers]
        seeds = (first.head_seeds if is_head else first.seeds)[0]
        if config.sigma > 0:
            combined = sums[int(is_head)]
        else:
            slopes = np.stack(
                [(r.head_derivatives if is_head else r.derivatives)[0] for _, r in members]
            )
            weights = np.array([_weight(config, r) for _, r in members])
            weight = float(weights.sum())
            combined = weight * combine(config, slopes, weights)
        for half in (0, 1):
            if len(seeds[half::2]):
                coefficients = combined[half::2].astype(np.float32)
                n = len(coefficients)
                found.append(Term(half, layers, seeds[half::2], coefficients, weight * n))
    return found


def combine(config: FederationConfig, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values of clients, [n_clients, k], by coordinate: float64 [k].

    The mean by weights; the trimmed mean and the median count all clients alike, as a weight is
    what a hostile client would choose.
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
    """The gradient of clients that upload weights: float32 [space.size], or None without any.

    A coordinate is combined over the clients whose scope has it, and zero if none has.
    """
    if not answers:
        return None
    out = np.zeros(space.size, np.float32)
    scopes = list(dict.fromkeys(assignment.layers for assignment, _ in answers))
    heads, head_weights = [], []
    for layers in scopes:
        members = [report for assignment, report in answers if assignment.layers == layers]
        vectors = np.stack([space.unpack(_vector(r), layers) for r in members])
        weights = np.array([_weight(config, r) for r in members])
        out += space.inside(combine(config, vectors, weights).astype(np.float32), layers)
        heads.append(vectors[:, space.n_coordinates :])
        head_weights.append(weights)
    if space.adapter.n_head:
        head = combine(config, np.concatenate(heads), np.concatenate(head_weights))
        out[space.n_coordinates :] = head.astype(np.float32)
    return out


@dataclass(eq=False)
class Sums:
    """Terms of a round added up. halves: float32 [2, space.size]; weights by half and scope."""

    space: Space
    halves: np.ndarray = field(init=False)
    weights: dict[tuple[int, Layers], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.halves = np.zeros((2, self.space.size), np.float32)

    def add(self, terms: Iterable[Term]) -> None:
        """Terms in the order in which the server met them, so that bits are its own."""
        for term in terms:
            self.space.add(self.halves[term.half], term.layers, term.seeds, term.coefficients)
            key = (term.half, term.layers)
            self.weights[key] = self.weights.get(key, 0.0) + term.weight

    def gradient(self) -> np.ndarray:
        """The mean forward gradient, zero in scopes without a term: float32 [space.size]."""
        return self._mean(self.halves[0] + self.halves[1], (0, 1))

    def half_gradients(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Those of the two halves, or None where a scope is in one of them alone."""
        scopes = [{layers for half, layers in self.weights if half == h} for h in (0, 1)]
        if not scopes[0] or scopes[0] != scopes[1]:
            return None
        return self._mean(self.halves[0], (0,)), self._mean(self.halves[1], (1,))

    def _mean(self, total: np.ndarray, halves: Sequence[int]) -> np.ndarray:
        out = np.zeros_like(total)
        for layers in dict.fromkeys(layers for _, layers in self.weights):
            weight = sum(self.weights.get((half, layers), 0.0) for half in halves)
            out += self.space.inside(total, layers) * np.float32(1 / weight)
        return out


def _weight(config: FederationConfig, report: Report) -> float:
    return float(report.n_examples) if config.weighted else 1.0


def _vector(report: Report) -> np.ndarray:
    assert report.vector is not None
    return report.vector
