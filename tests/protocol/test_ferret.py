"""Local steps that go up as a projection: what clients send and what the server makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger_runs import N_CLIENTS, PROJECTION, contribution, create, finish, path

from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.kernels import reference
from fwdllm.protocol import wire
from fwdllm.protocol.aggregate import Term
from fwdllm.protocol.client import answer, answer_all
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment, plan_part
from fwdllm.protocol.replay import replay
from fwdllm.protocol.report import Report, expected_shapes, fault
from fwdllm.protocol.server import Server
from fwdllm.protocol.space import Space

__all__ = ["path"]  # a fixture

LORA = LoRAConfig(rank=2)


def make(**changes: Any) -> FederationConfig:
    defaults: dict[str, Any] = {
        "rounds": 1,
        "upload": "projection",
        "method": "backprop",
        "local_steps": 3,
        "client_optimizer": "adam",
        "client_learning_rate": 1e-2,
        "perturbations": 5,
        "head_perturbations": 4,
        "batch_size": 2,
        "max_tokens": 20,
    }
    return FederationConfig(**{**defaults, **changes})


@pytest.fixture
def engine(bundled: Path) -> Engine:
    return half_trained(Engine.load(bundled, LORA))


@pytest.fixture(scope="module")
def examples(bundled: Path) -> list[Example]:
    return read_jsonl(bundled.parent / "pirate.train.jsonl")[:20]


@pytest.fixture
def encoder(shared: Path) -> tuple[Engine, list[Example]]:
    file = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    lora = LoRAConfig(rank=2, layers=(5,))
    engine = half_trained(Engine.load(file, lora, labels=("negative", "positive")))
    return engine, read_jsonl(shared / "data" / "sst2.train.jsonl")[:8]


def space_of(engine: Engine, config: FederationConfig) -> Space:
    assert engine.adapter is not None
    return Space(engine.adapter, config)


def planned(space: Space, n_clients: int = 1) -> list[Assignment]:
    return plan_part(space.config, space, 0, 0, range(n_clients), None, {}, 1)


def moved_by_weights(
    engine: Engine, config: FederationConfig, a: Assignment, examples: Sequence[Example]
) -> np.ndarray:
    """How far the same local steps move, as a client that uploads weights says: [space.size]."""
    space = space_of(engine, replace(config, upload="weights"))
    # Seeds for every step, which it has and does not need.
    steps = {k: np.repeat(getattr(a, k), config.local_steps, 0) for k in ("seeds", "head_seeds")}
    vector = answer(engine, space, replace(a, **steps), examples).vector
    assert vector is not None
    return space.unpack(vector, a.layers).astype(np.float64)


def stream(config: FederationConfig, seed: np.uint64, size: int) -> np.ndarray:
    kind = reference.rademacher if config.directions == "rademacher" else reference.normal
    return kind(int(seed), 0, size).astype(np.float64)


@pytest.mark.parametrize(
    "changes", [{}, {"split": True}, {"directions": "rademacher"}, {"seeds": "shared"}], ids=str
)
def test_scalars_are_products_of_the_whole_update_with_the_directions(
    engine: Engine, examples: list[Example], changes: dict[str, Any]
) -> None:
    config = make(**changes)
    space = space_of(engine, config)
    (a,) = planned(space)
    a = replace(a, layers=(1, 3) if config.split else None)
    report = answer(engine, space, a, examples)
    moved = moved_by_weights(engine, config, a, examples)
    assert np.abs(moved).max() > 1e-2
    want = [moved @ stream(config, seed, space.size) for seed in a.seeds[0]]
    np.testing.assert_allclose(report.derivatives, [want], rtol=1e-4, atol=1e-6)
    assert report.derivatives.dtype == np.float32
    assert report.head_derivatives.shape == (1, 0)
    assert report.vector is None
    assert report.n_examples == 6
    assert fault(config, report) is None


def test_a_head_is_projected_on_seeds_of_its_own(encoder: tuple[Engine, list[Example]]) -> None:
    engine, examples = encoder
    config = make()
    space = space_of(engine, config)
    (a,) = planned(space)
    report = answer(engine, space, a, examples)
    moved = moved_by_weights(engine, config, a, examples)
    n = space.adapter.n_lora
    assert np.abs(moved[n:]).max() > 1e-3
    want = [moved[n:] @ stream(config, seed, space.size)[n:] for seed in a.head_seeds[0]]
    np.testing.assert_allclose(report.head_derivatives, [want], rtol=1e-4, atol=1e-6)
    lora = [moved[:n] @ stream(config, seed, n) for seed in a.seeds[0]]
    np.testing.assert_allclose(report.derivatives, [lora], rtol=1e-4, atol=1e-6)


def test_a_report_takes_four_bytes_for_each_seed_however_many_steps(
    encoder: tuple[Engine, list[Example]],
) -> None:
    engine, examples = encoder
    for local_steps in (1, 3):
        space = space_of(engine, make(local_steps=local_steps))
        (a,) = planned(space)
        assert (a.seeds.shape, a.head_seeds.shape) == ((1, 5), (1, 4))
        report = answer(engine, space, a, examples)
        size = len(wire.encode_report(report))
        assert size == 34 + 4 * (5 + 4)
        assert size == wire.report_size(expected_shapes(space.config, space, a))


def test_clients_report_the_same_together_and_leave_the_adapter_as_it_was(
    engine: Engine, examples: list[Example]
) -> None:
    space = space_of(engine, make(per_round=3))
    before = space.adapter.theta.tobytes()
    plans = planned(space, 3)
    together = list(answer_all(engine, space, plans, lambda c: examples[c::3]))
    assert space.adapter.theta.tobytes() == before
    for a, got in zip(plans, together, strict=True):
        want = answer(engine, space, a, examples[a.client :: 3])
        assert got.derivatives.tobytes() == want.derivatives.tobytes()
    assert len({got.derivatives.tobytes() for got in together}) == 3


def test_what_explodes_is_refused(engine: Engine, examples: list[Example]) -> None:
    config = make(client_optimizer="sgd", client_learning_rate=1e30)
    space = space_of(engine, config)
    before = space.adapter.theta.tobytes()
    report = answer(engine, space, planned(space)[0], examples)
    assert fault(config, report) is not None
    assert space.adapter.theta.tobytes() == before


# The server


def toy(assignment: Assignment, moved: np.ndarray, head: np.ndarray, n_lora: int) -> Report:
    """The report of a client that has moved so far, by the streams of the specification."""
    a = assignment
    scalars = [moved @ reference.normal(int(seed), 0, n_lora) for seed in a.seeds[0]]
    of_head = [head @ reference.normal(int(seed), n_lora, len(head)) for seed in a.head_seeds[0]]
    arrays = (np.array([found], np.float32) for found in (scalars, of_head))
    return Report(a.round, a.part, 8, 10, 1.0, 0.5, *arrays)


def rebuilt(path: Path, **changes: Any) -> tuple[np.ndarray, ...]:
    """What one client moved, what the server makes of it at rate 1, and the same sum in NumPy."""
    sgd = {"optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant"}
    with create(path, **{**PROJECTION, **sgd, "rounds": 1, "per_round": 1, **changes}) as ledger:
        server = Server(ledger)
        adapter = server.replica.space.adapter
        n, before = adapter.n_lora, server.replica.theta.astype(np.float64)
        moved = np.random.default_rng(5).standard_normal(before.size)
        (a,) = server.open_part(range(N_CLIENTS), 0.0)
        report = toy(a, moved[:n], moved[n:], n)
        assert server.receive(a.client, wire.encode_report(report), 1.0) is None
        assert server.close_part(2.0) is not None
        got = before - server.replica.theta
        want = np.zeros_like(moved)
        for seed, scalar in zip(a.seeds[0], report.derivatives[0], strict=True):
            want[:n] += scalar * reference.normal(int(seed), 0, n) / a.seeds.size
        for seed, scalar in zip(a.head_seeds[0], report.head_derivatives[0], strict=True):
            want[n:] += scalar * reference.normal(int(seed), n, want.size - n) / a.head_seeds.size
        return moved, got, want


@pytest.mark.parametrize("seeds", ["own", "shared"])
def test_the_server_adds_up_the_directions_again(path: Path, seeds: str) -> None:
    _, got, want = rebuilt(path, seeds=seeds, perturbations=7, head_perturbations=3)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_many_directions_come_to_what_the_client_moved(tmp_path: Path) -> None:
    """The error of d parameters from K directions is sqrt((d + 1) / K) of their length."""
    errors = []
    for n in (64, 4096):
        moved, got, _ = rebuilt(tmp_path / str(n), perturbations=n, head_perturbations=n)
        errors.append(np.linalg.norm(got - moved) / np.linalg.norm(moved))
    assert errors[1] < 1.5 * np.sqrt(moved.size / 4096)
    assert errors[1] < errors[0] / 4  # an eighth is expected
    assert abs(got @ moved / (moved @ moved) - 1) < 0.1


def test_a_replay_gives_the_bits_and_clients_need_terms_alone(path: Path) -> None:
    with create(path, **PROJECTION) as ledger:
        server = Server(ledger)
        finish(server)
        assert replay(ledger).theta.tobytes() == server.replica.theta.tobytes()
        for closed in ledger.rounds():
            assert closed.message is not None
            assert wire.decode_update(closed.message).vector is None


def terms_after(server: Server, answers: list[tuple[Assignment, Report]]) -> tuple[Term, ...]:
    """The terms of the round that these answers close."""
    for a, report in answers:
        assert server.receive(a.client, wire.encode_report(report), 1.0) is None
    assert server.close_part(2.0) is not None
    message = server.ledger.rounds()[-1].message
    assert message is not None
    return wire.decode_update(message).terms


def test_a_median_is_over_clients_by_seed(path: Path) -> None:
    with create(path, **PROJECTION, seeds="shared", aggregate="median") as ledger:
        server = Server(ledger)
        plans = server.open_part(range(N_CLIENTS), 0.0)
        answers = [(a, contribution(server.replica, a)) for a in plans]
        median = np.median([report.derivatives[0] for _, report in answers], axis=0)
        want = dict(zip(plans[0].seeds[0].tolist(), median, strict=True))
        terms = terms_after(server, answers)
        of_lora = [term for term in terms if term.layers is None]
        assert sum(len(term.seeds) for term in of_lora) == len(want) == 4
        for term in of_lora:
            # A term's weight is that of all its seeds together.
            means = term.coefficients * (len(term.seeds) / term.weight)
            np.testing.assert_allclose(means, [want[int(s)] for s in term.seeds], rtol=1e-6)


def test_noise_of_privacy_is_added_to_projections(path: Path) -> None:
    private = {"seeds": "shared", "sigma": 0.5, "weighted": False, "max_parts": 1}
    with create(path, **{**PROJECTION, **private, "per_round": N_CLIENTS}) as ledger:
        server = Server(ledger)
        answers = []
        for a in server.open_part(range(N_CLIENTS), 0.0):
            report = contribution(server.replica, a)
            answers.append((a, report))
        found = terms_after(server, answers)
        clear = {
            int(seed): sum(float(r.derivatives[0, k]) for _, r in answers)
            for k, seed in enumerate(answers[0][0].seeds[0])
        }
        coefficients = {
            int(seed): float(x)
            for term in found
            if term.layers is None
            for seed, x in zip(term.seeds, term.coefficients, strict=True)
        }
        assert coefficients.keys() == clear.keys()
        assert all(abs(coefficients[seed] - clear[seed]) > 1e-4 for seed in clear)
