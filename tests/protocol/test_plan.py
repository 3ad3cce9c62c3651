"""Plans of rounds: who is asked, along which seeds, in which layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_adapters import shapes

from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import cpu, reference
from fwdllm.protocol.federation import MAX_CLIENTS, MAX_PARTS, FederationConfig
from fwdllm.protocol.plan import (
    Assignment,
    choose,
    deal,
    plan_part,
    shared_head_seeds,
    shared_seeds,
)
from fwdllm.protocol.seeds import batch_indices, client_keys, derive_seeds
from fwdllm.protocol.space import Space

PRIVATE: dict[str, Any] = {"sigma": 1.0, "seeds": "shared", "weighted": False}
SECRET = 12345
client_sets = st.sets(st.integers(0, 999), min_size=1, max_size=30)


def make(**changes: Any) -> FederationConfig:
    return FederationConfig(**{"rounds": 10, "per_round": 4, "perturbations": 3, **changes})


def space_of(config: FederationConfig, n_labels: int = 0) -> Space:
    head = Head(tuple("abc"[:n_labels]), 5) if n_labels else None
    lora = LoRAConfig(rank=2, targets=("attn_q", "attn_v"))
    return Space(Adapter.create("llama", shapes(4), lora, 1, cpu, head), config)


def plan(
    config: FederationConfig,
    round: int = 0,
    part: int = 0,
    n_clients: int = 9,
    gradient: np.ndarray | None = None,
    space: Space | None = None,
    asked: Mapping[int, int] | None = None,
    secret: int = SECRET,
) -> list[Assignment]:
    found = space or space_of(config)
    clients = range(n_clients)
    return plan_part(config, found, round, part, clients, gradient, asked or {}, secret)


def chosen_of(
    config: FederationConfig,
    round: int,
    part: int,
    clients: Iterable[int],
    asked: Mapping[int, int] | None = None,
    secret: int = SECRET,
) -> list[int]:
    return choose(config, round, part, list(clients), asked or {}, secret)


def all_seeds(assignments: Sequence[Assignment]) -> list[int]:
    return [int(s) for a in assignments for m in (a.seeds, a.head_seeds) for s in m.ravel()]


# Whom


@given(client_sets, st.integers(1, 40), st.integers(0, 9), st.integers(0, 3), st.randoms())
def test_as_many_as_wanted_are_chosen_ascending(
    clients: set[int], per_round: int, round: int, part: int, random: Any
) -> None:
    config = make(per_round=per_round)
    chosen = chosen_of(config, round, part, sorted(clients))
    assert len(chosen) == min(per_round, len(clients))
    assert chosen == sorted(set(chosen))
    assert clients.issuperset(chosen)
    shuffled = list(clients)
    random.shuffle(shuffled)
    assert chosen_of(config, round, part, shuffled) == chosen


@given(client_sets, st.integers(1, 12))
def test_those_not_asked_in_a_round_come_first(clients: set[int], per_round: int) -> None:
    config = make(per_round=per_round)
    asked: Counter[int] = Counter()
    for part in range(len(clients) // per_round + 1):
        chosen = set(chosen_of(config, 3, part, sorted(clients), asked))
        fresh = clients - set(asked)
        assert chosen <= fresh if len(fresh) >= per_round else chosen >= fresh
        asked.update(chosen)
    assert set(asked) == clients


@given(st.lists(client_sets, min_size=1, max_size=12), st.integers(1, 12), st.integers(0, 9))
def test_of_those_there_the_least_asked_come_first(
    present: list[set[int]], per_round: int, round: int
) -> None:
    """Whoever comes and goes, nobody is asked again while one is there that was asked less."""
    config = make(per_round=per_round)
    asked: Counter[int] = Counter()
    for part, clients in enumerate(present):
        chosen = set(chosen_of(config, round, part, clients, asked))
        assert len(chosen) == min(per_round, len(clients))
        assert chosen <= clients
        left = [asked[c] for c in clients - chosen]
        assert not left or max(asked[c] for c in chosen) <= min(left)
        asked.update(chosen)


def test_of_equally_often_asked_clients_a_round_has_one_order() -> None:
    """So who is skipped as absent is next in line, and a full set is gone through in turn."""
    config, one_by_one = make(per_round=3), make(per_round=1)
    asked: Counter[int] = Counter()
    order: list[int] = []
    for part in range(12):
        (client,) = chosen_of(one_by_one, 5, part, range(12), asked)
        order.append(client)
        asked[client] += 1
    assert sorted(order) == list(range(12))
    for part in range(4):
        before = Counter(order[: 3 * part])
        assert chosen_of(config, 5, part, range(12), before) == sorted(
            order[3 * part : 3 * part + 3]
        )
    away = set(order[:2])
    assert chosen_of(config, 5, 0, set(range(12)) - away) == sorted(order[2:5])
    assert chosen_of(config, 5, 1, range(12), Counter(order[2:5])) == sorted([*away, order[5]])
    # Once everybody was asked the same order begins again.
    assert chosen_of(config, 5, 4, range(12), asked) == sorted(order[:3])


def test_a_plan_asks_the_least_asked() -> None:
    asked = Counter({client: client % 3 for client in range(9)})
    for part in (0, 1):
        found = plan(make(per_round=5), 0, part, asked=asked)
        assert [a.client for a in found] == chosen_of(make(per_round=5), 0, part, range(9), asked)
        assert {0, 3, 6} < {a.client for a in found} < {0, 3, 6, 1, 4, 7}


def test_every_client_is_chosen_about_equally_often() -> None:
    config, rounds, n = make(per_round=3), 1500, 10
    counts = Counter(c for r in range(rounds) for c in chosen_of(config, r, 0, range(n)))
    share = 3 / n
    bound = 5 * np.sqrt(rounds * share * (1 - share))
    assert all(abs(counts[c] - rounds * share) < bound for c in range(n))


def test_runs_and_rounds_choose_differently() -> None:
    clients = range(100)
    first = chosen_of(make(), 0, 0, clients)
    assert chosen_of(make(), 1, 0, clients) != first
    assert chosen_of(make(seed=1), 0, 0, clients) != first


def test_without_privacy_the_secret_chooses_nobody() -> None:
    for round in range(20):
        assert chosen_of(make(), round, 0, range(100), secret=1) == chosen_of(
            make(), round, 0, range(100), secret=2
        )


def test_who_takes_part_under_privacy_cannot_be_told_from_what_clients_know() -> None:
    """The run's seed is in every assignment's seeds; the secret is the server's own."""
    rounds, n, share = 400, 100, 0.25

    def masks(seed: int, secret: int, part: int = 0) -> np.ndarray:
        config = make(per_round=25, seed=seed, **PRIVATE)
        out = np.zeros((rounds, n), bool)
        for round in range(rounds):
            out[round, chosen_of(config, round, part, range(n), secret=secret)] = True
        return out

    first = masks(0, 1)
    np.testing.assert_array_equal(masks(1, 1), first)
    np.testing.assert_array_equal(masks(SECRET, 1), first)
    # With another secret, though it is the run's seed, in another part, and for a run whose seed
    # is the secret: as often in both as independent draws are.
    public = np.zeros_like(first)
    for round in range(rounds):
        drawn = client_keys(0, round, n).astype(np.float64) / 2.0**64
        public[round] = drawn < share
    for other in (masks(0, 2), masks(0, 0), masks(0, 1, part=1), public):
        both = (first & other).sum()
        bound = 5 * np.sqrt(rounds * n * share**2 * (1 - share**2))
        assert abs(both - rounds * n * share**2) < bound
    np.testing.assert_array_equal(masks(5, 0), public)


def test_what_was_asked_before_does_not_matter_under_privacy() -> None:
    config = make(per_round=3, **PRIVATE)
    for round in range(50):
        asked = Counter(range(0, 10, 2))
        assert chosen_of(config, round, 1, range(10), asked) == chosen_of(
            config, round, 1, range(10)
        )


def test_keys_of_parts_do_not_overlap_under_privacy() -> None:
    """Those of a part go on where the part before has its last possible client."""
    config, clients = make(per_round=1, **PRIVATE), [0, MAX_CLIENTS - 1]
    for round in range(8):
        for part in (0, 1, MAX_PARTS - 1):
            want = [
                c for c in clients
                if client_keys(SECRET, round, 1, part * MAX_CLIENTS + c)[0] < 2**63
            ]  # fmt: skip
            assert chosen_of(config, round, part, clients) == want


def test_under_privacy_each_client_takes_part_with_its_probability() -> None:
    config, rounds, n = make(per_round=3, **PRIVATE), 1500, 10
    share = 3 / n
    for part in (0, 1):
        chosen = [chosen_of(config, r, part, range(n)) for r in range(rounds)]
        assert all(c == sorted(set(c)) and set(c) <= set(range(n)) for c in chosen)
        sizes = np.array([len(c) for c in chosen])
        # A binomial number, where a fixed one would have no variance.
        assert abs(sizes.mean() - n * share) < 5 * np.sqrt(n * share * (1 - share) / rounds)
        assert sizes.var() == pytest.approx(n * share * (1 - share), rel=0.2)
        assert sizes.min() == 0
        assert sizes.max() >= 7
        counts = Counter(c for one in chosen for c in one)
        bound = 5 * np.sqrt(rounds * share * (1 - share))
        assert all(abs(counts[c] - rounds * share) < bound for c in range(n))


def test_under_privacy_parts_are_drawn_independently() -> None:
    config, rounds, share = make(per_round=5, **PRIVATE), 2000, 0.5
    both = sum(
        7 in chosen_of(config, r, 0, range(10)) and 7 in chosen_of(config, r, 1, range(10))
        for r in range(rounds)
    )
    bound = 5 * np.sqrt(rounds * share**2 * (1 - share**2))
    assert abs(both - rounds * share**2) < bound


def test_under_privacy_too_few_clients_all_take_part() -> None:
    for n in (3, 4):
        assert chosen_of(make(per_round=4, **PRIVATE), 0, 0, range(n)) == list(range(n))


def test_under_privacy_a_clients_part_does_not_depend_on_who_else_is_there() -> None:
    config = make(per_round=2, **PRIVATE)
    for round in range(50):
        a = chosen_of(config, round, 0, [0, 1, 2, 9])
        b = chosen_of(config, round, 0, [1, 3, 5, 9])
        assert {c for c in a if c in (1, 9)} == {c for c in b if c in (1, 9)}


def test_nobody_is_chosen_of_nobody() -> None:
    assert chosen_of(make(), 0, 0, []) == []
    assert plan(make(), n_clients=0) == []


@pytest.mark.parametrize("client", [-1, MAX_CLIENTS])
@pytest.mark.parametrize("changes", [{}, PRIVATE])
def test_numbers_of_clients_out_of_range(client: int, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="numbered from 0"):
        chosen_of(make(**changes), 0, 0, [1, client])


# In which layers


@given(
    st.sets(st.integers(0, 200), min_size=1, max_size=40).map(sorted),
    st.integers(1, 90),
    st.integers(0, 10**6),
)
def test_dealt_layers_cover_all_of_them(layers: list[int], n_clients: int, round: int) -> None:
    scopes = deal(layers, n_clients, round)
    assert len(scopes) == n_clients
    assert {layer for scope in scopes for layer in scope} == set(layers)
    counts = Counter(layer for scope in scopes for layer in scope)
    sizes = [len(scope) for scope in scopes]
    assert all(list(scope) == sorted(set(scope)) for scope in scopes)
    assert max(sizes) - min(sizes) <= 1
    assert max(counts.values()) - min(counts.values()) <= 1
    if n_clients <= len(layers):
        assert set(counts.values()) == {1}
    else:
        assert set(sizes) == {1}


@given(st.integers(1, 12), st.integers(1, 40), st.integers(0, 99))
def test_over_the_rounds_layers_have_equally_many_clients(
    n_layers: int, n_more: int, round: int
) -> None:
    layers, n_clients = range(n_layers), n_layers + n_more
    counts = Counter(
        layer
        for r in range(round, round + n_layers)
        for scope in deal(layers, n_clients, r)
        for layer in scope
    )
    assert set(counts.values()) == {n_clients}


@pytest.mark.parametrize("per_round", [1, 3, 4, 7])
def test_a_split_plan_covers_the_adapter(per_round: int) -> None:
    found = plan(make(split=True, per_round=per_round))
    assert len(found) == per_round
    assert {layer for a in found for layer in a.layers or ()} == {0, 1, 2, 3}


def test_without_a_split_everybody_has_all_layers() -> None:
    assert {a.layers for a in plan(make())} == {None}


# Along which seeds


def test_an_assignment_is_of_its_round_part_and_client() -> None:
    config = make(upload="steps", local_steps=5, head_perturbations=2)
    found = plan(config, 6, 2, space=space_of(config, 3))
    assert [a.client for a in found] == chosen_of(config, 6, 2, range(9))
    for a in found:
        assert (a.round, a.part) == (6, 2)
        assert a.seeds.shape == (5, 3)
        assert a.head_seeds.shape == (5, 2)
        assert a.seeds.dtype == a.head_seeds.dtype == np.uint64


def test_without_a_head_it_has_no_seeds() -> None:
    assert {a.head_seeds.shape for a in plan(make())} == {(1, 0)}


def test_a_plan_is_a_pure_function() -> None:
    config = make(split=True, seed=9)
    for a, b in zip(plan(config, 3, 1), plan(config, 3, 1), strict=True):
        assert (a.client, a.layers, a.batch_seed, a.first_step) == (
            *(b.client, b.layers, b.batch_seed, b.first_step),
        )
        np.testing.assert_array_equal(a.seeds, b.seeds)


@pytest.mark.parametrize("upload", ["scalars", "steps"])
def test_own_seeds_are_distinct_over_clients_parts_and_rounds(upload: str) -> None:
    config = make(upload=upload, local_steps=1 if upload == "scalars" else 4)
    space = space_of(config, 3)
    found = [
        seed
        for round in range(4)
        for part in range(4)
        for seed in all_seeds(plan(config, round, part, space=space))
    ]
    assert len(found) == 16 * 4 * config.local_steps * (3 + config.head_perturbations)
    assert len(set(found)) == len(found)


def test_runs_have_other_seeds() -> None:
    assert not set(all_seeds(plan(make()))) & set(all_seeds(plan(make(seed=1))))


def test_shared_seeds_are_the_same_for_all_and_new_in_every_part() -> None:
    config = make(seeds="shared")
    space, found = space_of(config, 3), []
    for round in range(3):
        for part in range(3):
            plans = plan(config, round, part, space=space)
            assert len(plans) == 4
            for a in plans:
                np.testing.assert_array_equal(a.seeds, plans[0].seeds)
                np.testing.assert_array_equal(a.head_seeds, plans[0].head_seeds)
            np.testing.assert_array_equal(shared_seeds(config, round, part), plans[0].seeds)
            of_head = shared_head_seeds(config, space, round, part)
            np.testing.assert_array_equal(of_head, plans[0].head_seeds)
            found += all_seeds(plans[:1])
    assert len(set(found)) == len(found) == 9 * (3 + config.head_perturbations)


def test_shared_seeds_have_the_shape_of_an_assignments() -> None:
    config = make(seeds="shared", upload="steps", local_steps=5, head_perturbations=2)
    for n_labels, columns in ((3, 2), (0, 0)):
        space = space_of(config, n_labels)
        (a, *_) = plan(config, 2, 1, space=space)
        assert shared_seeds(config, 2, 1).shape == a.seeds.shape == (5, 3)
        assert shared_head_seeds(config, space, 2, 1).shape == a.head_seeds.shape == (5, columns)
        np.testing.assert_array_equal(shared_seeds(config, 2, 1), a.seeds)
        np.testing.assert_array_equal(shared_head_seeds(config, space, 2, 1), a.head_seeds)


def test_pool_seeds_are_of_a_pool_fixed_for_the_run() -> None:
    config = make(seeds="pool", pool_size=16, upload="steps", local_steps=8)
    used = [plan(config, round, part) for round in range(3) for part in range(2)]
    pool = {int(s) for plans in used for s in np.concatenate([a.seeds for a in plans]).ravel()}
    # 576 draws miss one of 16 with a probability of 1e-15.
    assert len(pool) == 16
    assert pool == {int(s) for s in derive_seeds(config.seed, 0, 16)}
    orders = [a.seeds.tobytes() for plans in used for a in plans]
    assert len(set(orders)) == len(orders)


def test_batches_of_the_parts_of_a_round_follow_each_other() -> None:
    config = make(upload="steps", local_steps=2, batch_size=2, per_round=9)
    plans = [plan(config, 5, part) for part in range(3)]
    for mine in zip(*plans, strict=True):
        drawn = [
            batch_indices(a.batch_seed, a.first_step + step, 12, 2)
            for a in mine
            for step in range(2)
        ]
        assert sorted(np.concatenate(drawn)) == list(range(12))
    orders = {a.batch_seed for a in plans[0]} | {a.batch_seed for a in plan(config, 6)}
    assert len(orders) == 18


# Discriminative sampling


def candidates_of(config: FederationConfig, space: Space, **at: Any) -> list[np.ndarray]:
    """All seeds that the clients' are chosen from: what they would have without a choice."""
    each = config.perturbations * config.candidates
    wide = replace(config, perturbations=each, candidates=1)
    return [a.seeds.ravel() for a in plan(wide, space=space, **at)]


def products(space: Space, gradient: np.ndarray, scope: Any, seeds: np.ndarray) -> np.ndarray:
    adapter = space.adapter
    inside = np.zeros(adapter.n_lora)
    for t in adapter.targets:
        if scope is None or t.layer in scope:
            at = slice(t.offset, t.offset + t.size(adapter.config.rank))
            inside[at] = gradient[at]
    return np.array([inside @ reference.normal(int(s), 0, adapter.n_lora) for s in seeds])


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("per_round", [1, 3, 7])
def test_kept_seeds_are_those_most_along_the_gradient(split: bool, per_round: int) -> None:
    config = make(candidates=5, split=split, per_round=per_round)
    space, at = space_of(config), {"round": 2, "part": 1}
    gradient = np.random.default_rng(3).standard_normal(space.size).astype(np.float32)
    found = plan(config, gradient=gradient, space=space, **at)
    drawn = candidates_of(config, space, **at)
    for scope in {a.layers for a in found}:
        members = [i for i, a in enumerate(found) if a.layers == scope]
        seeds = np.concatenate([drawn[i] for i in members])
        order = seeds[np.argsort(-products(space, gradient, scope, seeds))]
        kept = [{int(s) for s in found[i].seeds.ravel()} for i in members]
        assert [len(k) for k in kept] == [3] * len(members)
        assert set.union(*kept) == {int(s) for s in order[: 3 * len(members)]}
        # Nobody gets all the good ones: everybody has one of the best.
        assert all(k & {int(s) for s in order[: len(members)]} for k in kept)


def test_kept_seeds_have_their_shape_and_a_positive_mean_product() -> None:
    config = make(candidates=10, upload="steps", local_steps=2)
    space = space_of(config, 2)
    gradient = np.random.default_rng(3).standard_normal(space.size).astype(np.float32)
    found = plan(config, gradient=gradient, space=space)
    assert {a.seeds.shape for a in found} == {(2, 3)}
    seeds = np.concatenate([a.seeds.ravel() for a in found])
    length = np.linalg.norm(gradient[: space.n_coordinates])
    # The best tenth of normal numbers is at 1.75 deviations in the mean.
    assert products(space, gradient, None, seeds).mean() / length == pytest.approx(1.75, abs=0.3)


def test_before_the_first_gradient_nothing_is_chosen() -> None:
    config = make(candidates=5)
    for a, b in zip(plan(config), plan(replace(config, candidates=1)), strict=True):
        np.testing.assert_array_equal(a.seeds, b.seeds)


def test_seeds_of_a_head_are_not_chosen() -> None:
    config = make(candidates=5)
    space = space_of(config, 2)
    gradient = np.ones(space.size, np.float32)
    chosen, plain = plan(config, gradient=gradient, space=space), plan(config, space=space)
    for a, b in zip(chosen, plain, strict=True):
        np.testing.assert_array_equal(a.head_seeds, b.head_seeds)


# What is too much


def test_more_seeds_than_a_part_has() -> None:
    config = make(perturbations=4096, candidates=1000, per_round=2)
    with pytest.raises(ConfigError, match="at most 4194304 seeds and candidates"):
        plan(config)


def test_more_seeds_of_a_head_than_a_part_has() -> None:
    config = make(head_perturbations=2**16 - 1, per_round=65)
    with pytest.raises(ConfigError, match="at most 4194304 seeds of a head"):
        plan(config, n_clients=65, space=space_of(config, 2))
