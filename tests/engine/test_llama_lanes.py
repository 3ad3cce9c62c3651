"""The engine on llama.cpp: lanes, directions and training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from llama_models import (
    ENCODER,
    LABELS,
    SEEDS,
    TARGETS,
    Make,
    noise_of,
    plain_losses,
    random_batch,
    tuned,
)

from fwdllm.bench.architectures import ARCHITECTURES
from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.directions import Directions
from fwdllm.engine.estimators.lanes import lane_losses
from fwdllm.engine.estimators.plan import example_seeds, plan
from fwdllm.engine.graph import Variants
from fwdllm.engine.llamacpp import graph as llama_cpp
from fwdllm.engine.settings import DirectionsConfig, Scope
from fwdllm.kernels.types import Lanes


def assert_lanes_are_alone(
    engine: Engine, batch: Batch, method: str = "central", tolerance: float = 0.0
) -> None:
    """All seeds in one call, each seed's lanes alone, and each example alone: the same bits.

    Of an encoder those of the features, from which the head makes its losses.
    """

    def same(found: np.ndarray, want: np.ndarray) -> None:
        np.testing.assert_allclose(found, want, rtol=0, atol=tolerance)

    p = plan(SEEDS[:3], method, 1e-2)
    first, per_seed = int(p.plain), 2 if method == "central" else 1
    whole = outputs(engine, batch, p.lanes)
    assert len({row.tobytes() for row in whole}) == len(p.lanes)
    for k, lanes in enumerate(p.parts(1)):
        alone, at = outputs(engine, batch, lanes), first + k * per_seed
        same(alone[first:], whole[at : at + per_seed])
        same(alone[:first], whole[:first])
    for i in range(batch.n_sequences):
        alone = outputs(engine, batch.sequences(i, i + 1), p.lanes)
        mine = [i] if engine.encoder else batch.label_sequence == i
        same(alone, whole[:, mine])


def outputs(engine: Engine, batch: Batch, lanes: Lanes) -> np.ndarray:
    """Losses [n_lanes, n_labels], or an encoder's features [n_lanes, n_sequences, width]."""
    losses, features = lane_losses(engine.graph, batch, Variants(lanes, engine.directions))
    return losses if features is None else features.reshape(len(lanes), batch.n_sequences, -1)


COMPANY = {
    "equal": ("central", (17, 17, 17)),
    "different": ("forward-difference", (17, 9, 40, 17)),
}


@pytest.mark.parametrize("name", ["olmo2", "mamba"])
def test_small_calls(small: Make, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Sequences that are read piece by piece, as long ones or with a large vocabulary."""
    batch = random_batch(60, 20, 60, 33, labels=40)
    want = tuned(small(name), name).loss(batch)
    monkeypatch.setattr(llama_cpp, "_ROWS", 24)
    engine = tuned(small(name), name)
    np.testing.assert_allclose(engine.loss(batch), want, atol=noise_of(name, "F16"), rtol=0)
    assert_lanes_are_alone(engine, batch)


@pytest.mark.parametrize(("method", "lengths"), COMPANY.values(), ids=COMPANY)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bits_do_not_depend_on_company(
    small: Make, name: str, method: str, lengths: Sequence[int]
) -> None:
    engine = tuned(small(name, "Q8_0"), name)
    assert_lanes_are_alone(engine, random_batch(*lengths, encoder=engine.encoder), method)


def test_rows_in_any_order(small: Make) -> None:
    """Of a micro-batch that llama.cpp would take in another order than a call has."""
    engine, rng = tuned(small("olmo2"), "olmo2"), np.random.default_rng(0)
    assert engine.adapter is not None
    lanes, target = plan(SEEDS[:2], "central").lanes, engine.adapter.targets[0]
    part = llama_cpp._Part(np.arange(4), np.array([0, 0, 2, 2]), np.arange(3), np.arange(15))
    variants = Variants(lanes, engine.directions)
    terms = llama_cpp._Terms(engine.adapter, engine.ops, variants, part)
    x = rng.normal(size=(60, target.n_in)).astype(np.float32)
    y = rng.normal(size=(60, target.n_out)).astype(np.float32)
    whole, order = y.copy(), rng.permutation(60)[:50]
    terms(target.name, np.arange(60), x, whole)
    some = y[order]
    terms(target.name, order, x[order], some)
    np.testing.assert_allclose(some, whole[order], atol=1e-5)
    assert np.abs(some - y[order]).max() > 0.01


# llama.cpp's own kernels for K-quants add in another order where there are less than 8 rows, and
# for Q4_K in rows left over from blocks of 4: 1e-7 was seen, and a rounding may follow.
TYPES = ["Q4_0", "Q4_1", "Q8_0", "BF16", "F32", "Q4_K", "Q5_K", "Q6_K"]


@pytest.mark.parametrize("lengths", [(5, 7), (17, 26)], ids=["few rows", "many rows"])
@pytest.mark.parametrize("type", TYPES)
def test_bits_of_each_type(small: Make, type: str, lengths: Sequence[int]) -> None:
    config = LoRAConfig(2, targets=("attn_q", "ffn_down"))
    engine = half_trained(Engine.load(small("llama", type), config, backend="llama.cpp"))
    tolerance = 1e-3 if type.endswith("_K") else 0.0
    assert_lanes_are_alone(engine, random_batch(*lengths), tolerance=tolerance)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_0"])
def test_bits_of_a_trained_decoder(shared: Path, type: str) -> None:
    """The output matrix of the Q4_0 file is Q6_K."""
    path = shared / "models" / f"tinymix-6m.{type}.gguf"
    engine = half_trained(Engine.load(path, LoRAConfig(2), backend="llama.cpp"))
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:4]
    texts = [Example(text=example.text) for example in examples]
    assert_lanes_are_alone(engine, engine.encode(texts))


def test_bits_of_a_trained_encoder(shared: Path) -> None:
    path = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    engine = Engine.load(path, LoRAConfig(2), labels=LABELS, backend="llama.cpp")
    examples = read_jsonl(shared / "data" / "sst2.train.jsonl")[:4]
    assert_lanes_are_alone(half_trained(engine), engine.encode(examples))


@pytest.mark.parametrize("method", ["central", "forward-difference"])
@pytest.mark.parametrize("name", ["olmo2", "mixtral", "mamba", ENCODER])
def test_groups_do_not_depend_on_company(small: Make, name: str, method: str) -> None:
    engine = tuned(small(name, "Q8_0"), name)
    batch = random_batch(17, 9, 17, 30, 17, 9, encoder=engine.encoder)
    sizes, seeds = [2, 3, 1], np.arange(6, dtype=np.uint64).reshape(3, 2)
    together = engine.group_derivatives(batch, sizes, seeds, method)
    first = 0
    for size, mine, probe in zip(sizes, seeds, together, strict=True):
        group = batch.sequences(first, first + size)
        (alone,) = engine.group_derivatives(group, [size], mine[None], method)
        # A head's product in float64 may be off by its last bit.
        exact = 0 if name != ENCODER else 1e-12
        assert abs(alone.loss - probe.loss) <= exact
        np.testing.assert_allclose(alone.derivative, probe.derivative, atol=exact, rtol=0)
        usual = engine.directional_derivatives(group, mine, method)
        np.testing.assert_allclose(usual.derivative, probe.derivative, rtol=1e-9, atol=1e-9)
        first += size


KINDS: dict[str, DirectionsConfig] = {
    "normal": DirectionsConfig(),
    "rademacher": DirectionsConfig("rademacher"),
    "one layer": DirectionsConfig(scope=Scope(layers=(1,))),
    "one target": DirectionsConfig(scope=Scope(targets=("attn_v",))),
    "sparse": DirectionsConfig("sparse", keep=0.2),
    "subzero": DirectionsConfig("subzero", dimension=4),
    "lora-xs": DirectionsConfig("lora-xs"),
    "lora-fa": DirectionsConfig("lora-fa"),
}
EPSILON = 1e-2


def materialized(
    engine: Engine, batch: Batch, seed: int, directions: Directions
) -> tuple[np.ndarray, np.ndarray]:
    """Slopes of every label's loss, the adapter itself moved; and losses at the two ends."""
    assert engine.adapter is not None
    start = engine.adapter.theta.copy()
    ends = []
    for sign in (1, -1):
        engine.adapter.add([seed], [sign * EPSILON], directions)
        ends.append(lane_losses(engine.graph, batch)[0][0])
        engine.adapter.theta[:] = start
    return (ends[0] - ends[1]) / (2 * EPSILON), np.array(ends)


@pytest.mark.parametrize("name", ["olmo2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_directions_are_those_of_an_update(small: Make, name: str, kind: str) -> None:
    """Float noise, and keys and values in float16, leave 1% of a slope."""
    targets = ("attn_q", "attn_v", "ffn_down")
    config = LoRAConfig(4, targets=targets)
    engine = half_trained(Engine.load(small(name, "F32"), config, backend="llama.cpp"))
    engine.use_directions(KINDS[kind], 5, [Example(text="The cat sat on the mat.")])
    batch = random_batch(25, 14, 25)
    seeds = SEEDS[:3]
    want = [materialized(engine, batch, int(s), engine.directions)[0].mean() for s in seeds]
    got = engine.directional_derivatives(batch, seeds, "central", EPSILON)
    np.testing.assert_allclose(got.derivative, want, atol=0.01 * np.abs(want).max())
    assert len(set(np.round(want, 3))) == 3


@pytest.mark.parametrize("name", ["llama", "gpt2", ENCODER])
@pytest.mark.parametrize("kind", ["rademacher", "subzero"])
def test_each_example_has_its_own_direction(small: Make, name: str, kind: str) -> None:
    path = small(name, "F32")
    targets = TARGETS.get(name, ("attn_q", "attn_v", "ffn_down"))
    labels = LABELS if name == ENCODER else ()
    config = LoRAConfig(4, targets=targets)
    engine = half_trained(Engine.load(path, config, labels=labels, backend="llama.cpp"))
    engine.use_directions(KINDS[kind], 5, [])
    batch = random_batch(25, 14, 25, encoder=engine.encoder)
    probe = engine.directional_derivatives(batch, SEEDS[:2], "central", EPSILON, per_example=True)
    own = example_seeds(SEEDS[:2], batch.n_sequences)
    np.testing.assert_array_equal(probe.seeds, own)
    for k in range(2):
        for i in range(batch.n_sequences):
            slopes, _ = materialized(engine, batch, int(own[k, i]), engine.directions)
            mine = np.array([i]) if engine.encoder else batch.label_sequence == i
            want = slopes[mine].sum() / batch.n_labels
            scale = np.abs(probe.derivative).max()
            assert probe.derivative[k, i] == pytest.approx(want, abs=0.01 * scale)


def test_per_example_and_shared_directions_agree_on_one_example(small: Make) -> None:
    engine = tuned(small("mixtral"), "mixtral")
    batch = random_batch(30)
    seeds = example_seeds(SEEDS[:3], 1)
    each = engine.directional_derivatives(batch, SEEDS[:3], "central", per_example=True)
    shared = engine.directional_derivatives(batch, seeds[:, 0], "central")
    np.testing.assert_allclose(each.derivative[:, 0], shared.derivative, rtol=1e-9)


# Targets, learning rates and steps that lower a loss of 6.3 to 7 by 0.5 to 1.6 nats. Later on
# mixtral's tokens change their experts, which are random ones: its loss jumps by 0.6 at once,
# either way, and when depends on the processor's rounding.
TRAINED = {
    "olmo2": (("attn_v", "ffn_down"), 0.05, 12),
    "phi3": (("attn_qkv", "ffn_down"), 0.05, 12),
    "gpt2": (("attn_qkv", "ffn_down"), 0.05, 12),
    "gptneox": (("attn_qkv", "ffn_down"), 0.05, 12),
    "granite": (("attn_v", "ffn_down"), 0.1, 12),
    "stablelm": (("attn_v", "ffn_down"), 0.1, 12),
    "mixtral": (("attn_output", "attn_v"), 0.05, 14),
    "mamba": (("ssm_in", "ssm_out"), 0.01, 12),
}


@pytest.mark.parametrize("name", TRAINED)
def test_training_lowers_the_loss_that_llama_cpp_sees(
    small: Make, tmp_path: Path, name: str
) -> None:
    targets, rate, steps = TRAINED[name]
    path = small(name)
    engine = Engine.load(path, LoRAConfig(2, 4, targets), backend="llama.cpp")
    assert engine.adapter is not None
    examples = [
        Example(prompt="Question: Hi?\nAnswer:", completion=" Arr, matey!"),
        Example(prompt="Question: Who?\nAnswer:", completion=" Arr, a pirate!"),
    ]
    batch = engine.encode(examples)
    before = engine.loss(batch)
    for step in range(steps):
        seeds = np.arange(8, dtype=np.uint64) + np.uint64(100 * step)
        probe = engine.directional_derivatives(batch, seeds, "central")
        engine.adapter.add(seeds, -rate * probe.derivative / len(seeds))
    after = engine.loss(batch)
    assert after.mean() < before.mean() - 0.4
    save_gguf(engine.adapter, tmp_path / "adapter.gguf")
    want = plain_losses(path, batch, tmp_path / "adapter.gguf")
    np.testing.assert_allclose(after, want, atol=2 * noise_of(name, "F16"), rtol=0)
