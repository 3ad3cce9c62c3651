"""Kinds of directions: what they are in theta, in the kernels and in an update."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch_model import TorchModel, gradient

from fwdllm.bench.inputs import half_trained
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine, Example, LoRAConfig
from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.directions import (
    Dense,
    Directions,
    Sparse,
    foresight_mask,
    lora_fa,
    lora_xs,
    spiel,
    subzero,
)
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.estimators.plan import example_seeds
from fwdllm.engine.settings import SLOPE_METHODS, DirectionsConfig, Scope
from fwdllm.kernels import cpu
from fwdllm.kernels.types import QuantType

SEEDS = np.arange(6, dtype=np.uint64) + 70
TEXTS = ["The cat sat on the mat.", "A dog ran.", "Rain fell all day long over the green hills."]


def checkered(adapter: Adapter) -> Sparse:
    mask = (np.arange(adapter.n_lora) % 3 == 0).astype(np.float32)
    return Sparse(Dense(adapter), mask)


def random_weight(target: Target) -> np.ndarray:
    shape = (target.n_out, target.n_in)
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


MAKERS: dict[str, Callable[[Adapter], Directions]] = {
    "normal": Dense,
    "rademacher": lambda a: Dense(a, "rademacher"),
    "scope": lambda a: Dense(a, scope=Scope(layers=(1,), targets=("attn_q", "ffn_up"))),
    "sparse": checkered,
    "spiel": lambda a: spiel(a, DirectionsConfig("spiel"), 3),
    "lora-fa": lora_fa,
    "lora-xs": lambda a: lora_xs(a, random_weight),
    "subzero": lambda a: subzero(a, 5, seed=3),
    "subzero in a scope": lambda a: subzero(a, 4, 9, Scope(targets=("ffn_up",))),
}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    make_decoder(path, Shape(2, 128, 4, 2, 32, 160, 2048), QuantType.F32, seed=1)
    return path


def load(path: Path, device: str = "cpu") -> tuple[Engine, Adapter, Batch]:
    config = LoRAConfig(rank=3, targets=("attn_q", "attn_v", "ffn_up"))
    engine = half_trained(Engine.load(path, config, exact=True, device=device))
    assert engine.adapter is not None
    return engine, engine.adapter, engine.encode([Example(text=text) for text in TEXTS])


def vector(directions: Directions, seed: int) -> np.ndarray:
    """v(seed), float32 [n_lora]."""
    return directions.expand(directions.combine(np.array([seed], np.uint64), np.ones(1, "f")))


@makers
def test_the_map_is_linear_and_project_is_its_transpose(path: Path, make) -> None:
    _, adapter, _ = load(path)
    directions = make(adapter)
    rng = np.random.default_rng(0)
    z = directions.combine(SEEDS, rng.normal(size=6).astype(np.float32))
    theta = rng.normal(size=adapter.n_lora).astype(np.float32)
    assert z.shape == directions.project(theta).shape == (directions.size,)
    assert directions.expand(z) @ theta == pytest.approx(z @ directions.project(theta), rel=1e-4)
    both = directions.combine(SEEDS[:2], np.array([2, -1], np.float32))
    want = 2 * vector(directions, SEEDS[0]) - vector(directions, SEEDS[1])
    np.testing.assert_allclose(directions.expand(both), want, atol=1e-5)


@makers
@pytest.mark.parametrize("method", [*SLOPE_METHODS, "backprop"])
def test_slopes_are_those_of_autograd(path: Path, make, method: str) -> None:
    engine, adapter, batch = load(path)
    directions = make(adapter)
    true = gradient(TorchModel(engine), batch)[: adapter.n_lora]
    want = np.array([true @ vector(directions, seed) for seed in SEEDS])
    got = engine.directional_derivatives(batch, SEEDS, method, directions=directions)
    error = {"central": 1e-3, "forward-difference": 0.05}.get(method, 1e-5)
    assert np.linalg.norm(got.derivative - want) < error * np.linalg.norm(want)
    np.testing.assert_array_equal(got.seeds, SEEDS)


@makers
def test_the_reference_backend_agrees(path: Path, make) -> None:
    slopes = []
    for device in ("cpu", "reference"):
        engine, adapter, batch = load(path, device)
        probe = engine.directional_derivatives(batch, SEEDS[:2], directions=make(adapter))
        slopes.append(probe.derivative)
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [Dense, lambda a: subzero(a, 5, 3)], ids=["dense", "subzero"])
@pytest.mark.parametrize("method", [*SLOPE_METHODS, "backprop"])
def test_every_example_has_its_own_direction(path: Path, make, method: str) -> None:
    """Slopes of the examples' shares of the loss, the same as each example alone gives."""
    engine, adapter, batch = load(path)
    directions = make(adapter)
    probe = engine.directional_derivatives(
        batch, SEEDS, method, directions=directions, per_example=True
    )
    np.testing.assert_array_equal(probe.seeds, example_seeds(SEEDS, 3))
    assert len(np.unique(probe.seeds)) == probe.seeds.size
    labels = np.bincount(batch.label_sequence)
    for i, text in enumerate(TEXTS):
        alone = engine.encode([Example(text=text)])
        want = engine.directional_derivatives(
            alone, probe.seeds[:, i], method, directions=directions
        )
        share = labels[i] / labels.sum()
        np.testing.assert_allclose(probe.derivative[:, i], share * want.derivative, rtol=1e-9)


def test_seeds_of_examples_survive_blocks(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences in passes of their own, and rows in blocks that cut through sequences."""
    engine, _, batch = load(path)
    want = engine.directional_derivatives(batch, SEEDS, per_example=True)
    plan = type(engine.graph.plan(batch, 4))
    for block_rows in (8, 40):
        for lanes in (3, 7):
            small = plan(block_rows, lanes, None)
            monkeypatch.setattr(engine.graph, "plan", lambda batch, n, small=small: small)
            got = engine.directional_derivatives(batch, SEEDS, per_example=True)
            np.testing.assert_array_equal(got.derivative, want.derivative)


@makers
def test_an_update_moves_along_the_directions(path: Path, make) -> None:
    _, adapter, _ = load(path)
    directions = make(adapter)
    before = adapter.theta.copy()
    adapter.add(SEEDS[:2], [0.5, -1.0], directions)
    want = 0.5 * vector(directions, SEEDS[0]) - vector(directions, SEEDS[1])
    np.testing.assert_allclose(adapter.theta - before, want, atol=1e-5)


def test_what_each_kind_leaves_alone(path: Path) -> None:
    _, adapter, _ = load(path)
    rank = adapter.config.rank
    first = adapter.targets[0]
    v = vector(lora_fa(adapter), 5)
    assert not v[first.offset : first.offset + rank * first.n_in].any()
    assert v[first.offset + rank * first.n_in : first.offset + first.size(rank)].all()
    scoped = vector(Dense(adapter, scope=Scope(layers=(1,))), 5)
    inside = [t for t in adapter.targets if t.layer == 1]
    assert not scoped[: inside[0].offset].any()
    np.testing.assert_array_equal(
        scoped[inside[0].offset :], cpu.normal(5, 0, adapter.n_lora)[inside[0].offset :]
    )
    a = vector(subzero(adapter, 2, seed=1), 5)[: rank * first.n_in].reshape(rank, first.n_in)
    assert np.linalg.matrix_rank(a, tol=1e-4) == 2
    assert not vector(checkered(adapter), 5)[1::3].any()


def test_lora_xs_holds_the_leading_singular_vectors(path: Path) -> None:
    """Of weights with a spectrum that falls, as numpy's SVD has them up to signs."""
    _, adapter, _ = load(path)
    spectrum = 0.8 ** np.arange(128)
    weights = {}

    def decoded(t: Target) -> np.ndarray:
        rng = np.random.default_rng(t.offset)
        u, v = (np.linalg.qr(rng.normal(size=(n, 128)))[0] for n in (max(t.n_out, 128), t.n_in))
        weights[t.name] = ((u * spectrum) @ v.T)[: t.n_out].astype(np.float32)
        return weights[t.name]

    directions = lora_xs(adapter, decoded)
    assert directions.size == 9 * len(adapter.targets)
    for t in adapter.targets:
        u, _, v = np.linalg.svd(weights[t.name])
        a, found = adapter.factors(t).a, directions.bases[t.name].b
        assert found is not None
        np.testing.assert_allclose(np.abs(a @ v[:3].T), np.eye(3), atol=1e-3)
        np.testing.assert_allclose(np.abs(found @ u[:, :3]), np.eye(3), atol=1e-3)


def test_foresight_keeps_what_can_move_the_output(path: Path) -> None:
    """With B zero, A's columns are ranked by their inputs and B's by what A makes of them."""
    engine, adapter, batch = load(path)
    squares = engine.input_mean_squares(batch)
    assert {name: s.shape for name, s in squares.items()} == {
        t.name: (t.n_in,) for t in adapter.targets
    }
    mask = foresight_mask(adapter, squares, keep=0.25)
    assert mask.sum() == round(0.25 * adapter.n_lora)
    target = adapter.targets[0]
    rank = adapter.config.rank
    a = mask[target.offset : target.offset + rank * target.n_in].reshape(rank, target.n_in)
    scores = squares[target.name]
    for row in a:  # a threshold on the inputs, for each rank its own
        if 0 < row.sum() < len(row):
            assert scores[row == 1].min() >= scores[row == 0].max()
    engine.use_directions(DirectionsConfig("sparse", keep=0.25), 0, [Example(text=TEXTS[0])])
    assert isinstance(engine.directions, Sparse)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a: Dense(a, "cauchy"), "distribution"),
        (lambda a: Dense(a, scope=Scope(layers=(7,))).targets, "scope of layers 7"),
        (lambda a: subzero(a, 0, 1), "no subspace"),
        (lambda a: subzero(a, 1000, 1), "no subspace"),
        (lambda a: Sparse(Dense(a), np.ones(3, np.float32)), "mask"),
        (lambda a: foresight_mask(a, {}, 0.0), "share of parameters"),
        (lambda a: DirectionsConfig("dense"), "directions are normal"),
        (lambda a: DirectionsConfig("spiel", keep=0.0), "keep must be a number above 0"),
        (lambda a: DirectionsConfig("spiel", reselect=0), "reselect must be a whole number from 1"),
    ],
)
def test_bad_directions(path: Path, make, message: str) -> None:
    _, adapter, _ = load(path)
    with pytest.raises(ConfigError, match=message):
        make(adapter)
