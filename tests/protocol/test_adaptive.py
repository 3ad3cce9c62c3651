"""Load to match: who gets how many perturbations of which layers, and what they count."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ledger_runs
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_runs import N_CLIENTS, create, finish, message, path, proceed, reopen, some

from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.data.jsonl import read_jsonl
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.fleet import Fleet
from fwdllm.federation.simulation import Partition, simulate
from fwdllm.kernels import cpu, reference
from fwdllm.protocol import wire
from fwdllm.protocol.aggregate import Answer, Sums, terms_of
from fwdllm.protocol.client import answer, answer_all
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.load import deal_by_speed, known_or_slowest, passes, spread
from fwdllm.protocol.pacing import variance
from fwdllm.protocol.plan import Assignment, deal, plan_part
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.report import Report
from fwdllm.protocol.server import Server
from fwdllm.protocol.space import Layers, Space, covers
from fwdllm.protocol.speeds import Speeds

__all__ = ["path"]  # a fixture

N_LAYERS, PER_LAYER = 4, 2 * (6 + 5)
SHAPES = {f"blk.{i}.attn_q": (6, 5) for i in range(N_LAYERS)}
ON: dict[str, Any] = {"adaptive": True}


def make(**changes: Any) -> FederationConfig:
    defaults = {"rounds": 9, "per_round": 5, "perturbations": 3, "head_perturbations": 4, "seed": 7}
    return FederationConfig(**{**defaults, **changes})


def space_of(config: FederationConfig, head: bool = True) -> Space:
    labels = Head(("a", "b"), 4) if head else None
    lora = LoRAConfig(rank=2, targets=("attn_q",))
    return Space(Adapter.create("llama", SHAPES, lora, 1, cpu, labels), config)


def plan(
    config: FederationConfig, pass_seconds: dict[int, float], **options: Any
) -> list[Assignment]:
    given = {"round": 3, "part": 1, "clients": range(9), "gradient": None, "asked": {}, "secret": 0}
    given |= {"space": space_of(config), **options}
    return plan_part(config, pass_seconds=pass_seconds, **given)


def counts_of(assignments: Sequence[Assignment]) -> list[int]:
    return [a.seeds.shape[1] for a in assignments]


# How much


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=12), st.integers(1, 9), st.data())
def test_the_last_is_done_as_soon_as_can_be(
    pass_seconds: list[float], perturbations: int, data: st.DataObject
) -> None:
    """With as many perturbations in all, and from a quarter to four times the usual for each."""
    config = make(perturbations=perturbations, per_round=99, split=True, adaptive=True)
    space, n = space_of(config), len(pass_seconds)
    scopes = [(data.draw(st.integers(0, N_LAYERS - 1)),) for _ in range(n)]
    counts = spread(space, scopes, pass_seconds)
    least, most = int(np.ceil(perturbations / 4)), 4 * perturbations

    def seconds(i: int, count: int) -> float:
        return pass_seconds[i] * passes(space, scopes[i], count)

    assert sum(counts) == n * perturbations
    assert all(least <= count <= most for count in counts)
    last = max((seconds(i, c) for i, c in enumerate(counts) if c > least), default=0.0)
    for i, count in enumerate(counts):
        assert count == most or seconds(i, count + 1) >= last * (1 - 1e-9)


def test_expected_times_are_equal_to_one_perturbation() -> None:
    config = make(perturbations=24, per_round=5, **ON)
    space, pass_seconds = space_of(config), [1.0, 2.0, 0.5, 1.3, 4.0]
    counts = spread(space, [None] * 5, pass_seconds)
    times = [s * passes(space, None, c) for s, c in zip(pass_seconds, counts, strict=True)]
    assert max(times) - min(times) <= 4.0  # one lane of the slowest
    assert max(times) < 0.5 * 4.0 * passes(space, None, 24)


def test_devices_of_one_speed_get_the_same() -> None:
    for seconds in ({}, dict.fromkeys(range(9), 7.5)):
        assert counts_of(plan(make(**ON), seconds)) == [3] * 5


def test_a_device_of_no_time_at_all_gets_four_times_as_much_and_no_more() -> None:
    clients = [a.client for a in plan(make(), {})]
    liar = {**dict.fromkeys(clients, 1.0), clients[2]: 0.0}
    assert counts_of(plan(make(perturbations=8, **ON), liar)) == [2, 2, 32, 2, 2]


def test_a_device_of_a_thousand_years_a_pass_still_gets_a_quarter() -> None:
    clients = [a.client for a in plan(make(), {})]
    for usual, want in ((3, [1, 4, 4, 3, 3]), (5, [2, 6, 6, 6, 5]), (8, [2, 10, 10, 9, 9])):
        config = make(perturbations=usual, **ON)
        found = plan(config, {**dict.fromkeys(clients, 1.0), clients[0]: 3e38})
        assert counts_of(found) == want


def test_who_is_not_known_may_be_as_slow_as_the_slowest() -> None:
    assert known_or_slowest({1: 2.0, 5: 8.0, 9: 1.0}, [5, 3, 9]) == [8.0, 8.0, 1.0]
    assert known_or_slowest({}, [5, 3]) == [1.0, 1.0]


@pytest.mark.parametrize("layers", [None, (0,), (2,), (3,)], ids=str)
@pytest.mark.parametrize("method", ["forward-ad", "central", "forward-difference"])
def test_work_is_what_the_engine_counts(bundled: Path, method: str, layers: Layers) -> None:
    config = make(
        method=method, split=layers is not None, perturbations=2, batch_size=2, epsilon=0.05
    )
    engine = Engine.load(bundled, LoRAConfig(2, 4, layers=(0, 1, 2, 3, 4, 5)))
    space = Space(engine.adapter, config)
    examples = read_jsonl(bundled.parent / "pirate.train.jsonl")[:2]
    rows = sum(len(engine.tokenize(e, None).ids) for e in examples)
    for count in (1, 4):
        seeds = np.arange(count, dtype=np.uint64)[None]
        a = Assignment(0, 0, 0, layers, seeds, np.zeros((1, 0), np.uint64), 5, 0)
        found = answer(engine, space, a, engine.separate(examples))
        assert found.n_tokens == round(rows * passes(space, layers, count))


def test_an_encoders_head_takes_a_plain_lane_of_differences() -> None:
    with_head, without = (space_of(make(method="central"), head) for head in (True, False))
    assert passes(with_head, None, 3) == 7
    assert passes(without, None, 3) == 6
    assert passes(with_head, (2,), 3) == (2 + 7 * 2) / 4


# Which layers


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=9), st.integers(0, 9))
def test_late_layers_go_to_slow_devices(pass_seconds: list[float], round: int) -> None:
    dealt = deal(range(N_LAYERS), len(pass_seconds), round)
    found = deal_by_speed(dealt, pass_seconds, range(len(pass_seconds)))
    assert [len(scope or ()) for scope in found] == [len(scope or ()) for scope in dealt]
    flat = [sorted(x for scope in scopes for x in scope or ()) for scopes in (dealt, found)]
    assert flat[0] == flat[1]
    order = np.argsort(pass_seconds, kind="stable")
    lowest = [(found[i] or ())[0] for i in order]
    assert lowest == sorted(lowest)
    for scope in found:  # what is not in between costs as much as what is
        assert list(scope or ()) == sorted(set(scope or ()))


def test_devices_of_one_speed_get_other_layers_in_other_rounds() -> None:
    config = make(split=True, per_round=4, **ON)
    of_client = {(a.client, a.layers) for round in range(20) for a in plan(config, {}, round=round)}
    assert len(of_client) > 9 * 3  # of nine clients and four layers


# What it counts


def answers_of(
    config: FederationConfig, space: Space, counts: Sequence[int], scopes: Sequence[Layers]
) -> list[Answer]:
    """Answers with random scalars of clients with different numbers of perturbations."""
    random, found = np.random.default_rng(3), []
    for client, (count, layers) in enumerate(zip(counts, scopes, strict=True)):
        shapes = (config.local_steps, count), (config.local_steps, 4 if space.adapter.n_head else 0)
        seeds = [random.integers(0, 2**63, shape).astype(np.uint64) for shape in shapes]
        slopes = [random.standard_normal(shape).astype(np.float32) for shape in shapes]
        a = Assignment(0, 0, client, layers, *seeds, 0, 0)
        found.append((a, Report(0, 0, 1 + client, 10, 1.0, 1.0, *slopes)))
    return found


def clients_mean(space: Space, assignment: Assignment, report: Report) -> np.ndarray:
    """A client's forward gradient: the sum over steps of the mean over its own perturbations."""
    total, n_lora = np.zeros(space.size), N_LAYERS * PER_LAYER
    for seeds, slopes, start, end in (
        (assignment.seeds, report.derivatives, 0, n_lora),
        (assignment.head_seeds, report.head_derivatives, n_lora, space.size),
    ):
        for step_seeds, step_slopes in zip(seeds, slopes, strict=True):
            for seed, slope in zip(step_seeds, step_slopes, strict=True):
                v = reference.normal(int(seed), 0, space.size)
                total[start:end] += float(slope) * v[start:end] / len(step_seeds)
    for layer in range(N_LAYERS):
        if not covers(assignment.layers, (layer,)):
            total[layer * PER_LAYER : (layer + 1) * PER_LAYER] = 0
    return total


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize(
    ("scopes", "counts"),
    [
        ([None] * 4, [1, 12, 3, 2]),
        ([None], [5]),
        ([None], [1]),
        ([(0,), (1,), (2,), (3,), (3,)], [2, 4, 3, 1, 7]),
        ([(0, 1), (2, 3)], [9, 1]),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "changes", [{}, {"upload": "steps", "local_steps": 2, "client_learning_rate": 0.01}], ids=str
)
def test_the_gradient_is_the_mean_of_clients_means(
    changes: dict[str, Any], scopes: list[Layers], counts: list[int], head: bool, weighted: bool
) -> None:
    """Each over its own perturbations, and none counts more for having more of them."""
    config = make(weighted=weighted, split=scopes[0] is not None, **ON, **changes)
    space = space_of(config, head)
    answers = answers_of(config, space, counts, scopes)
    sums = Sums(space)
    sums.add(terms_of(config, answers, 0))
    total, weights = np.zeros(space.size), np.zeros(space.size)
    for a, report in answers:
        inside = np.repeat([covers(a.layers, (i,)) for i in range(N_LAYERS)], PER_LAYER)
        inside = np.append(inside, np.ones(space.size - len(inside), bool))
        weight = report.n_examples if weighted else 1
        rate = config.client_learning_rate if config.upload == "steps" else 1
        total += weight * rate * clients_mean(space, a, report)
        weights += weight * inside
    np.testing.assert_allclose(sums.gradient(), total / weights, rtol=1e-4, atol=1e-5)


def test_on_average_it_is_the_mean_of_clients_gradients() -> None:
    """Devices with one perturbation and with twelve have opposite gradients; none prevails."""
    config = make(weighted=False, per_round=5, **ON)
    space = space_of(config, head=False)
    pass_seconds = {c: 0.01 if c % 2 else 1.0 for c in range(9)}
    truth = np.linspace(-1, 1, space.size).astype(np.float32)
    total, want = np.zeros(space.size), np.zeros(space.size)
    n, seen = 200, set()
    for round in range(n):
        answers = []
        for a in plan(config, pass_seconds, round=round, space=space):
            gradient = truth if a.client % 2 else (1 - truth).astype(np.float32)
            want += gradient / 5
            slopes = space.dot(gradient, None, a.seeds[0]).astype(np.float32)[None]
            answers.append((a, Report(round, 1, 8, 1, 1.0, 1.0, slopes, np.zeros((1, 0)))))
        seen.update(counts_of([a for a, _ in answers]))
        sums = Sums(space)
        sums.add(terms_of(config, answers, 1))
        total += sums.gradient()
    assert {1, 11} <= seen
    # How far the mean is from the middle of both towards the gradient of fast devices.
    apart = 2 * truth - 1
    assert abs((total - want) @ apart / n / (apart @ apart)) < 0.1


def test_halves_that_agree_have_no_variance_whatever_their_counts() -> None:
    config = make(**ON)
    space = space_of(config, head=False)
    answers = answers_of(config, space, [3, 6, 1, 2], [None] * 4)
    first = answers[0]
    # The second client has the first one's perturbations twice, so the same mean.
    a = replace(first[0], client=1, seeds=np.tile(first[0].seeds, 2))
    report = replace(first[1], derivatives=np.tile(first[1].derivatives, 2))
    sums = Sums(space)
    sums.add(terms_of(config, [first, (a, report)], 0))
    assert variance(sums) == pytest.approx(0, abs=1e-10)


# How fast


def speeds_of(ledger: Ledger, *parts: tuple[int, int]) -> dict[int, float]:
    speeds = Speeds(Server(ledger).replica.space)
    for part in parts:
        speeds.observe(ledger, *part)
    return speeds.pass_seconds()


def play(server: Server, seconds: dict[int, float | None]) -> None:
    """A round in which clients take so many seconds, or do not answer."""
    for a in server.open_part(range(N_CLIENTS), 0.0):
        taken = seconds[a.client]
        if taken is not None:
            report = replace(ledger_runs.contribution(server.replica, a), seconds=taken)
            assert server.receive(a.client, wire.encode_report(report), 1.0) is None
    server.close_part(0.0)


def test_speed_is_the_median_of_the_last_five_answers(path: Path) -> None:
    """Whose work was (1 + 4) passes; a device that loads its model once is not slow for ever."""
    with create(path, rounds=7, per_round=6) as ledger:
        server = Server(ledger)
        for seconds in (200.0, 1.0, 2.0, 8.0, 9.0, 7.0, 1.0):
            play(server, dict.fromkeys(range(N_CLIENTS), 5 * seconds))
        for n, want in enumerate((200.0, 1.0, 2.0, 2.0, 8.0, 7.0, 7.0), start=1):
            found = speeds_of(ledger, *[(round, 0) for round in range(n)])
            assert found == dict.fromkeys(range(N_CLIENTS), want)


def test_who_never_answers_is_as_slow_as_the_deadline_and_who_misses_some_is_not(
    path: Path,
) -> None:
    with create(path, rounds=3, per_round=6, deadline=50.0, quorum=0.1, max_parts=1) as ledger:
        server, all_in_time = Server(ledger), dict.fromkeys(range(N_CLIENTS), 5.0)
        play(server, {**all_in_time, 0: None, 1: None})
        assert speeds_of(ledger, (0, 0)) == {0: 10.0, 1: 10.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}
        play(server, {**all_in_time, 0: None, 1: None, 2: None})
        play(server, {**all_in_time, 0: None, 2: None})
        found = speeds_of(ledger, *[(round, 0) for round in range(3)])
        assert found == {0: 10.0, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}


# Runs

VARIANTS: dict[str, dict[str, Any]] = {
    "own": {},
    "paced": {"pacing": True, "variance_threshold": 0.05, "max_parts": 3, "candidates": 3},
    "split": {"split": True, "optimizer": "yogi", "weighted": False},
    "pool": {"upload": "steps", "local_steps": 2, "seeds": "pool", "pool_size": 64},
    "weights": {"upload": "weights", "local_steps": 2, "split": True},
}


@pytest.fixture
def uneven(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients' seconds are those of devices that differ: the last is eleven times as slow."""
    plain = ledger_runs.contribution

    def contribution(replica: Any, assignment: Assignment) -> Report:
        work = assignment.seeds.size + 1
        return replace(plain(replica, assignment), seconds=work * (1.0 + 2 * assignment.client))

    monkeypatch.setattr(ledger_runs, "contribution", contribution)


def all_counts(ledger: Ledger) -> list[list[tuple[int, int]]]:
    return [
        [(c, wire.decode_assignment(m).seeds.shape[1]) for c, m in ledger.assignments(round, part)]
        for round in range(ledger.n_rounds)
        for part, _, _ in ledger.parts(round)
    ]


@pytest.mark.usefixtures("uneven")
@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_made_anew_after_every_write_comes_to_the_same_bits(
    name: str, path: Path, tmp_path: Path
) -> None:
    changes = {**VARIANTS[name], **ON, "rounds": 6, "snapshot_every": 4}
    with create(tmp_path / "uninterrupted", **changes) as ledger:
        want = finish(Server(ledger), some)
        counts = all_counts(ledger)
    assert {sum(n for _, n in part) for part in counts} == {12}
    later = [part for part in counts[3:] if len({n for _, n in part}) > 1]
    assert later  # slow clients were given less
    create(path, **changes).close()
    for _ in range(200):
        with reopen(path) as ledger:
            if Server(ledger).done:
                break
            proceed(Server(ledger), some)
    with Ledger(path) as ledger:
        assert all_counts(ledger) == counts
        assert Server(ledger).replica.theta.tobytes() == want
        assert replay(ledger).theta.tobytes() == want
        verify(ledger)


@pytest.mark.usefixtures("uneven")
def test_slow_clients_of_a_run_get_less_and_a_split_gives_them_late_layers(path: Path) -> None:
    with create(path, rounds=8, split=True, **ON) as ledger:
        finish(Server(ledger))
        for part in range(4, 8):
            found = [wire.decode_assignment(m, c) for c, m in ledger.assignments(part, 0)]
            counts = counts_of(found)  # by client, so from the fastest on
            lowest = [(a.layers or ())[0] for a in found]
            assert lowest == sorted(lowest)
            assert counts[-1] < max(counts)


def test_reports_of_another_size_than_asked_for_are_refused(path: Path) -> None:
    with create(path, **ON) as ledger:
        server = Server(ledger)
        a = server.open_part(range(N_CLIENTS), 0.0)[0]
        honest = ledger_runs.contribution(server.replica, a)
        for times, words in ((2, "malformed: scalars"), (4, "malformed: scalars"), (5, "bytes")):
            forged = replace(honest, derivatives=np.tile(honest.derivatives, times))
            reason = server.receive(a.client, wire.encode_report(forged), 1.0)
            assert reason is not None
            assert words in reason
        assert server.receive(a.client, message(server, a), 1.0) is None


def test_clients_with_other_counts_share_passes_without_changing_a_bit(bundled: Path) -> None:
    config = make(batch_size=2, max_tokens=24)
    engine = Engine.load(bundled, LoRAConfig(2, 4))
    space = Space(engine.adapter, config)
    examples = engine.separate(read_jsonl(bundled.parent / "pirate.train.jsonl")[:8])
    none = np.zeros((1, 0), np.uint64)
    asked = [
        Assignment(0, 0, i, None, np.arange(10 * i, 10 * i + n, dtype=np.uint64)[None], none, i, 0)
        for i, n in enumerate((1, 3, 1, 5, 3))
    ]
    together = list(answer_all(engine, space, asked, lambda client: examples))
    for a, report in zip(asked, together, strict=True):
        alone = answer(engine, space, a, examples)
        assert report.derivatives.shape == a.seeds.shape
        assert report.derivatives.tobytes() == alone.derivatives.tobytes()
        assert (report.loss, report.n_tokens) == (alone.loss, alone.n_tokens)


def test_a_part_of_a_simulation_waits_less_for_slow_devices(bundled: Path, tmp_path: Path) -> None:
    changes = {"batch_size": 2, "max_tokens": 24, "eval_every": 0, "perturbations": 8}
    few = tmp_path / "few.jsonl"
    lines = (bundled.parent / "pirate.valid.jsonl").read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join(lines[:4]) + "\n", encoding="utf-8")
    took = {}
    for adaptive in (False, True):
        simulate(
            bundled,
            bundled.parent / "pirate.valid.jsonl",
            tmp_path / str(adaptive),
            FederationConfig(rounds=3, per_round=8, adaptive=adaptive, **changes),
            lora=LoRAConfig(2, 4),
            partition=Partition(8),
            fleet=Fleet(stragglers=0.4),
            eval_data=few,
        )
        with Ledger(tmp_path / str(adaptive) / NAME) as ledger:
            replay(ledger)
            first, second, last = (closed.closed for closed in ledger.rounds())
            took[adaptive] = first, last - second
    assert took[True][0] == took[False][0]  # nobody was known yet
    assert took[True][1] < 0.5 * took[False][1]


# Settings


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": "shared"}, "^adaptive clients have perturbations of different number.*seeds of"),
        ({"seeds": "shared", "sigma": 1.0, "weighted": False}, "^adaptive clients"),
        ({"method": "backprop"}, "^adaptive has nothing to adapt.*backprop costs the same"),
        ({"method": "readout"}, "readout costs the same"),
        ({"per_round": 1}, "^adaptive deals out.*two clients and two perturbations"),
        ({"perturbations": 1}, "^adaptive deals out"),
    ],
    ids=str,
)
def test_contradictions_are_told_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make(**ON, **changes)


def test_one_perturbation_is_enough_of_a_split() -> None:
    config = make(perturbations=1, split=True, per_round=4, **ON)
    clients = [a.client for a in plan(config, {})]
    found = plan(config, {client: 1.0 + i for i, client in enumerate(clients)})
    assert [a.layers for a in found] == [(0,), (1,), (2,), (3,)]
    assert counts_of(found) == [1, 1, 1, 1]


def digest(config: FederationConfig) -> str:
    """Of a part's assignments and of the terms of answers to them."""
    space, hash, answers = space_of(config), hashlib.sha256(), []
    gradient = (np.arange(space.size) % 13 - 6).astype(np.float32)

    def slopes(seeds: np.ndarray) -> np.ndarray:
        return (seeds % np.uint64(1000)).astype(np.float32) / np.float32(7)

    # Speeds that are known are not looked at.
    for a in plan(config, {client: 1.0 + client for client in range(9)}, gradient=gradient):
        hash.update(wire.encode_assignment(a))
        values = slopes(a.seeds), slopes(a.head_seeds)
        answers.append((a, Report(3, 1, 1 + a.client % 8, 0, 1.0, 1.0, *values)))
    for t in terms_of(config, answers, 1):
        hash.update(repr((t.half, t.layers, t.weight)).encode())
        hash.update(t.seeds.tobytes() + t.coefficients.tobytes())
    return hash.hexdigest()[:16]


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({}, "01b67ab50f990c8d"),
        ({"split": True, "candidates": 3}, "674f6a5a20ec36e4"),
        ({"candidates": 4, "upload": "steps", "local_steps": 2}, "7120025600def5f3"),
        (
            {"upload": "steps", "seeds": "pool", "local_steps": 3, "pool_size": 50},
            "f15d4fd3204ea5e9",
        ),
        ({"seeds": "shared"}, "2ca78b5efd0276aa"),
    ],
    ids=str,
)
def test_without_it_every_bit_is_as_before_there_was_it(changes: dict[str, Any], want: str) -> None:
    """The digests are of the version before."""
    assert digest(make(**changes)) == want


def test_without_it_a_ledger_says_what_it_said_before() -> None:
    assert "adaptive" not in make().recorded()
    on = make(**ON)
    assert on.recorded()["adaptive"] is True
    assert FederationConfig.from_recorded(on.recorded()).adaptive
    assert not FederationConfig.from_recorded(make().recorded()).adaptive
