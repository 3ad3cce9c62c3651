"""Rules for clients with directions of their own: bounds, standing, and the same bits again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ledger_runs import N_CLIENTS, contribution, create, finish, make, path, reopen

from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.fleet import attacked
from fwdllm.kernels import cpu
from fwdllm.protocol import wire
from fwdllm.protocol.aggregate import Answer, Sums, terms_of
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.report import Report
from fwdllm.protocol.robust import LEAST_SLOPES, Standing, bounded, screened
from fwdllm.protocol.server import Server
from fwdllm.protocol.space import HEAD, Layers, Space

__all__ = ["path"]  # a fixture

SHAPES = {f"blk.{i}.q": (24, 16) for i in range(3)}
K = 32


def space_of(**changes: Any) -> Space:
    config = make(**{"perturbations": K, "head_perturbations": K, **changes})
    lora = LoRAConfig(rank=2, targets=("q",))
    return Space(Adapter.create("llama", SHAPES, lora, 1, cpu, Head(("a", "b"), 4)), config)


SPACE = space_of()


def answers_of(
    space: Space,
    n_clients: int,
    seed: int,
    slopes: Callable[[int, Layers, np.ndarray], np.ndarray] | None = None,
    scopes: Sequence[Layers] | None = None,
) -> list[Answer]:
    """Answers of clients with seeds of their own, by default random numbers.

    slopes: of a client, a scope and seeds.
    """
    random = np.random.default_rng(seed)
    found = []
    for client in range(n_clients):
        seeds, head = (
            random.integers(0, 2**63, (1, k)).astype(np.uint64)
            for k in (space.config.perturbations, space.config.head_perturbations)
        )
        layers = scopes[client] if scopes else None
        values = [
            slopes(client, scope, s.ravel())[None] if slopes else random.standard_normal(s.shape)
            for scope, s in ((layers, seeds), (HEAD, head))
        ]
        report = Report(0, 0, 8, 0, 0.0, 1.0, *(v.astype(np.float32) for v in values))
        found.append((Assignment(0, 0, client, layers, seeds, head, 0, 0), report))
    return found


def size(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


def scaled(answer: Answer, factor: float) -> Answer:
    a, r = answer
    values = r.derivatives * np.float32(factor), r.head_derivatives * np.float32(factor)
    return a, replace(r, derivatives=values[0], head_derivatives=values[1])


def alone(answers: Sequence[Answer]) -> list[Answer]:
    """Bounded, without any before them."""
    return bounded(answers, Standing.initial(SPACE))[0]


def gradient(space: Space, answers: Sequence[Answer]) -> np.ndarray:
    sums = Sums(space)
    sums.add(terms_of(space.config, answers, 0))
    return sums.gradient()


# Bounds


@given(st.integers(3, 12), st.integers(0, 99), st.floats(1, 9000), st.data())
def test_nobody_counts_for_more_than_the_bound(
    n: int, seed: int, factor: float, data: st.DataObject
) -> None:
    answers = answers_of(SPACE, n, seed)
    liar = data.draw(st.integers(0, n - 1))
    answers[liar] = scaled(answers[liar], factor)
    found = alone(answers)
    for name in ("derivatives", "head_derivatives"):
        before = [size(getattr(report, name)) for _, report in answers]
        after = [size(getattr(report, name)) for _, report in found]
        limit = sorted(before)[int(0.4 * (n - 1))]
        assert after == pytest.approx([min(b, limit) for b in before], rel=1e-5)
        ratio = getattr(found[liar][1], name) / getattr(answers[liar][1], name)
        assert ratio.min() == pytest.approx(ratio.max(), rel=1e-5)  # scaled, not cut


def test_slopes_of_zero_do_not_bound_others() -> None:
    # As those of the adapter in the first round of a run with a head.
    zeros = [scaled(answer, 0.0) for answer in answers_of(SPACE, 6, 0)]
    found, standing = bounded(zeros, Standing.initial(SPACE))
    assert gradient(SPACE, found) == pytest.approx(0.0)
    answers = answers_of(SPACE, 6, 1)
    after, _ = bounded(answers, standing)
    assert gradient(SPACE, after) == pytest.approx(gradient(SPACE, alone(answers)))


def test_beyond_the_bound_it_does_not_matter_how_much_a_liar_scales() -> None:
    answers = answers_of(SPACE, 7, 1)
    found = []
    for factor in (-50, -9000):
        changed = [*answers[:-1], scaled(answers[-1], factor)]
        found.append(gradient(SPACE, alone(changed)))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-6)
    mean = gradient(SPACE, changed)
    assert np.linalg.norm(mean) > 100 * np.linalg.norm(found[1])


def test_answers_of_the_usual_size_keep_every_bit() -> None:
    signs = np.random.default_rng(2)
    answers = answers_of(SPACE, 9, 2, lambda *_: signs.choice([-0.5, 0.5], K))
    for (_, got), (_, want) in zip(alone(answers), answers, strict=True):
        assert got.derivatives.tobytes() == want.derivatives.tobytes()
    assert gradient(SPACE, alone(answers)).tobytes() == gradient(SPACE, answers).tobytes()


@given(st.integers(0, 99))
def test_a_bounded_mean_of_honest_answers_is_close_to_the_mean(seed: int) -> None:
    space = space_of(perturbations=64, head_perturbations=64)
    truth = np.random.default_rng(seed).standard_normal(space.size).astype(np.float32)
    answers = answers_of(space, 8, seed, lambda _, scope, seeds: space.dot(truth, scope, seeds))
    mean, found = gradient(space, answers), gradient(space, alone(answers))
    norm, bound = float(np.linalg.norm(mean)), float(np.linalg.norm(found))
    assert float(mean @ found) > 0.99 * norm * bound
    assert 0.7 * norm < bound < norm


@given(st.permutations(range(9)), st.integers(0, 9))
def test_the_order_of_clients_does_not_matter(order: list[int], seed: int) -> None:
    answers = answers_of(SPACE, 9, seed, scopes=[(0,), (1,), (2,)] * 3)
    answers[2] = scaled(answers[2], 40)
    there = {a.client: r for a, r in alone(answers)}
    back = {a.client: r for a, r in alone([answers[i] for i in order])}
    for client, report in there.items():
        assert report.derivatives.tobytes() == back[client].derivatives.tobytes()
    reference = Standing.initial(SPACE).moved(np.arange(SPACE.size, dtype=np.float32))
    one, other = (reference.heard(SPACE, [answers[i] for i in way]) for way in (range(9), order))
    for client, evidence in one.evidence.items():
        assert evidence.tobytes() == other.evidence[client].tobytes()


def test_earlier_answers_tell_what_is_usual_when_most_of_a_part_are_liars() -> None:
    honest = [scaled(a, 1 / size(a[1].derivatives)) for a in answers_of(SPACE, 10, 3)]
    standing = Standing.initial(SPACE)
    for _ in range(3):
        _, standing = bounded(honest, standing)
    liars = [scaled(a, 1000) for a in honest[:8]] + honest[8:]
    found, after = bounded(liars, standing)
    assert [round(size(r.derivatives), 2) for _, r in found] == [1.0] * 10
    for _ in range(20):
        _, after = bounded(liars, after)
    assert len(after.sizes) == 64
    assert size(bounded(liars, after)[0][0][1].derivatives) > 100  # they are the usual now


def test_a_claim_counts_no_more_than_the_median() -> None:
    answers = answers_of(SPACE, 5, 4)
    claims = [2, 2, 3, 1, 64]
    claimed = [(a, replace(r, n_examples=n)) for (a, r), n in zip(answers, claims, strict=True)]
    assert [r.n_examples for _, r in alone(claimed)] == [2, 2, 2, 1, 2]


def test_zeros_and_nobody() -> None:
    assert alone([]) == []
    zeros = [scaled(a, 0) for a in answers_of(SPACE, 3, 5)]
    lone = [*zeros, scaled(answers_of(SPACE, 4, 5)[3], 1e3)]
    for answers in (zeros, lone):
        assert all(not r.derivatives.any() for _, r in alone(answers))


# Standing


TRUTH = np.random.default_rng(8).standard_normal(SPACE.size).astype(np.float32)
NO_SIZES = np.zeros((0, 2))
TARGET = np.random.default_rng(9).standard_normal(SPACE.size).astype(np.float32)
LIES: dict[str, Callable[[Layers, np.ndarray, np.ndarray], np.ndarray]] = {
    "flip": lambda scope, seeds, true: -true,
    "collude": lambda scope, seeds, true: 10 * SPACE.dot(TARGET, scope, seeds),
}


def standing_after(
    n_parts: int,
    lie: str,
    liars: Sequence[int],
    first: int = 0,
    start: Standing | None = None,
    noise_size: float = 1.0,
) -> Standing:
    """After parts of ten clients whose gradients are TRUTH and noise, so many times as large."""
    standing = start or Standing.initial(SPACE)
    for part in range(first, first + n_parts):
        noise = noise_size * np.random.default_rng([part, 1]).standard_normal((10, SPACE.size))

        def slopes(
            client: int, scope: Layers, seeds: np.ndarray, noise: np.ndarray = noise
        ) -> np.ndarray:
            true = SPACE.dot(TRUTH + noise[client].astype(np.float32), scope, seeds)
            return LIES[lie](scope, seeds, true) if client in liars else true

        answers, standing = bounded(answers_of(SPACE, 10, part, slopes), standing)
        standing = standing.heard(SPACE, answers)
        sums = Sums(SPACE)
        sums.add(terms_of(SPACE.config, *_counted(answers, standing)))
        standing = standing.moved(sums.gradient())
    return standing


def _counted(answers: Sequence[Answer], standing: Standing) -> tuple[Any, ...]:
    kept, weights = screened(SPACE.config, answers, standing)
    return kept, 0, weights


@pytest.mark.parametrize(("lie", "n_parts", "noise"), [("flip", 20, 1), ("collude", 6, 4)])
def test_liars_lose_their_standing_and_honest_clients_keep_it(
    lie: str, n_parts: int, noise: float
) -> None:
    standing = standing_after(n_parts, lie, (2, 5, 7), noise_size=noise)
    shares = [standing.share(client) for client in range(10)]
    honest = [share for client, share in enumerate(shares) if client not in (2, 5, 7)]
    assert np.mean([shares[2], shares[5], shares[7]]) < 0.2
    assert np.mean(honest) > 0.6


def test_honest_clients_alone_keep_their_standing() -> None:
    standing = standing_after(30, "flip", ())
    assert np.mean([standing.share(client) for client in range(10)]) > 0.85


def test_many_true_answers_do_not_buy_lies() -> None:
    honest = standing_after(60, "flip", ())
    later = standing_after(5, "flip", (3,), first=60, start=honest)
    assert honest.share(3) > 0.9
    assert later.share(3) < 0.2


def test_who_has_no_standing_is_left_out_of_the_mean() -> None:
    answers = answers_of(SPACE, 4, 6)
    out = np.array([[0.0, 0.0], [-9.0, 1.0]])
    half = np.array([[2.0, 1.0], [0.5, 1.0]])
    standing = Standing(TRUTH, {1: out, 2: half}, NO_SIZES)
    kept, weights = screened(SPACE.config, answers, standing)
    assert [a.client for a, _ in kept] == [0, 2, 3]
    assert weights == [8, 4, 8]
    terms = terms_of(SPACE.config, kept, 0, weights)
    assert sum(term.weight for term in terms) == 2 * K * 20
    assert not set(answers[1][0].seeds[0]) & {seed for term in terms for seed in term.seeds}
    nobody = Standing(TRUTH, dict.fromkeys(range(4), out), NO_SIZES)
    assert screened(SPACE.config, answers, nobody) == ([], [])
    assert terms_of(SPACE.config, [], 0, []) == []


def test_a_few_slopes_and_an_unknown_gradient_say_nothing() -> None:
    for space, standing in (
        (
            space_of(perturbations=LEAST_SLOPES - 1, head_perturbations=1),
            Standing(TRUTH, {}, NO_SIZES),
        ),
        (SPACE, Standing.initial(SPACE)),
    ):
        assert standing.heard(space, answers_of(space, 6, 7)).evidence == {}
    enough = space_of(perturbations=LEAST_SLOPES, head_perturbations=1)
    heard = Standing(TRUTH, {}, NO_SIZES).heard(enough, answers_of(enough, 6, 7))
    assert len(heard.evidence) == 6
    assert all(
        evidence[0, 1] == 1 and not evidence[1].any() for evidence in heard.evidence.values()
    )


def test_old_answers_are_forgotten() -> None:
    space = space_of(perturbations=8, head_perturbations=8)
    standing = Standing(np.ones(space.size, np.float32), {}, NO_SIZES)
    for _ in range(200):
        standing = standing.heard(space, answers_of(space, 6, 7))
    assert len(standing.evidence) == 6
    for evidence in standing.evidence.values():
        assert evidence[0, 1] == pytest.approx(1 / (1 - 0.95**2), rel=1e-3)  # of 200 answers, 10


def test_a_standing_survives_as_arrays() -> None:
    standing = standing_after(3, "flip", (1,))
    again = Standing.from_arrays(standing.to_arrays(), SPACE.size)
    assert again.reference.tobytes() == standing.reference.tobytes()
    assert again.sizes.tobytes() == standing.sizes.tobytes()
    assert {c: e.tobytes() for c, e in again.evidence.items()} == {
        c: e.tobytes() for c, e in standing.evidence.items()
    }
    with pytest.raises(ValueError, match="a reference of"):
        Standing.from_arrays(standing.to_arrays(), SPACE.size + 1)


# Runs with hostile clients


HOSTILE = {0: "scale", 3: "flip", 4: "collude"}
RULES: dict[str, dict[str, Any]] = {
    "bounded": {"aggregate": "bounded", "split": True, "perturbations": 1},
    "screened": {"aggregate": "screened", "head_perturbations": 8, "snapshot_every": 4},
    "steps": {
        "aggregate": "screened",
        "upload": "steps",
        "seeds": "pool",
        "local_steps": 4,
        "snapshot_every": 3,
    },
}


def hostile_message(server: Server, assignment: Assignment) -> bytes:
    report, kind = contribution(server.replica, assignment), HOSTILE.get(assignment.client)
    if kind is None:
        return wire.encode_report(report)
    return attacked(kind, report, None, assignment, server.replica.space)


def act(server: Server) -> None:
    """Whatever comes next of a run."""
    asked = server.open_part(range(N_CLIENTS), 0.0)
    if asked:
        data = hostile_message(server, asked[0])
        assert server.receive(asked[0].client, data, 1.0) is None
    else:
        server.close_part(0.0)


@pytest.mark.parametrize("name", RULES)
def test_runs_with_hostile_clients_resume_and_replay_to_the_same_bits(
    name: str, path: Path, tmp_path: Path
) -> None:
    changes = {**RULES[name], "rounds": 6, "per_round": 5}
    with create(tmp_path / "whole", **changes) as ledger:
        server = Server(ledger)
        while not server.done:
            act(server)
        want = {k: v.tobytes() for k, v in server.replica.to_arrays().items()}
    create(path, **changes).close()
    for _ in range(100):
        with reopen(path) as ledger:
            server = Server(ledger)
            if server.done:
                break
            act(server)
    with Ledger(path) as ledger:
        verify(ledger)
        for replica in (Server(ledger).replica, replay(ledger)):
            assert {k: v.tobytes() for k, v in replica.to_arrays().items()} == want
    assert want["standing.sizes"]
    assert any(want["standing.reference"]) == (name != "bounded")


def test_clients_are_not_told_their_standing(path: Path) -> None:
    with create(path, aggregate="screened", head_perturbations=8, rounds=2) as ledger:
        server = Server(ledger)
        finish(server)
        assert server.replica.standing is not None
        public = server.replica.to_arrays(public=True)
        assert not [name for name in public if "standing" in name or name == "gradient"]
        assert wire.decode_state(wire.encode_state(public)).keys() == public.keys()
