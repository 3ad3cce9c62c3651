"""Which epsilon, and how close do derivatives come? 64 of them against PyTorch's in float64.

    python bench/studies/epsilon.py MODEL.gguf DATA.jsonl [--examples 8] [--max-tokens 64]

The adapter's B is random, as in the middle of training. A cell has the relative error, and the
correlation. "separately" evaluates each side of a difference by itself, as a finite difference in
an unchanged inference engine does. docs/decisions.md keeps the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from torch_model import TorchModel, gradient

from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, LoRAConfig, read_jsonl
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.data.jsonl import labels_of
from fwdllm.engine.estimators.lanes import lane_losses
from fwdllm.kernels import cpu

EPSILONS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 2e-2, 3e-2)
SEEDS = np.arange(64, dtype=np.uint64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    examples = read_jsonl(options.data)[: options.examples]
    labels = labels_of(read_jsonl(options.data))

    def load(exact: bool) -> Engine:
        return half_trained(Engine.load(options.model, LoRAConfig(), labels=labels, exact=exact))

    engine = load(exact=True)
    assert engine.adapter is not None
    batch = engine.encode(examples, options.max_tokens)
    true = gradient(TorchModel(engine), batch)[: engine.adapter.n_lora]
    want = engine.ops.seeded_dot(true.astype(np.float32), SEEDS)
    print("| arithmetic, method |", " | ".join(f"{e:g}" for e in EPSILONS), "|")
    print("| --- |" + " --- |" * len(EPSILONS))
    for exact in (True, False):
        engine = load(exact)
        name = "fp32" if exact else cpu.activations
        probe = engine.directional_derivatives(batch, SEEDS)
        print(f"| {name}, forward-ad | {closeness(probe.derivative, want)} |", flush=True)
        for method in ("central", "forward-difference", "central, separately"):
            cells = []
            for epsilon in EPSILONS:
                if method == "central, separately":
                    found = separately(engine, batch, epsilon)
                else:
                    probe = engine.directional_derivatives(batch, SEEDS, method, epsilon)
                    found = probe.derivative
                cells.append(closeness(found, want))
            print(f"| {name}, {method} |", " | ".join(cells), "|", flush=True)


def closeness(found: np.ndarray, want: np.ndarray) -> str:
    """Relative error and correlation."""
    error = np.linalg.norm(found - want) / np.linalg.norm(want)
    return f"{100 * error:.2g}%, {np.corrcoef(found, want)[0, 1]:.5f}"


def mean_loss(engine: Engine, batch: Batch) -> float:
    """Mean negative log-likelihood per label, in nats."""
    return float(lane_losses(engine.graph, batch)[0].mean())


def separately(engine: Engine, batch: Batch, epsilon: float) -> np.ndarray:
    """Central differences by two evaluations of the changed adapter for each seed."""
    adapter = engine.adapter
    assert adapter is not None
    before, found = adapter.theta.copy(), []
    for seed in SEEDS:
        losses = []
        for step in (epsilon, -epsilon):
            adapter.add([int(seed)], [step])
            losses.append(mean_loss(engine, batch))
            adapter.theta[:] = before
        found.append((losses[0] - losses[1]) / (2 * epsilon))
    return np.array(found)


if __name__ == "__main__":
    main()
