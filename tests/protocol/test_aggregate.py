"""Gradients out of reports against sums written out in NumPy; variance, pacing and privacy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import cpu, reference
from fwdllm.protocol.aggregate import (
    Answer,
    Sums,
    Term,
    combine,
    mean_vector,
    private_terms,
    terms_of,
)
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.pacing import enough, threshold, variance
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.privacy import private_sum, spent_epsilon
from fwdllm.protocol.report import Report, expected_shapes, fault
from fwdllm.protocol.space import HEAD, Layers, Space, covers

SHAPES = {
    f"blk.{i}.{name}": shape for i in range(3) for name, shape in [("q", (6, 5)), ("v", (3, 5))]
}
RANK, PER_LAYER = 2, 2 * (6 + 5) + 2 * (3 + 5)
PRIVATE: dict[str, Any] = {"sigma": 0.5, "seeds": "shared", "weighted": False}


def make(**changes: Any) -> FederationConfig:
    defaults = {"rounds": 10, "perturbations": 3, "head_perturbations": 4, "batch_size": 64}
    return FederationConfig(**{**defaults, **changes})


def space_of(config: FederationConfig, head: bool = True) -> Space:
    lora = LoRAConfig(rank=RANK, targets=("q", "v"))
    labels = Head(("a", "b"), 4) if head else None
    return Space(Adapter.create("llama", SHAPES, lora, 1, cpu, labels), config)


def answers_of(
    config: FederationConfig,
    space: Space,
    scopes: Sequence[Layers],
    part: int = 0,
    values: int = 7,
) -> list[Answer]:
    """Answers with random scalars or weights, of one client for each scope."""
    random = np.random.default_rng([part, values])
    shape = config.seed_steps, config.perturbations
    of_head = config.seed_steps, config.head_perturbations if space.adapter.n_head else 0

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return random.integers(0, 2**63, shape).astype(np.uint64)

    shared = draw(shape), draw(of_head)
    found = []
    for client, layers in enumerate(scopes):
        seeds = shared if config.seeds == "shared" else (draw(shape), draw(of_head))
        assignment = Assignment(0, part, client, layers, *seeds, 0, 0)
        slopes, heads, n = expected_shapes(config, space, assignment)
        report = Report(
            0,
            part,
            int(random.integers(1, 9)),
            0,
            0.0,
            1.0,
            random.standard_normal(slopes).astype(np.float32),
            random.standard_normal(heads).astype(np.float32),
            random.standard_normal(n).astype(np.float32) if n else None,
        )
        found.append((assignment, report))
    return found


def gradient_of(config: FederationConfig, space: Space, *parts: Sequence[Answer]) -> np.ndarray:
    sums = Sums(space)
    for part, answers in enumerate(parts):
        sums.add(terms_of(config, answers, part))
    return sums.gradient()


# The same sums, written out


def inside(space: Space, layers: Layers) -> np.ndarray:
    """Where a scope is among all parameters; each layer has its PER_LAYER of them in turn."""
    mask = np.zeros(space.size, bool)
    for layer in range(3):
        mask[layer * PER_LAYER : (layer + 1) * PER_LAYER] = layers is None or layer in layers
    return mask


def forward_gradient(
    config: FederationConfig, space: Space, seeds: np.ndarray, slopes: np.ndarray
) -> np.ndarray:
    """sum over local steps of the mean over perturbations of g v, of all parameters."""
    stream = reference.rademacher if config.directions == "rademacher" else reference.normal
    total = np.zeros(space.size)
    for step_seeds, step_slopes in zip(seeds, slopes, strict=True):
        for seed, slope in zip(step_seeds, step_slopes, strict=True):
            total += float(slope) * stream(int(seed), 0, space.size) / len(step_seeds)
    return total


def explicit(config: FederationConfig, space: Space, answers: Sequence[Answer]) -> np.ndarray:
    """The mean of clients' forward gradients by parameter, over the clients that move it."""
    total, weights = np.zeros(space.size), np.zeros(space.size)
    head = np.arange(space.size) >= 3 * PER_LAYER
    for assignment, report in answers:
        weight = report.n_examples if config.weighted else 1
        rate = config.client_learning_rate if config.upload == "steps" else 1
        mask = inside(space, assignment.layers)
        lora = forward_gradient(config, space, assignment.seeds, report.derivatives)
        of_head = forward_gradient(config, space, assignment.head_seeds, report.head_derivatives)
        total += weight * rate * (lora * mask + of_head * head)
        weights += weight * (mask | head)
    return total / np.where(weights, weights, 1)


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())


ALL, SPLIT, FEWER = [None] * 4, [(0,), (1,), (2,), (1,), (0,)], [(0, 2), (1,)]


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("scopes", [ALL, SPLIT, FEWER, [None], [(1,)]], ids=str)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"directions": "rademacher"},
        {"perturbations": 1},
        {"seeds": "shared"},
        {"upload": "steps", "local_steps": 4, "client_learning_rate": 0.01},
        {"upload": "steps", "local_steps": 2, "seeds": "shared"},
        {"upload": "steps", "local_steps": 2, "seeds": "pool", "perturbations": 1},
        {"upload": "projection", "local_steps": 4, "method": "backprop"},
        {"upload": "projection", "local_steps": 4, "method": "readout", "seeds": "shared"},
    ],
    ids=str,
)
def test_the_gradient_is_the_mean_of_clients_forward_gradients(
    changes: dict[str, Any], scopes: list[Layers], head: bool, weighted: bool
) -> None:
    config = make(weighted=weighted, split=None not in scopes, **changes)
    space = space_of(config, head)
    answers = answers_of(config, space, scopes)
    got = gradient_of(config, space, answers)
    assert got.dtype == np.float32
    assert_close(got, explicit(config, space, answers))


def test_parameters_that_nobody_moved_have_no_gradient() -> None:
    config = make(split=True)
    space = space_of(config)
    got = gradient_of(config, space, answers_of(config, space, [(1,), (1,)]))
    outside = ~inside(space, (1,))
    outside[3 * PER_LAYER :] = False
    assert not got[outside].any()
    assert got[~outside].all()


def test_a_part_without_answers_has_no_terms() -> None:
    for config in (make(), make(seeds="shared")):
        assert terms_of(config, [], 0) == []


@pytest.mark.parametrize("scopes", [ALL, SPLIT], ids=str)
def test_parts_of_own_seeds_pool_as_if_all_had_answered_in_one(scopes: list[Layers]) -> None:
    config = make(split=None not in scopes)
    space = space_of(config)
    parts = [answers_of(config, space, scopes, part) for part in range(3)]
    got = gradient_of(config, space, *parts)
    assert_close(got, gradient_of(config, space, [a for part in parts for a in part]))
    assert_close(got, explicit(config, space, [a for part in parts for a in part]))


def test_parts_of_shared_seeds_pool_by_the_examples_behind_them() -> None:
    config = make(seeds="shared")
    space = space_of(config)
    parts = [answers_of(config, space, [None] * n, part) for part, n in enumerate((4, 2))]
    got = gradient_of(config, space, *parts)
    assert_close(got, explicit(config, space, parts[0] + parts[1]))


def test_parts_with_other_scopes_pool_by_parameter() -> None:
    """Fewer clients are there for the second part, so layers are dealt in another way."""
    config = make(split=True)
    space = space_of(config)
    parts = [
        answers_of(config, space, [(0,), (1,), (2,)], 0),
        answers_of(config, space, [(0, 2), (1,)], 1),
    ]
    assert_close(gradient_of(config, space, *parts), explicit(config, space, parts[0] + parts[1]))


def test_parts_of_shared_seeds_with_other_scopes_pool_by_parameter() -> None:
    config = make(split=True, seeds="shared")
    space = space_of(config)
    parts = [
        answers_of(config, space, [(0,), (1,), (2,), (1,)], 0),
        answers_of(config, space, [(0, 2), (1,)], 1),
        answers_of(config, space, [(0, 1, 2)], 2),
    ]
    assert_close(
        gradient_of(config, space, *parts),
        explicit(config, space, [a for part in parts for a in part]),
    )


# Units


def test_units_are_layers_of_a_split_or_all_and_then_the_head() -> None:
    split, whole = make(split=True), make()
    assert space_of(split).units() == [(0,), (1,), (2,), HEAD]
    assert space_of(split, head=False).units() == [(0,), (1,), (2,)]
    assert space_of(whole).units() == [None, HEAD]
    assert space_of(whole, head=False).units() == [None]


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"split": True}, {"directions": "lora-fa"}, {"directions": "subzero", "dimension": 2}],
    ids=str,
)
def test_ranges_of_units_are_all_parameters_once(changes: dict[str, Any], head: bool) -> None:
    space = space_of(make(**changes), head)
    ranges = [one for unit in space.units() for one in space.ranges(unit)]
    found = [i for start, end in ranges for i in range(start, end)]
    assert sorted(found) == list(range(space.size))
    assert all(start < end for start, end in ranges)


@pytest.mark.parametrize("layers", [None, (0,), (2,), (0, 2), (0, 1, 2), HEAD], ids=str)
def test_a_scope_is_made_of_the_units_that_it_covers(layers: Layers) -> None:
    space = space_of(make(split=True))
    mask = np.zeros(space.size, bool)
    for start, end in space.ranges(layers):
        mask[start:end] = True
    want = np.zeros(space.size, bool)
    for unit in space.units():
        for start, end in space.ranges(unit) if covers(layers, unit) else []:
            want[start:end] = True
    np.testing.assert_array_equal(mask, want)
    head = np.arange(space.size) >= 3 * PER_LAYER
    np.testing.assert_array_equal(mask, head if layers == HEAD else inside(space, layers))


def test_a_whole_scope_covers_all_but_the_head_and_the_head_itself_alone() -> None:
    assert covers(None, None)
    assert covers(None, (3,))
    assert not covers(None, HEAD)
    assert covers(HEAD, HEAD)
    assert not covers(HEAD, None)
    assert not covers(HEAD, (0,))
    assert not covers((0,), HEAD)
    assert covers((0, 2), (2,))
    assert not covers((0, 2), (1,))
    assert not covers((0, 2), None)


# Robust combinations


@pytest.mark.parametrize("scopes", [[None] * 7, [(0,), (1,), (0,), (0,), (2,), (0,)]], ids=str)
@pytest.mark.parametrize(("aggregate", "trim"), [("trimmed", 0.2), ("median", 0.1)])
def test_robust_scalars_are_combined_by_seed(
    scopes: list[Layers], aggregate: str, trim: float
) -> None:
    config = make(seeds="shared", aggregate=aggregate, trim=trim, split=None not in scopes)
    space = space_of(config)
    answers = answers_of(config, space, scopes)
    head = np.arange(space.size) >= 3 * PER_LAYER

    def robust(values: list[np.ndarray]) -> np.ndarray:
        columns = np.sort(np.stack(values).astype(np.float64), axis=0)
        n = len(columns)
        cut = int(trim * n) if aggregate == "trimmed" else (n - 1) // 2
        return columns[cut : n - cut].mean(axis=0)

    want = np.zeros(space.size)
    for layers in set(scopes):
        slopes = robust([r.derivatives for a, r in answers if a.layers == layers])
        want += forward_gradient(config, space, answers[0][0].seeds, slopes) * inside(space, layers)
    slopes = robust([r.head_derivatives for _, r in answers])
    want += forward_gradient(config, space, answers[0][0].head_seeds, slopes) * head
    assert_close(gradient_of(config, space, answers), want)


@given(st.integers(1, 12), st.sampled_from([0.0, 0.1, 0.25, 0.4, 0.49]))
def test_trimmed_means_and_medians_are_those_of_sorted_lists(n: int, trim: float) -> None:
    random = np.random.default_rng(n)
    values = random.standard_normal((n, 3)).astype(np.float32)
    weights = random.integers(1, 9, n).astype(float)
    trimmed = make(seeds="shared", aggregate="trimmed", trim=trim)
    median = make(seeds="shared", aggregate="median")
    for column in range(3):
        ordered = sorted(float(v) for v in values[:, column])
        kept = ordered[int(trim * n) : n - int(trim * n)]
        assert combine(trimmed, values, weights)[column] == pytest.approx(sum(kept) / len(kept))
        middle = ordered[(n - 1) // 2], ordered[n // 2]
        assert combine(median, values, weights)[column] == pytest.approx(sum(middle) / 2)
        mean = sum(w * float(v) for w, v in zip(weights, values[:, column], strict=True))
        got = combine(make(), values, weights)[column]
        assert got == pytest.approx(mean / weights.sum(), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("aggregate", ["trimmed", "median"])
def test_one_liar_among_five_does_not_move_a_robust_combination_out_of_the_others(
    aggregate: str,
) -> None:
    config = make(seeds="shared", aggregate=aggregate, trim=0.2)
    honest = np.array([[1.0], [2.0], [3.0], [4.0]])
    for lie in (-1e4, 1e4):
        values = np.concatenate([honest, [[lie]]])
        assert 1 <= combine(config, values, np.array([1, 1, 1, 1, 1e9]))[0] <= 4


# Weights


@pytest.mark.parametrize("aggregate", ["mean", "trimmed", "median"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("scopes", [[None] * 5, SPLIT, [(1,)], FEWER], ids=str)
def test_weights_are_combined_by_parameter_over_those_who_have_it(
    scopes: list[Layers], weighted: bool, aggregate: str
) -> None:
    changes = {"aggregate": aggregate, "trim": 0.25, "weighted": weighted}
    config = make(upload="weights", split=None not in scopes, **changes)
    space = space_of(config)
    answers = answers_of(config, space, scopes)
    assert_close(mean_vector(config, space, answers), combined_by_parameter(config, space, answers))


def combined_by_parameter(
    config: FederationConfig, space: Space, answers: Sequence[Answer]
) -> np.ndarray:
    found: list[list[tuple[float, float]]] = [[] for _ in range(space.size)]
    for assignment, report in answers:
        mask = inside(space, assignment.layers)
        mask[3 * PER_LAYER :] = True
        assert report.vector is not None
        for at, value in zip(np.flatnonzero(mask), report.vector, strict=True):
            found[at].append((float(value), report.n_examples if config.weighted else 1))
    want = np.zeros(space.size)
    for at, pairs in enumerate(found):
        if not pairs:
            continue
        values = sorted(value for value, _ in pairs)
        n = len(values)
        if config.aggregate == "mean":
            want[at] = sum(v * w for v, w in pairs) / sum(w for _, w in pairs)
        elif config.aggregate == "median":
            want[at] = (values[(n - 1) // 2] + values[n // 2]) / 2
        else:
            cut = int(config.trim * n)
            want[at] = sum(values[cut : n - cut]) / (n - 2 * cut)
    return want


def test_weights_of_parts_with_other_scopes_are_combined_by_parameter() -> None:
    config = make(upload="weights", split=True)
    space = space_of(config)
    answers = answers_of(config, space, [(0,), (1,), (2,)], 0)
    answers += answers_of(config, space, [(0, 2), (1,)], 1)
    assert_close(mean_vector(config, space, answers), combined_by_parameter(config, space, answers))


def test_no_weights_are_no_gradient() -> None:
    config = make(upload="weights")
    assert mean_vector(config, space_of(config), []) is None


# Variance


def naive_variance(
    config: FederationConfig, space: Space, halves: Sequence[Sequence[Answer]]
) -> float:
    """The unbiased variance of two gradients, mean over parameters."""
    gradients = [explicit(config, space, half) for half in halves]
    return float(np.var(gradients, axis=0, ddof=1).mean())


def variance_of(config: FederationConfig, space: Space, *parts: Sequence[Answer]) -> float | None:
    sums = Sums(space)
    for part, answers in enumerate(parts):
        sums.add(terms_of(config, answers, part))
    return variance(sums)


def columns(answers: Sequence[Answer], half: int) -> list[Answer]:
    """The answers with every other seed alone."""

    def take(assignment: Assignment, report: Report) -> Answer:
        a, r, at = assignment, report, slice(half, None, 2)
        assignment = Assignment(
            *(a.round, a.part, a.client, a.layers),
            *(a.seeds[:, at], a.head_seeds[:, at], a.batch_seed, a.first_step),
        )
        report = Report(
            *(r.round, r.part, r.n_examples, r.n_tokens, r.seconds, r.loss),
            *(r.derivatives[:, at], r.head_derivatives[:, at]),
        )
        return assignment, report

    return [take(*answer) for answer in answers]


@pytest.mark.parametrize("n", [2, 3, 6])
@pytest.mark.parametrize("upload", ["scalars", "steps"])
def test_variance_of_own_seeds_is_that_of_two_halves_of_the_clients(upload: str, n: int) -> None:
    config = make(upload=upload)
    space = space_of(config)
    answers = answers_of(config, space, [None] * n)
    want = naive_variance(config, space, (answers[0::2], answers[1::2]))
    assert variance_of(config, space, answers) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(("seeds", "n"), [("own", 1), ("shared", 1), ("shared", 5)])
def test_variance_of_one_client_or_of_shared_seeds_is_that_of_two_halves_of_the_seeds(
    seeds: str, n: int
) -> None:
    config = make(seeds=seeds)
    space = space_of(config)
    answers = answers_of(config, space, [None] * n)
    want = naive_variance(config, space, (columns(answers, 0), columns(answers, 1)))
    assert variance_of(config, space, answers) == pytest.approx(want, rel=1e-4)


def test_variance_of_a_split_is_that_of_halves_of_each_scope() -> None:
    config = make(split=True)
    space = space_of(config, head=False)
    answers = answers_of(config, space, [(0,), (1,), (2,), (0,), (1,), (2,)])
    want = naive_variance(config, space, (answers[:3], answers[3:]))
    assert variance_of(config, space, answers) == pytest.approx(want, rel=1e-4)


def test_variance_of_parts_with_other_scopes_is_that_of_halves_by_parameter() -> None:
    config = make(split=True)
    space = space_of(config, head=False)
    first = answers_of(config, space, [(0,), (1,), (2,), (0,), (1,), (2,)], 0)
    second = answers_of(config, space, [(0, 2), (1,), (0, 2), (1,)], 1)
    want = naive_variance(config, space, (first[:3] + second[:2], first[3:] + second[2:]))
    assert variance_of(config, space, first, second) == pytest.approx(want, rel=1e-4)


def test_halves_are_compared_where_overlapping_scopes_leave_no_layer_in_one_alone() -> None:
    config = make(split=True, perturbations=1)
    space = space_of(config, head=False)
    first = answers_of(config, space, [(0,), (1,), (2,)], 0)
    second = answers_of(config, space, [(0, 1, 2)], 1)
    assert variance_of(config, space, first) is None
    # All of the first part is in one half, all of the second in the other.
    want = naive_variance(config, space, (first, second))
    assert variance_of(config, space, first, second) == pytest.approx(want, rel=1e-4)
    fewer = answers_of(config, space, [(0, 1)], 1)
    assert variance_of(config, space, first, fewer) is None


def test_variance_falls_as_parts_are_pooled() -> None:
    config = make(weighted=False)
    space = space_of(config, head=False)
    parts = [answers_of(config, space, [None] * 8, part) for part in range(16)]
    first, last = variance_of(config, space, parts[0]), variance_of(config, space, *parts)
    assert first is not None
    assert last is not None
    assert first / last == pytest.approx(16, rel=0.6)


def test_halves_that_agree_have_no_variance() -> None:
    config = make()
    space = space_of(config)
    (answer,) = answers_of(config, space, [None])
    assert variance_of(config, space, [answer, answer]) == 0


@pytest.mark.parametrize("scopes", [[None], [(0,), (1,), (2,)], [(0,), (1,), (0,)]], ids=str)
def test_variance_is_unknown_where_a_scope_is_in_one_half_alone(scopes: list[Layers]) -> None:
    config = make(perturbations=1, head_perturbations=1, split=None not in scopes)
    space = space_of(config)
    assert variance_of(config, space) is None
    assert variance_of(config, space, []) is None
    parts = [answers_of(config, space, scopes, part) for part in (0, 1)]
    assert variance_of(config, space, parts[0]) is None
    # A scope of one client is in the other half in the next part.
    assert variance_of(config, space, *parts) is not None


# Pacing


def test_a_threshold_that_is_set_holds_from_the_start() -> None:
    assert threshold(make(variance_threshold=0.5), []) == 0.5
    assert threshold(make(variance_threshold=0.5), [9.0] * 9) == 0.5


def test_a_calibrated_threshold_is_the_median_of_the_first_rounds() -> None:
    config = make(calibration_rounds=3)
    assert threshold(config, []) is None
    assert threshold(config, [5.0, 1.0]) is None
    assert threshold(config, [5.0, 1.0, 3.0]) == 3
    assert threshold(config, [5.0, 1.0, 3.0, 100.0, 100.0, 100.0]) == 3
    assert threshold(make(calibration_rounds=2), [5.0, 1.0]) == 3


@pytest.mark.parametrize(
    ("changes", "part", "found", "is_enough"),
    [
        ({"pacing": False}, 0, 1e9, True),
        ({"pacing": False}, 0, None, True),
        ({"variance_threshold": 1.0}, 0, 0.5, True),
        ({"variance_threshold": 1.0}, 0, 1.0, True),
        ({"variance_threshold": 1.0}, 0, 1.1, False),
        ({"variance_threshold": 1.0}, 0, None, False),
        ({"variance_threshold": 1.0}, 2, 1.1, False),
        ({"variance_threshold": 1.0}, 3, 1.1, True),
        ({"variance_threshold": 1.0}, 3, None, True),
        ({"calibration_rounds": 4}, 0, 1e9, True),
        ({"calibration_rounds": 3}, 0, 2.1, False),
        ({"calibration_rounds": 3}, 0, 2.0, True),
    ],
    ids=str,
)
def test_a_round_ends_at_its_threshold_or_last_part(
    changes: dict[str, Any], part: int, found: float | None, is_enough: bool
) -> None:
    config = make(**{"pacing": True, "max_parts": 4, **changes})
    assert enough(config, part, found, [1.0, 3.0, 2.0]) == is_enough


# Privacy


@given(st.integers(1, 9), st.floats(0.01, 100))
def test_without_noise_the_sum_is_that_of_clipped_rows(n: int, clip: float) -> None:
    rows = np.random.default_rng(n).standard_normal((n, 4)).astype(np.float32) * 3
    want = np.zeros(4)
    for row in rows.astype(np.float64):
        norm = np.sqrt((row**2).sum())
        want += row if norm <= clip else row * (clip / norm)
    got = private_sum(rows, clip, 0.0, 1)
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    # No client moves the sum by more than clip.
    for i in range(n):
        without = private_sum(np.delete(rows, i, axis=0), clip, 0.0, 1)
        assert np.linalg.norm(got - without) <= clip * (1 + 1e-12)


def test_rows_of_zeros_and_of_huge_numbers_are_clipped_alike() -> None:
    rows = np.array([[0.0, 0.0], [3e38, -3e38], [1e-30, 0.0]], np.float32)
    got = private_sum(rows, 2.0, 0.0, 1)
    np.testing.assert_allclose(got, [np.sqrt(2), -np.sqrt(2)], rtol=1e-6)


def test_noise_is_normal_with_sigma_times_clip() -> None:
    sigma, clip, n, k = 1.5, 0.2, 3000, 5
    rows = np.full((3, k), 0.01, np.float32)
    plain = private_sum(rows, clip, 0.0, 0)
    noise = np.stack([private_sum(rows, clip, sigma, seed) - plain for seed in range(n)])
    unit = noise / (sigma * clip)
    assert np.all(np.abs(unit.mean(axis=0)) < 5 / np.sqrt(n))
    assert np.all(np.abs(unit.var(axis=0) - 1) < 5 * np.sqrt(2 / n))
    assert np.abs((unit**4).mean() - 3) < 5 * np.sqrt(96 / (n * k))
    correlation = np.corrcoef(unit.T) - np.eye(k)
    assert np.abs(correlation).max() < 5 / np.sqrt(n)


def private_of(
    config: FederationConfig,
    answers: Sequence[Answer],
    n_expected: float = 3,
    noise_seed: int = 5,
    asked: Sequence[Answer] = (),
) -> list[Term]:
    """The terms of a private part whose clients were asked as the first of ``asked`` was."""
    assignment = (asked or answers)[0][0]
    seeds = assignment.seeds[0], assignment.head_seeds[0]
    return private_terms(config, answers, *seeds, n_expected, noise_seed)


def test_a_private_gradient_is_the_noisy_sum_over_those_expected() -> None:
    config = make(clip=0.7, **PRIVATE)
    space = space_of(config)
    answers = answers_of(config, space, [None] * 4)
    rows = np.stack([np.concatenate([r.derivatives[0], r.head_derivatives[0]]) for _, r in answers])
    total = private_sum(rows, 0.7, 0.5, 99)
    first, head = answers[0][0], np.arange(space.size) >= 3 * PER_LAYER
    want = np.where(
        head,
        forward_gradient(config, space, first.head_seeds, total[None, 3:]),
        forward_gradient(config, space, first.seeds, total[None, :3]),
    )
    sums = Sums(space)
    sums.add(private_of(config, answers, n_expected=10, noise_seed=99))
    assert_close(sums.gradient(), want / 10)


def test_what_a_client_claims_to_have_does_not_count_under_privacy() -> None:
    config = make(**PRIVATE)
    space = space_of(config)
    answers = answers_of(config, space, [None] * 3)
    terms = private_of(config, answers)
    others = [
        (a, Report(0, 0, 1, 0, 0.0, 1.0, r.derivatives, r.head_derivatives)) for a, r in answers
    ]
    for a, b in zip(terms, private_of(config, others), strict=True):
        assert a.weight == b.weight
        np.testing.assert_array_equal(a.coefficients, b.coefficients)


def test_noise_is_there_with_sigma_alone() -> None:
    """Without it, what is left is the clipped sum, whatever the noise's seed."""
    for sigma, noisy in [(0.0, False), (0.5, True)]:
        config = make(**{**PRIVATE, "sigma": sigma})
        answers = answers_of(config, space_of(config), [None] * 3)
        terms = [private_of(config, answers, noise_seed=noise_seed) for noise_seed in (1, 2)]
        assert len(terms[0]) == len(terms[1]) == 4
        for a, b in zip(*terms, strict=True):
            assert (a.coefficients != b.coefficients).all() == noisy
            np.testing.assert_array_equal(a.seeds, b.seeds)


def test_a_private_part_that_nobody_answered_is_noise_all_the_same() -> None:
    """Else the update tells that nobody took part, which no noise hides."""
    config = make(clip=0.2, **{**PRIVATE, "sigma": 1.5})
    space = space_of(config)
    asked, n = answers_of(config, space, [None] * 3), 3000
    drawn = []
    for noise_seed in range(n):
        terms = private_of(config, [], 3, noise_seed, asked)
        # Every other seed of three, then of the head's four.
        assert [len(term.seeds) for term in terms] == [2, 1, 2, 2]
        assert [term.weight for term in terms] == [6, 3, 6, 6]
        drawn.append(np.concatenate([term.coefficients for term in terms]))
    unit = np.array(drawn) / (1.5 * 0.2)
    assert np.all(np.abs(unit.mean(axis=0)) < 5 / np.sqrt(n))
    assert np.all(np.abs(unit.var(axis=0) - 1) < 5 * np.sqrt(2 / n))
    correlation = np.corrcoef(unit.T) - np.eye(7)
    assert np.abs(correlation).max() < 5 / np.sqrt(n)


def test_a_private_part_has_the_form_it_has_with_answers_without_any() -> None:
    config = make(**PRIVATE)
    space = space_of(config)
    answers = answers_of(config, space, [None] * 3)
    some, none = private_of(config, answers), private_of(config, [], asked=answers)
    for a, b in zip(some, none, strict=True):
        assert (a.half, a.layers, a.weight) == (b.half, b.layers, b.weight)
        np.testing.assert_array_equal(a.seeds, b.seeds)
    # Both have the same noise, so without it nothing is left of the empty one.
    rows = np.stack([np.concatenate([r.derivatives[0], r.head_derivatives[0]]) for _, r in answers])
    plain = private_sum(rows, config.clip, 0.0, 0)
    lora, head = plain[:3], plain[3:]
    for a, b, want in zip(some, none, (lora[::2], lora[1::2], head[::2], head[1::2]), strict=True):
        np.testing.assert_allclose(a.coefficients - b.coefficients, want, rtol=1e-4, atol=1e-6)


def test_a_private_part_without_a_head_has_no_terms_of_one() -> None:
    config = make(**PRIVATE)
    space = space_of(config, head=False)
    asked = answers_of(config, space, [None])
    for answers in (asked, []):
        assert {term.layers for term in private_of(config, answers, asked=asked)} == {None}


@pytest.mark.parametrize(
    ("per_round", "available", "sigma", "delta"),
    [(10, [100] * 5, 1.0, 1e-5), (10, [100, 50, 50, 8], 2.0, 1e-6), (3, [1000] * 40, 0.8, 1e-5)],
)
def test_epsilon_is_that_of_dp_accounting(
    per_round: int, available: list[int], sigma: float, delta: float
) -> None:
    dp_accounting = pytest.importorskip("dp_accounting")
    config = make(**{**PRIVATE, "sigma": sigma}, per_round=per_round, delta=delta)
    accountant = dp_accounting.rdp.RdpAccountant()
    for n in available:
        gaussian = dp_accounting.GaussianDpEvent(sigma)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(min(1, per_round / n), gaussian))
    assert spent_epsilon(config, available) == pytest.approx(
        accountant.get_epsilon(delta), rel=1e-6
    )


def test_epsilon_grows_with_parts_and_falls_with_noise_and_clients() -> None:
    pytest.importorskip("dp_accounting")
    config, louder = make(**PRIVATE), make(**{**PRIVATE, "sigma": 5.0})
    found = [spent_epsilon(config, [100] * n) for n in (1, 2, 10, 100)]
    assert found == sorted(set(found))
    assert spent_epsilon(louder, [100] * 10) < spent_epsilon(config, [100] * 10)
    assert spent_epsilon(config, [1000] * 10) < spent_epsilon(config, [100] * 10)
    assert spent_epsilon(config, []) == pytest.approx(0, abs=1e-9)


def test_without_noise_there_is_no_epsilon() -> None:
    assert spent_epsilon(make(), [100]) is None


def test_a_part_that_nobody_was_there_for_costs_nothing() -> None:
    pytest.importorskip("dp_accounting")
    config = make(**PRIVATE)
    assert (
        spent_epsilon(config, [100, 0])
        == spent_epsilon(config, [0, 100, 0])
        == spent_epsilon(config, [100])
    )
    assert spent_epsilon(config, [0, 0]) == spent_epsilon(config, [])


# What may not be used


def report_with(**changes: Any) -> Report:
    fields: dict[str, Any] = {
        "n_examples": 4,
        "seconds": 1.0,
        "loss": 1.0,
        "derivatives": np.ones((1, 3), np.float32),
        "head_derivatives": np.ones((1, 2), np.float32),
        **changes,
    }
    return Report(round=0, part=0, n_tokens=1, **fields)


def with_one(value: float) -> np.ndarray:
    return np.array([[1.0, value, 0.0]], np.float32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_examples": 0}, "0 examples are not between 1 and 8"),
        ({"n_examples": 9}, "9 examples are not between 1 and 8"),
        ({"n_examples": 2**32 - 1}, "4294967295 examples are not between 1 and 8"),
        ({"loss": np.nan}, "a loss of nan is beyond 10"),
        ({"loss": np.inf}, "a loss of inf is beyond 10"),
        ({"loss": -np.inf}, "a loss of -inf is beyond 10"),
        ({"loss": 10.1}, "a loss of 10.1 is beyond 10"),
        ({"loss": -10.1}, "a loss of -10.1 is beyond 10"),
        ({"seconds": -1.0}, "-1.0 seconds are no time"),
        ({"seconds": np.nan}, "nan seconds are no time"),
        ({"seconds": np.inf}, "inf seconds are no time"),
        ({"seconds": -np.inf}, "-inf seconds are no time"),
        ({"derivatives": with_one(np.nan)}, "a derivative is not finite"),
        ({"derivatives": with_one(-np.inf)}, "a derivative is not finite"),
        ({"derivatives": with_one(-1e30)}, "a derivative of 1e+30 is beyond 10"),
        ({"derivatives": with_one(10.1)}, "a derivative of 10.1 is beyond 10"),
        ({"head_derivatives": with_one(np.nan)}, "a head derivative is not finite"),
        ({"head_derivatives": with_one(11)}, "a head derivative of 11 is beyond 10"),
        ({"vector": with_one(np.inf)[0]}, "a weight is not finite"),
        ({"vector": with_one(-11)[0]}, "a weight of 11 is beyond 10"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_faults_are_told(changes: dict[str, Any], words: str) -> None:
    assert fault(make(batch_size=8, max_derivative=10.0), report_with(**changes)) == words


def test_borders_are_no_faults() -> None:
    config = make(batch_size=8, max_derivative=10.0)
    for n_examples in (1, 8):
        report = report_with(n_examples=n_examples, derivatives=with_one(-10.0))
        assert fault(config, report) is None
    for changes in ({"loss": 10.0}, {"loss": -10.0}, {"seconds": 0.0}, {"seconds": 1e30}):
        assert fault(config, report_with(**changes)) is None
    local = make(batch_size=8, upload="steps", local_steps=3)
    assert fault(local, report_with(n_examples=24)) is None
    assert fault(local, report_with(n_examples=25)) is not None
