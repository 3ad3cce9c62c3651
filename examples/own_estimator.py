"""An estimator of one's own on the engine: python examples/own_estimator.py

SPSA with antithetic pairs: the loss on both sides of the adapter, along directions of random signs.
It needs nothing but `Engine.loss` and `Adapter.add`. It is compared with the engine's exact slopes,
and then it tunes the adapter on one batch.
"""

import numpy as np

from fwdllm import Engine, LoRAConfig, read_jsonl
from fwdllm.demo import asset
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.directions import Dense

STEPS, PAIRS, EPSILON, RATE = 10, 6, 1e-3, 2e-2


def mean_loss(engine: Engine, batch: Batch) -> float:
    """Nats per token to predict; `Engine.loss` has a mean for each example."""
    return float(np.average(engine.loss(batch), weights=np.bincount(batch.label_sequence)))


def spsa(engine: Engine, batch: Batch, seeds: np.ndarray, signs: Dense) -> np.ndarray:
    """(L(theta + eps v) - L(theta - eps v)) / 2 eps along v of every seed: float64 [n_seeds]."""
    theta = engine.adapter.theta
    here = theta.copy()
    slopes = []
    for seed in seeds:
        sides = []
        for step in (EPSILON, -EPSILON):
            engine.adapter.add([seed], [step], signs)
            sides.append(mean_loss(engine, batch))
            theta[:] = here  # and not a step back, which would round
        slopes.append((sides[0] - sides[1]) / (2 * EPSILON))
    return np.array(slopes)


def main() -> None:
    # Each side is a pass of its own, so int8 activations would drown the difference; the engine's
    # own central differences avoid that (docs/decisions.md).
    engine = Engine.load(asset("fwdllm-tiny.gguf"), LoRAConfig(rank=2, alpha=4.0), exact=True)
    batch = engine.encode(read_jsonl(asset("pirate.train.jsonl"))[:4])
    signs = Dense(engine.adapter, "rademacher")

    seeds = np.arange(PAIRS, dtype=np.uint64)
    exact = engine.directional_derivatives(batch, seeds, directions=signs).derivative
    correlation = np.corrcoef(spsa(engine, batch, seeds, signs), exact)[0, 1]
    print(f"correlation with exact slopes: {correlation:.6f}")

    before = mean_loss(engine, batch)
    for step in range(STEPS):
        seeds = np.arange(step * PAIRS, (step + 1) * PAIRS, dtype=np.uint64)
        slopes = spsa(engine, batch, seeds, signs)
        engine.adapter.add(seeds, -RATE / PAIRS * slopes, signs)
    print(f"loss of the batch {before:.2f} -> {mean_loss(engine, batch):.2f}")


if __name__ == "__main__":
    main()
