"""Which estimator points closest to the true gradient for the same forward passes?

    python bench/studies/estimators.py MODEL.gguf DATA.jsonl OUT.json [--plot PLOT.png]

For an encoder and examples with labels. Each way to estimate a gradient is tried with several
numbers of perturbations and seeds on one batch, in an adapter whose head has learned alone for a
while, and compared with PyTorch's gradient by the parameters that way trains. docs/estimators.md
keeps the results.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from torch_model import TorchModel, gradient

from fwdllm.bench.inputs import half_trained
from fwdllm.bench.pictures import curves
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.data.jsonl import labels_of
from fwdllm.engine.directions import frozen_b
from fwdllm.engine.estimators.activation import scaled
from fwdllm.engine.settings import DirectionsConfig
from fwdllm.protocol.optimizers import OptimizerState, apply
from fwdllm.protocol.seeds import derive_seeds
from fwdllm.protocol.settings import OptimizerConfig

PERTURBATIONS, REPEATS, BATCH, HEAD_STEPS = (4, 16, 63), 5, 32, 60
PAIR = ("attn_q", "attn_v")
SITES = ("attn_v", "attn_output", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Way:
    """kind: of directions, "measured" or "random" for activations with such a B."""

    method: str = "forward-ad"
    kind: str = "normal"
    rank: int = 8
    targets: tuple[str, ...] = PAIR
    per_example: bool = False


WAYS = {
    "central": Way("central"),
    "forward-ad": Way(),
    "forward-ad, rank 4": Way(rank=4),
    "forward-ad, rank 1": Way(rank=1),
    "forward-ad, per example": Way(per_example=True),
    "forward-ad, per example, rank 1": Way(per_example=True, rank=1),
    "rademacher": Way(kind="rademacher"),
    "lora-fa": Way(kind="lora-fa"),
    "subzero, 8 dimensions": Way(kind="subzero"),
    "sparse, a tenth": Way(kind="sparse"),
    "lora-xs, rank 8": Way(kind="lora-xs"),
    "lora-xs, rank 4, per example": Way(kind="lora-xs", rank=4, per_example=True),
    "activation, rank 1, random B": Way("activation", "random", 1, SITES),
    "activation, rank 1, measured B": Way("activation", "measured", 1, SITES),
    "activation, rank 4, random B": Way("activation", "random", 4, SITES),
    "activation, rank 8, random B": Way("activation", "random", 8, SITES),
}


@dataclass(frozen=True)
class Point:
    """cosines: to the true gradient, one a repeat.  n_tokens: lane-tokens an estimate took.

    d: parameters trained.
    """

    way: str
    perturbations: int
    n_tokens: int
    d: int
    cosines: list[float]


def learned_head(engine: Engine, examples: list[Example]) -> None:
    """Train the head alone for a few batches."""
    adapter = engine.adapter
    assert adapter is not None
    optimizer = OptimizerConfig(learning_rate=1e-2)
    state = OptimizerState.initial(optimizer, adapter.n_head)
    head = adapter.theta[adapter.n_lora :]
    for i in range(HEAD_STEPS):
        batch = engine.encode(examples[i * BATCH : (i + 1) * BATCH])
        found = engine.head_step(batch).head_gradient
        assert found is not None
        apply(optimizer, state, head, found, optimizer.learning_rate)


def measured_b(engine: Engine, examples: list[Example]) -> None:
    """B as ``protocol.phases`` measures it, in ten steps."""
    assert engine.adapter is not None
    batches = (engine.encode(examples[i * BATCH : (i + 1) * BATCH]) for i in range(10))
    found = [engine.output_sensitivity(batch, i, 62).values for i, batch in enumerate(batches)]
    mean = np.stack(found).mean(axis=0).astype(np.float32)
    engine.adapter.theta[: engine.adapter.n_lora] = scaled(engine.adapter, mean)


def random_b(engine: Engine) -> None:
    """B of normal numbers, A zero."""
    adapter = engine.adapter
    assert adapter is not None
    adapter.theta[: adapter.n_lora] = 0
    for target in adapter.targets:
        b = adapter.factors(target).b
        b[:] = np.random.default_rng(target.offset).normal(size=b.shape)


def prepare(model: Path, way: Way, examples: list[Example], head: np.ndarray | None) -> Engine:
    """An engine in the state the way finds in training; head: trained before, to save time."""
    lora = LoRAConfig(way.rank, way.rank, way.targets)
    engine = half_trained(Engine.load(model, lora, labels=labels_of(examples)))
    adapter = engine.adapter
    assert adapter is not None
    adapter.theta[adapter.n_lora :] = 0 if head is None else head
    if way.method != "activation":
        engine.use_directions(DirectionsConfig(way.kind), 0, examples[:BATCH])
        return engine
    if way.kind == "measured":
        engine.use_activations()
        measured_b(engine, examples)
    else:
        random_b(engine)
        engine.directions = frozen_b(adapter)
    return engine


def estimate(engine: Engine, way: Way, batch: Batch, k: int, repeat: int) -> tuple[np.ndarray, int]:
    """An estimate in coordinates of ``engine.directions``, and its lane-tokens."""
    if way.method == "activation":
        found = engine.activation_gradient(batch, repeat, k)
        return engine.directions.project(found.values), found.n_tokens
    seeds = derive_seeds(0, repeat, k)
    probe = engine.directional_derivatives(batch, seeds, way.method, per_example=way.per_example)
    weights = probe.derivative.ravel().astype(np.float32)
    return engine.directions.combine(probe.seeds.ravel(), weights), probe.n_tokens


def measure(model: Path, examples: list[Example]) -> Iterator[Point]:
    """Every way with every number of perturbations."""
    head = None
    for name, way in WAYS.items():
        engine = prepare(model, way, examples, head)
        adapter = engine.adapter
        assert adapter is not None
        if head is None:
            learned_head(engine, examples)
            head = adapter.theta[adapter.n_lora :].copy()
        batch = engine.encode(examples[-BATCH:])
        true = gradient(TorchModel(engine), batch)[: adapter.n_lora].astype(np.float32)
        true = engine.directions.project(true)
        for k in PERTURBATIONS:
            cosines, n_tokens = [], 0
            for repeat in range(REPEATS):
                found, n_tokens = estimate(engine, way, batch, k, repeat)
                cosines.append(float(true @ found / np.linalg.norm(true) / np.linalg.norm(found)))
            yield Point(name, k, n_tokens, int(np.count_nonzero(found)), cosines)


def table(points: list[Point]) -> str:
    """Markdown: a line a way, the median cosine of each number of perturbations."""
    heads = " | ".join(f"K = {k}" for k in PERTURBATIONS)
    lines = [
        f"| estimator | parameters | {heads} |",
        "| --- |" + " --- |" * (1 + len(PERTURBATIONS)),
    ]
    for name in WAYS:
        mine = [point for point in points if point.way == name]
        cells = " | ".join(f"{statistics.median(point.cosines):.3f}" for point in mine)
        lines.append(f"| {name} | {mine[0].d:,} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    examples = read_jsonl(options.data)[: (HEAD_STEPS + 1) * BATCH]
    points = []
    for point in measure(options.model, examples):
        print(point, file=sys.stderr, flush=True)
        points.append(point)
    options.output.write_text(json.dumps([asdict(point) for point in points], indent=1) + "\n")
    print(table(points))
    if options.plot:
        lines = {
            name: [
                (p.n_tokens / 1e3, statistics.median(p.cosines)) for p in points if p.way == name
            ]
            for name in WAYS
        }
        curves(lines, {}, "thousand lane-tokens", "cosine to the gradient", options.plot, log=True)


if __name__ == "__main__":
    main()
