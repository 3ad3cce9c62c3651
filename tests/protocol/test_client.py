"""Clients of the bundled model: what they report, alone or together, and what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.errors import ConfigError, DataError
from fwdllm.kernels import reference
from fwdllm.protocol import client as client_module
from fwdllm.protocol.aggregate import mean_vector, terms_of
from fwdllm.protocol.client import answer, answer_all
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment, plan_part
from fwdllm.protocol.replica import Replica, Update
from fwdllm.protocol.report import Report, fault
from fwdllm.protocol.seeds import batch_indices
from fwdllm.protocol.space import Space

LORA = LoRAConfig(rank=2)
N_CLIENTS = 5


def make(**changes: Any) -> FederationConfig:
    defaults = {
        "rounds": 1,
        "per_round": N_CLIENTS,
        "perturbations": 3,
        "head_perturbations": 4,
        "batch_size": 2,
        "max_tokens": 20,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "schedule": "constant",
        "client_learning_rate": 1e-3,
    }
    return FederationConfig(**{**defaults, **changes})


@pytest.fixture
def engine(bundled: Path) -> Engine:
    return half_trained(Engine.load(bundled, LORA))


@pytest.fixture(scope="module")
def examples(bundled: Path) -> list[Example]:
    return read_jsonl(bundled.parent / "pirate.train.jsonl")[:20]


def space_of(engine: Engine, config: FederationConfig) -> Space:
    assert engine.adapter is not None
    return Space(engine.adapter, config)


def planned(space: Space, n_clients: int = N_CLIENTS) -> list[Assignment]:
    return plan_part(space.config, space, 0, 0, range(n_clients), None, {}, 1)


def share(examples: Sequence[Example], client: int) -> Sequence[Example]:
    """A client's examples; client 3 has only one."""
    return examples[:1] if client == 3 else examples[client::N_CLIENTS]


def batch_of(engine: Engine, space: Space, a: Assignment, own: Sequence[Example], step: int = 0):
    config = space.config
    chosen = batch_indices(a.batch_seed, a.first_step + step, len(own), config.batch_size)
    return engine.encode([own[i] for i in chosen], config.max_tokens)


def assert_same(got: Report, want: Report) -> None:
    names = ("round", "part", "n_examples", "n_tokens", "seconds", "loss")
    assert [getattr(got, n) for n in names] == [getattr(want, n) for n in names]
    assert got.derivatives.tobytes() == want.derivatives.tobytes()
    assert got.head_derivatives.tobytes() == want.head_derivatives.tobytes()
    assert (got.vector is None) == (want.vector is None)
    if got.vector is not None and want.vector is not None:
        assert got.vector.tobytes() == want.vector.tobytes()


# Scalars


@pytest.mark.parametrize("rows", [1, 500, 1 << 15])
@pytest.mark.parametrize("method", ["forward-ad", "central", "backprop"])
@pytest.mark.parametrize("changes", [{}, {"split": True}, {"seeds": "shared"}], ids=str)
def test_clients_report_the_same_bits_together_as_alone(
    engine: Engine,
    examples: list[Example],
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    method: str,
    rows: int,
) -> None:
    space = space_of(engine, make(method=method, **changes))
    assignments = planned(space)
    alone = [answer(engine, space, a, share(examples, a.client)) for a in assignments]
    monkeypatch.setattr(client_module, "_LANE_ROWS", rows)
    together = list(answer_all(engine, space, assignments, lambda c: share(examples, c)))
    for got, want in zip(together, alone, strict=True):
        assert_same(got, want)
    assert len({report.derivatives.tobytes() for report in alone}) == N_CLIENTS
    assert [report.n_examples for report in alone] == [2, 2, 2, 1, 2]


@pytest.mark.parametrize("method", ["forward-ad", "central", "forward-difference"])
@pytest.mark.parametrize(
    "changes", [{}, {"split": True}, {"directions": "lora-fa"}, {"directions": "rademacher"}],
    ids=str,
)  # fmt: skip
def test_reports_are_the_derivatives_of_clients_batches(
    engine: Engine, examples: list[Example], changes: dict[str, Any], method: str
) -> None:
    space = space_of(engine, make(method=method, **changes))
    assignments = planned(space)
    reports = answer_all(engine, space, assignments, lambda c: share(examples, c))
    for a, report in zip(assignments, reports, strict=True):
        own = share(examples, a.client)
        batch = batch_of(engine, space, a, own)
        directions = space.directions(a.layers)
        probe = engine.directional_derivatives(
            batch, a.seeds[0], method, space.config.epsilon, directions
        )
        # Differences of losses divided by epsilon carry their rounding.
        tolerance = 1e-6 if method == "forward-ad" else 1e-5
        np.testing.assert_allclose(report.derivatives[0], probe.derivative, rtol=tolerance)
        assert report.loss == pytest.approx(probe.loss, rel=1e-9)
        assert report.derivatives.dtype == np.float32
        assert report.n_tokens == probe.n_tokens
        assert (report.round, report.part, report.vector) == (a.round, a.part, None)
        assert report.head_derivatives.shape == (1, 0)
        assert fault(space.config, report) is None


def test_slopes_of_a_head_are_products_with_its_gradient(shared: Path) -> None:
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    lora = LoRAConfig(rank=2, layers=(5,))
    engine = half_trained(Engine.load(path, lora, labels=("negative", "positive")))
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:8]
    space = space_of(engine, make(head_perturbations=6))
    assignments = planned(space, 2)
    reports = list(answer_all(engine, space, assignments, lambda c: examples[c::2]))
    for a, report in zip(assignments, reports, strict=True):
        batch = batch_of(engine, space, a, examples[a.client :: 2])
        probe = engine.directional_derivatives(batch, a.seeds[0])
        np.testing.assert_allclose(report.derivatives[0], probe.derivative, rtol=1e-5)
        assert probe.head_gradient is not None
        n_lora = space.adapter.n_lora
        want = [
            probe.head_gradient.astype(np.float64)
            @ reference.normal(int(seed), n_lora, space.adapter.n_head)
            for seed in a.head_seeds[0]
        ]
        np.testing.assert_allclose(report.head_derivatives[0], want, rtol=1e-5, atol=1e-6)
        assert_same(answer(engine, space, a, examples[a.client :: 2]), report)


# Local training


def local_theta(
    engine: Engine, space: Space, a: Assignment, own: Sequence[Example]
) -> tuple[np.ndarray, list[float]]:
    """Where SGD along forward gradients of the client's batches leads, written out; its losses."""
    config, adapter = space.config, space.adapter
    before = adapter.theta.copy()
    directions = space.directions(a.layers)
    inside = np.zeros(adapter.n_lora, np.float32)
    for t in adapter.targets:
        inside[t.offset : t.offset + t.size(LORA.rank)] = a.layers is None or t.layer in a.layers
    losses = []
    for step in range(config.local_steps):
        batch = batch_of(engine, space, a, own, step)
        probe = engine.directional_derivatives(
            batch, a.seeds[step], config.method, config.epsilon, directions
        )
        losses.append(probe.loss)
        moved = np.zeros(adapter.n_lora)
        for seed, slope in zip(a.seeds[step], probe.derivative, strict=True):
            moved += slope * reference.normal(int(seed), 0, adapter.n_lora) * inside
        moved *= config.client_learning_rate / config.perturbations
        adapter.theta[: adapter.n_lora] -= moved.astype(np.float32)
    after = adapter.theta.copy()
    adapter.theta[:] = before
    return after, losses


def server_theta(
    engine: Engine, config: FederationConfig, answers: Sequence[tuple[Assignment, Report]]
) -> np.ndarray:
    """The adapter of a server that started from the engine's, after an update."""
    adapter = replace(space_of(engine, config).adapter)
    replica = Replica(config, replace(adapter, theta=adapter.theta.copy()))
    if config.upload == "weights":
        replica.apply(Update(0, vector=mean_vector(config, replica.space, answers)))
    else:
        replica.apply(Update(0, tuple(terms_of(config, answers, 0))))
    return replica.theta


@pytest.mark.parametrize("upload", ["steps", "weights"])
@pytest.mark.parametrize("split", [False, True])
def test_a_server_at_rate_1_comes_to_where_its_only_client_was(
    bundled: Path, examples: list[Example], upload: str, split: bool
) -> None:
    # Rounded activations would make steps of a tiny difference in the adapter.
    engine = half_trained(Engine.load(bundled, LORA, exact=True))
    config = make(upload=upload, local_steps=4, client_learning_rate=0.001, split=split)
    space = space_of(engine, config)
    (a,) = planned(space, 1)
    a = replace(a, layers=(1, 3) if split else None)
    want, losses = local_theta(engine, space, a, examples)
    report = answer(engine, space, a, examples)
    got = server_theta(engine, config, [(a, report)])
    assert np.abs(want - space.adapter.theta).max() > 1e-3
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)
    assert report.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert report.n_examples == 8
    assert fault(config, report) is None


def test_weights_of_one_step_of_sgd_are_scalars_at_its_rate(
    engine: Engine, examples: list[Example]
) -> None:
    rate = 0.02
    of_weights = make(upload="weights", client_learning_rate=rate)
    of_scalars = make(learning_rate=rate)
    found = []
    for config in (of_weights, of_scalars):
        space = space_of(engine, config)
        assignments = planned(space)
        reports = answer_all(engine, space, assignments, lambda c: share(examples, c))
        answers = list(zip(assignments, reports, strict=True))
        found.append(server_theta(engine, config, answers))
    assert np.abs(found[0] - space_of(engine, of_weights).adapter.theta).max() > 1e-3
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("changes", [{}, {"split": True}, {"directions": "lora-fa"}], ids=str)
def test_local_steps_by_backprop_that_upload_weights_take_the_gradient_itself(
    engine: Engine, examples: list[Example], changes: dict[str, Any]
) -> None:
    rate = 0.05
    local = {"upload": "weights", "local_steps": 2, "client_learning_rate": rate}
    space = space_of(engine, make(method="backprop", perturbations=1, **local, **changes))
    config, theta = space.config, space.adapter.theta
    a = replace(planned(space, 1)[0], layers=(1, 3) if config.split else None)
    report = answer(engine, space, a, examples)
    before, own = theta.copy(), space.directions(a.layers)
    for step in range(2):
        gradient = engine.gradient(batch_of(engine, space, a, examples, step)).values
        theta -= rate * own.expand(own.project(gradient))
    moved = own.project(before - theta)
    theta[:] = before
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_allclose(report.vector, space.pack(moved, a.layers), rtol=0, atol=1e-6)
    assert report.n_examples == 4
    assert fault(config, report) is None


def test_local_training_of_many_is_that_of_each(engine: Engine, examples: list[Example]) -> None:
    space = space_of(engine, make(upload="weights", local_steps=2, client_optimizer="adamw"))
    assignments = planned(space)
    together = answer_all(engine, space, assignments, lambda c: share(examples, c))
    for a, got in reversed(list(zip(assignments, together, strict=True))):
        assert_same(got, answer(engine, space, a, share(examples, a.client)))


# What is left behind


@pytest.mark.parametrize("upload", ["scalars", "steps", "weights"])
def test_the_adapter_is_the_servers_again_after_an_answer(
    engine: Engine, examples: list[Example], upload: str
) -> None:
    config = make(upload=upload, local_steps=1 if upload == "scalars" else 3)
    space = space_of(engine, config)
    theta, before = space.adapter.theta, space.adapter.theta.tobytes()
    for _ in answer_all(engine, space, planned(space), lambda c: share(examples, c)):
        assert space.adapter.theta.tobytes() == before
    assert space.adapter.theta is theta


class Tripping:
    """Examples of which one cannot be had."""

    def __init__(self, examples: Sequence[Example], good: int) -> None:
        self.examples, self.left = examples, good

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> Example:
        self.left -= 1
        if self.left < 0:
            raise DataError("the disk is gone")
        return self.examples[i]


@pytest.mark.parametrize("upload", ["steps", "weights"])
def test_the_adapter_is_the_servers_again_after_an_error(
    engine: Engine, examples: list[Example], upload: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    space = space_of(engine, make(upload=upload, local_steps=4, client_learning_rate=0.01))
    before = space.adapter.theta.tobytes()
    (a,) = planned(space, 1)
    with pytest.raises(DataError, match="the disk is gone"):
        answer(engine, space, a, Tripping(examples, 5))  # type: ignore[arg-type]
    assert space.adapter.theta.tobytes() == before

    real, calls = engine.group_derivatives, []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(space.adapter.theta.tobytes())
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(engine, "group_derivatives", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answer(engine, space, a, examples)
    assert len(set(calls)) == 3
    assert space.adapter.theta.tobytes() == before


@pytest.mark.parametrize("method", ["forward-ad", "backprop"])
@pytest.mark.parametrize("upload", ["steps", "weights"])
def test_local_training_that_explodes_is_a_report_the_server_refuses(
    engine: Engine, examples: list[Example], upload: str, method: str
) -> None:
    config = make(upload=upload, method=method, local_steps=3, client_learning_rate=1e30)
    space = space_of(engine, config)
    before = space.adapter.theta.tobytes()
    (a,) = planned(space, 1)
    report = answer(engine, space, a, examples)
    assert fault(config, report) is not None
    assert space.adapter.theta.tobytes() == before


# Derivatives of groups


def grouped(engine: Engine, texts: Sequence[Sequence[str]]) -> tuple[Batch, list[int]]:
    batch = engine.encode([Example(text=text) for group in texts for text in group])
    return batch, [len(group) for group in texts]


TEXTS = [
    ["The cat sat on the mat.", "A dog ran."],
    ["Rain fell all day long."],
    ["The sun was warm and the hill was green.", "She sang.", "He said no."],
]


@pytest.mark.parametrize("method", ["forward-ad", "central", "forward-difference"])
def test_a_group_has_the_same_bits_in_any_company(engine: Engine, method: str) -> None:
    seeds = np.arange(6, dtype=np.uint64).reshape(3, 2) + np.uint64(50)
    alone = [
        engine.group_derivatives(*grouped(engine, [TEXTS[i]]), seeds[i : i + 1], method)[0]
        for i in range(3)
    ]
    for order in ([0, 1, 2], [2, 0], [1, 2, 0], [1, 1, 1, 0]):
        batch, sizes = grouped(engine, [TEXTS[i] for i in order])
        together = engine.group_derivatives(batch, sizes, seeds[order], method)
        for i, probe in zip(order, together, strict=True):
            assert probe.derivative.tobytes() == alone[i].derivative.tobytes()
            assert (probe.loss, probe.n_tokens) == (alone[i].loss, alone[i].n_tokens)
            np.testing.assert_array_equal(probe.seeds, seeds[i])


@pytest.mark.parametrize("method", ["forward-ad", "central"])
def test_a_group_has_the_derivatives_of_its_batch(engine: Engine, method: str) -> None:
    seeds = np.arange(6, dtype=np.uint64).reshape(3, 2) + np.uint64(50)
    batch, sizes = grouped(engine, TEXTS)
    for i, probe in enumerate(engine.group_derivatives(batch, sizes, seeds, method)):
        own, _ = grouped(engine, [TEXTS[i]])
        want = engine.directional_derivatives(own, seeds[i], method)
        np.testing.assert_allclose(probe.derivative, want.derivative, rtol=1e-6)
        assert probe.loss == pytest.approx(want.loss, rel=1e-12)


@pytest.mark.parametrize(
    ("sizes", "n_seeds"), [([2, 1], 2), ([2, 1, 2], 3), ([2, 1, 4], 3), ([2, 4], 3), ([], 0)]
)
def test_groups_must_fit_the_batch_and_their_seeds(
    engine: Engine, sizes: list[int], n_seeds: int
) -> None:
    batch, _ = grouped(engine, TEXTS)
    with pytest.raises(ConfigError):
        engine.group_derivatives(batch, sizes, np.ones((n_seeds, 2), np.uint64))


@pytest.fixture
def rows_of_layers(engine: Engine) -> list[tuple[int, int]]:
    """Every layer that the model goes through, and the rows that it works on."""
    found, real = [], engine.graph.family.layer

    def layer(args: Any, p: Any, number: int, x: np.ndarray) -> np.ndarray:
        found.append((number, len(x)))
        return real(args, p, number, x)

    engine.graph.family = replace(engine.graph.family, layer=layer)
    return found


@pytest.mark.parametrize("method", ["forward-ad", "central", "forward-difference"])
@pytest.mark.parametrize("scope", [None, (0,), (1,), (2, 3), (1, 3), (3,)], ids=str)
def test_tokens_are_those_that_a_scopes_layers_and_those_before_worked_on(
    engine: Engine, rows_of_layers: list[tuple[int, int]], scope: Any, method: str
) -> None:
    """Before the first perturbed layer one lane stands for all, so it is counted once."""
    n_layers = engine.args.n_layers
    assert n_layers > 3
    directions = space_of(engine, make(split=True)).directions(scope)
    first = 0 if scope is None else scope[0]
    lanes = {"forward-ad": 4, "central": 6, "forward-difference": 4}[method]
    seeds = np.arange(9, dtype=np.uint64).reshape(3, 3) + np.uint64(50)

    batch, sizes = grouped(engine, TEXTS)
    probe = engine.directional_derivatives(batch, seeds[0], method, directions=directions)
    assert [number for number, _ in rows_of_layers] == list(range(n_layers))
    rows = [n for _, n in rows_of_layers]
    assert rows == [batch.n_rows * (lanes if i >= first else 1) for i in range(n_layers)]
    want = batch.n_rows * (first + lanes * (n_layers - first)) / n_layers
    assert probe.n_tokens == round(want) == round(sum(rows) / n_layers)
    assert isinstance(probe.n_tokens, int)
    own = engine.directional_derivatives(
        batch, seeds[0], method, directions=directions, per_example=True
    )
    assert own.n_tokens == probe.n_tokens

    rows_of_layers.clear()
    groups = engine.group_derivatives(batch, sizes, seeds, method, directions=directions)
    assert abs(sum(g.n_tokens for g in groups) - sum(n for _, n in rows_of_layers) / n_layers) <= 2
    for texts, group in zip(TEXTS, groups, strict=True):
        alone, _ = grouped(engine, [texts])
        assert group.n_tokens == round(alone.n_rows / batch.n_rows * want)


def test_a_clients_tokens_are_those_of_its_layers(engine: Engine, examples: list[Example]) -> None:
    space = space_of(engine, make(split=True))
    (a,) = planned(space, 1)
    found = {
        layer: answer(engine, space, replace(a, layers=(layer,)), examples).n_tokens
        for layer in space.layers
    }
    n_layers, whole = engine.args.n_layers, answer(engine, space, replace(a, layers=None), examples)
    rows = batch_of(engine, space, a, examples).n_rows
    assert whole.n_tokens == found[0] == 4 * rows
    for layer, n_tokens in found.items():
        assert n_tokens == round(rows * (layer + 4 * (n_layers - layer)) / n_layers)
    assert sorted(found.values(), reverse=True) == list(found.values())
    assert len(set(found.values())) == len(found)


def test_groups_need_seeds_an_adapter_and_a_method(engine: Engine, bundled: Path) -> None:
    batch, sizes = grouped(engine, TEXTS)
    with pytest.raises(ConfigError, match="at least one seed"):
        engine.group_derivatives(batch, sizes, np.ones((3, 0), np.uint64))
    with pytest.raises(ConfigError, match="method"):
        engine.group_derivatives(batch, sizes, np.ones((3, 1), np.uint64), "exact")
    with pytest.raises(ConfigError, match="adapter"):
        Engine.load(bundled).group_derivatives(batch, sizes, np.ones((3, 1), np.uint64))
