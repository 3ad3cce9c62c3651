"""The engine on Triton kernels, under its interpreter where there is no GPU, against the CPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from shallow import first_layers

from fwdllm.bench.inputs import half_trained, step_batch
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import Matrix, make_decoder, write_model
from fwdllm.engine import Engine, Example, LoRAConfig
from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.directions import Dense, Directions, Sparse, lora_fa, subzero
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.memory.plan import GradientPlan
from fwdllm.engine.models import FAMILIES, bert
from fwdllm.engine.models.graph import OwnGraph
from fwdllm.engine.settings import Scope
from fwdllm.kernels.types import QuantType

INSTALLED = all(importlib.util.find_spec(name) for name in ("torch", "triton"))
if INSTALLED:
    importlib.import_module("interpreter")

pytestmark = pytest.mark.skipif(
    not INSTALLED,
    reason="torch or triton is not installed",
)

SHAPE = Shape(2, 64, 2, 1, 32, 64, 300)
SEEDS = np.arange(8, dtype=np.uint64) + 40


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("triton") / "decoder.gguf"
    make_decoder(path, SHAPE, QuantType.Q4_0)
    return path


def load(path: Path, device: str, **options) -> Engine:
    lora = LoRAConfig(rank=4, targets=("attn_q", "ffn_down"))
    return half_trained(Engine.load(path, lora, device=device, **options))


def some_batch(seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    return step_batch([rng.integers(0, 300, n).tolist() for n in (6, 4)], 1)


@pytest.mark.parametrize("method", ["forward-ad", "central"])
def test_slopes_are_the_cpus(path: Path, method: str) -> None:
    batch = some_batch()
    cpu, gpu = load(path, "cpu", exact=True), load(path, "cuda")
    want = cpu.directional_derivatives(batch, SEEDS, method)
    got = gpu.directional_derivatives(batch, SEEDS, method)
    assert np.corrcoef(got.derivative, want.derivative)[0, 1] > 0.9995
    assert got.loss == pytest.approx(want.loss, abs=0.01)
    assert got.n_tokens == want.n_tokens
    np.testing.assert_allclose(gpu.loss(batch), cpu.loss(batch), atol=0.01)


def test_exact_slopes_are_the_cpus(path: Path) -> None:
    batch = some_batch()
    cpu, gpu = (load(path, device, exact=True) for device in ("cpu", "cuda"))
    want = cpu.directional_derivatives(batch, SEEDS[:3])
    got = gpu.directional_derivatives(batch, SEEDS[:3])
    np.testing.assert_allclose(got.derivative, want.derivative, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gpu.loss(batch), cpu.loss(batch), rtol=1e-5)


def distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def test_an_exact_gradient_is_the_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of layers with all that the way back meets, by passes and blocks of a few rows."""
    path = tmp_path / "model.gguf"
    shape = Shape(2, 64, 2, 1, 16, 32, 40, architecture="qwen3")
    make_decoder(path, shape, QuantType.Q8_0)
    batch = step_batch([[7, 1, 39, 0, 7], [3, 30]], 1)
    found = []
    for device in ("cpu", "cuda"):
        lora = LoRAConfig(rank=3, targets=("attn_k", "attn_output", "ffn_up"))
        engine = half_trained(Engine.load(path, lora, device=device, exact=True))
        plan = GradientPlan(3, 7, None)
        monkeypatch.setattr(engine.graph, "plan_gradient", lambda batch, first: plan)  # noqa: B023
        found.append(engine.gradient(batch))
    want, got = found
    assert isinstance(got.values, np.ndarray)
    assert got.loss == pytest.approx(want.loss, rel=1e-6)
    assert distance(got.values, want.values) < 1e-5
    assert got.n_tokens == want.n_tokens


def test_a_gradient_is_the_cpus_but_for_rounding(path: Path) -> None:
    batch = some_batch()
    want = load(path, "cpu", exact=True).gradient(batch)
    got = load(path, "cuda").gradient(batch)
    assert got.loss == pytest.approx(want.loss, abs=0.01)
    assert 1e-5 < distance(got.values, want.values) < 0.02


def test_a_gradient_goes_in_parts_that_the_gpu_has_room_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(path, "cuda")
    assert isinstance(engine.graph, OwnGraph)
    batch = step_batch([[5] * 40] * 100, 1)
    found = []
    for free in (None, 2**30, 2**23, 2**22):
        monkeypatch.setattr(engine.ops, "free_bytes", lambda free=free: free)
        plan = engine.graph.plan_gradient(batch, 0)
        found.append(plan.rows)
    assert found[:2] == [4000, 4000]
    assert 40 <= found[3] < found[2] < 4000
    monkeypatch.setattr(engine.ops, "free_bytes", lambda: 2**20)
    sentence = (
        r"^this step needs about .* MiB of the GPU's memory, of which 1 MiB are free: use .*ad$"
    )
    with pytest.raises(ConfigError, match=sentence):
        engine.gradient(batch)


def test_an_encoder_learns_the_same(shared: Path, tmp_path: Path) -> None:
    model = first_layers(shared / "models/minilm-l6-v2.Q4_0.gguf", 2, tmp_path / "two.gguf")
    examples = [Example(text="a fine film", label="good"), Example(text="dull", label="bad")]
    found = []
    for device in ("cpu", "cuda"):
        engine = Engine.load(model, LoRAConfig(rank=2), labels=("bad", "good"), device=device)
        half_trained(engine)
        assert engine.adapter is not None
        directions = Dense(engine.adapter, scope=Scope((1,)))
        batch = engine.encode(examples)
        probe = engine.directional_derivatives(batch, SEEDS[:2], directions=directions)
        assert probe.head_gradient is not None
        found.append((probe.loss, *probe.derivative, *probe.head_gradient[:20]))
    np.testing.assert_allclose(found[1], found[0], rtol=0.1, atol=0.02)


def make_encoder(path: Path, architecture: str = "bert", n_layers: int = 1) -> None:
    """A BERT of random weights, so small that Triton's interpreter takes a step in seconds."""
    rng = np.random.default_rng(0)
    keys = {
        "embedding_length": 32,
        "feed_forward_length": 64,
        "block_count": n_layers,
        "attention.head_count": 2,
        "attention.layer_norm_epsilon": 1e-6,
        "attention.causal": False,
        "attention.sliding_window": 2,  # which BERT has not
        "context_length": 16,
    }
    args = bert.Args(
        n_layers=n_layers, width=32, n_heads=2, n_kv_heads=2, head_dim=16, hidden=64, n_vocab=40,
        context=16, n_types=2, norm_eps=1e-6, pooling="mean",
    )  # fmt: skip
    shapes, _ = FAMILIES[architecture].shapes(args)
    matrices = [Matrix(name, shape, 0.2) for name, shape in shapes.items() if len(shape) == 2]
    vectors = {
        name: rng.normal(1, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
        if len(shape) == 1
    }
    write_model(path, architecture, keys, 40, matrices, vectors, QuantType.Q8_0, rng)


@pytest.mark.parametrize(
    ("architecture", "n_layers", "adapted"), [("bert", 1, "attn_v"), ("modern-bert", 2, "attn_qkv")]
)
def test_an_encoder_has_the_cpus_gradient(
    tmp_path: Path, architecture: str, n_layers: int, adapted: str
) -> None:
    make_encoder(tmp_path / "model.gguf", architecture, n_layers)
    batch = pack([Tokens([3, 9, 4], [False] * 3, 1), Tokens([7, 2], [False] * 2, 0)])
    lora, found, slopes = LoRAConfig(rank=2, targets=(adapted, "ffn_up")), [], []
    for device in ("cpu", "cuda"):
        options = {"labels": ("bad", "good"), "device": device, "exact": True}
        engine = half_trained(Engine.load(tmp_path / "model.gguf", lora, **options))
        found.append(engine.gradient(batch))
        slopes.append(engine.directional_derivatives(batch, SEEDS[:2], "forward-ad").derivative)
    want, got = found
    np.testing.assert_allclose(slopes[1], slopes[0], rtol=1e-4, atol=1e-5)
    assert want.head_gradient is not None
    assert got.head_gradient is not None
    assert got.loss == pytest.approx(want.loss, rel=1e-5)
    assert distance(got.values, want.values) < 1e-5
    assert distance(got.head_gradient, want.head_gradient) < 1e-5


def test_examples_with_directions_of_their_own(path: Path) -> None:
    batch = some_batch()
    found = [
        load(path, device, exact=True).directional_derivatives(batch, SEEDS[:1], per_example=True)
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(found[1].derivative, found[0].derivative, rtol=1e-3, atol=1e-5)


def masked(adapter: Adapter) -> Sparse:
    mask = np.arange(adapter.n_lora) % 3 == 0
    return Sparse(Dense(adapter), mask.astype(np.float32))


@pytest.mark.parametrize("make", [masked, lambda a: subzero(a, 5, 3), lora_fa])
def test_other_directions(path: Path, make: Callable[[Adapter], Directions]) -> None:
    batch, found = some_batch(), []
    for device in ("cpu", "cuda"):
        engine = load(path, device, exact=True)
        assert engine.adapter is not None
        directions = make(engine.adapter)
        found.append(engine.directional_derivatives(batch, SEEDS[:2], directions=directions))
    np.testing.assert_allclose(found[1].derivative, found[0].derivative, rtol=1e-3, atol=1e-5)


def test_activations_are_perturbed_as_on_a_cpu(path: Path) -> None:
    found = []
    for device in ("cpu", "cuda"):
        engine = Engine.load(path, LoRAConfig(rank=1), device=device, exact=True)
        engine.use_activations(Scope((1,)))
        found.append(engine.output_sensitivity(some_batch(), 3, 2).values)
    np.testing.assert_allclose(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_an_update_is_the_cpus(path: Path) -> None:
    coefficients = np.linspace(-1, 1, len(SEEDS)).astype(np.float32)
    thetas = []
    for device in ("cpu", "cuda"):
        adapter = load(path, device).adapter
        assert adapter is not None
        adapter.add(SEEDS, coefficients)
        thetas.append(adapter.theta)
    np.testing.assert_allclose(thetas[1], thetas[0], atol=1e-5)


def test_a_repeated_pass_sees_what_has_changed(path: Path) -> None:
    """A recording runs on its own copies of seeds, tokens, labels and parameters."""
    from fwdllm.kernels.triton import recording, runtime

    engine = load(path, "cuda")
    assert engine.adapter is not None
    recording.recordings.clear()
    for i in range(3):
        batch = some_batch(seed=i)  # other tokens, the same lengths
        seeds = SEEDS[:1] + np.uint64(i)
        engine.adapter.theta[:] *= 0.7
        got = engine.directional_derivatives(batch, seeds)
        [found] = recording.recordings.values()
        assert (found.launch is not None) == (i > 0)
        recording.enabled = False
        try:
            want = engine.directional_derivatives(batch, seeds)
        finally:
            recording.enabled = True
        assert got.loss == want.loss
        np.testing.assert_array_equal(got.derivative, want.derivative)
    # What it has the addresses of stays, whatever else forgets it.
    cos, _ = engine.args.rotary.tables(int(batch.positions.max()) + 1)
    assert found.held
    starts = np.array([0, 6, 10, 16, 20], np.int32)  # of the sequences of both lanes
    for used in (runtime.constant(cos), runtime.small(starts)):
        assert any(used is held for held in found.held)
    engine.directional_derivatives(step_batch([[5, 6, 7]], 1), SEEDS[:1])
    assert len(recording.recordings) == 2


def test_a_repeated_pass_of_an_encoder_sees_what_has_changed(tmp_path: Path) -> None:
    from fwdllm.kernels.triton import recording

    make_encoder(tmp_path / "model.gguf")
    lora = LoRAConfig(rank=2, targets=("attn_v", "ffn_up"))
    engine = half_trained(
        Engine.load(tmp_path / "model.gguf", lora, labels=("bad", "good"), device="cuda")
    )
    recording.recordings.clear()
    for i in range(3):
        batch = pack([Tokens([3 + i, 9, 4], [False] * 3, 1), Tokens([7, 2 + i], [False] * 2, 0)])
        seeds = SEEDS[:1] + np.uint64(i)
        got = engine.directional_derivatives(batch, seeds)
        [found] = recording.recordings.values()
        assert (found.launch is not None) == (i > 0)
        recording.enabled = False
        try:
            want = engine.directional_derivatives(batch, seeds)
        finally:
            recording.enabled = True
        assert got.loss == want.loss
        np.testing.assert_array_equal(got.derivative, want.derivative)
