"""Sentiment by MiniLM: head alone, forward gradients and backprop LoRA, one table.

    python -m fwdllm.bench.sst2 MODEL.gguf SST2.train.jsonl [--seeds 0,1,2] [--json OUT]

All three see the same batches for the same number of steps with the same learning-rate
schedule; the two LoRA runs have adapters of the same size. Held-out examples are split from the
training file. Each method's learning rate is its own, chosen on seed 0.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.data import labels_of, split
from fwdllm.engine.head import head_gradient
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import StepResult, TrainState, train
from fwdllm.protocol.optimizers import apply
from fwdllm.protocol.schedule import lr_factor
from fwdllm.protocol.seeds import batch_indices

LORA = LoRAConfig(rank=4, alpha=8, targets=("attn_q", "attn_v"), layers=(4, 5))
TRAIN = TrainConfig(
    steps=100,
    batch_size=64,
    perturbations=32,
    learning_rate=1e-2,
    head_learning_rate=1e-2,
    checkpoint_every=0,
)
BACKPROP_LEARNING_RATE = 5e-3


@dataclass(frozen=True)
class Row:
    """One run's result on the held-out examples."""

    method: str
    seed: int
    loss: float
    accuracy: float
    seconds: float


def new_engine(model: Path, labels: Sequence[str], seed: int) -> Engine:
    """The model with a new adapter and an empty head."""
    return Engine.load(model, LORA, labels=labels, seed=seed)


def head_alone(engine: Engine, config: TrainConfig, examples: Sequence[Example]) -> None:
    """Train the head by its exact gradient; the adapter stays as it is."""
    adapter = engine.adapter
    assert adapter is not None
    state = TrainState.initial(config, engine)
    rates = np.zeros(adapter.theta.size, np.float32)
    for step in range(config.steps):
        chosen = batch_indices(config.seed, step, len(examples), config.batch_size)
        batch = engine.encode([examples[i] for i in chosen])
        assert batch.classes is not None
        gradient = np.zeros(adapter.theta.size, np.float32)
        gradient[adapter.n_lora :] = head_gradient(adapter, engine.features(batch), batch.classes)
        assert config.head_learning_rate is not None
        factor = lr_factor(step, config.steps, config.warmup, config.schedule)
        rates[adapter.n_lora :] = config.head_learning_rate * factor
        apply(config.optimizer_config(), state.optimizer, adapter.theta, gradient, rates)


def forward_gradients(engine: Engine, config: TrainConfig, examples: Sequence[Example]) -> None:
    """The product's own trainer."""
    assert engine.adapter is not None
    state = TrainState.initial(config, engine)
    for event in train(engine, config, examples, [], state):
        if isinstance(event, StepResult) and event.step % 50 == 0:
            print(f"  step {event.step} loss {event.loss:.4f}", file=sys.stderr, flush=True)


def backprop(engine: Engine, config: TrainConfig, examples: Sequence[Example]) -> None:
    """The same adapter and head trained by PyTorch on the decoded weights."""
    import torch

    from fwdllm.bench.torch_model import TorchModel

    adapter = engine.adapter
    assert adapter is not None
    model = TorchModel(engine, torch.float32)
    theta = model.theta()
    rates = torch.full_like(theta, config.learning_rate, requires_grad=False)
    assert config.head_learning_rate is not None
    rates[adapter.n_lora :] = config.head_learning_rate
    optimizer = torch.optim.Adam([theta], lr=1.0, betas=(config.beta1, config.beta2))
    for step in range(config.steps):
        chosen = batch_indices(config.seed, step, len(examples), config.batch_size)
        batch = engine.encode([examples[i] for i in chosen])
        optimizer.zero_grad()
        model.loss(theta, batch).backward()
        before = theta.detach().clone()
        optimizer.step()
        factor = lr_factor(step, config.steps, config.warmup, config.schedule)
        with torch.no_grad():  # Adam's step of rate 1, scaled for each parameter
            theta.copy_(before + (theta - before) * rates * factor)
    adapter.theta[:] = theta.detach().numpy()


METHODS: dict[str, Callable[[Engine, TrainConfig, Sequence[Example]], None]] = {
    "head alone": head_alone,
    "forward gradients": forward_gradients,
    "backprop LoRA": backprop,
}


def run(
    model: Path, data: Path, seeds: Sequence[int], n_held_out: int, methods: Sequence[str]
) -> list[Row]:
    """Train and evaluate every method with every seed."""
    examples = read_jsonl(data)
    labels = labels_of(examples)
    rows = []
    for seed in seeds:
        train_set, held_out = split(examples, n_held_out, seed)
        for method in methods:
            engine = new_engine(model, labels, seed)
            config = replace(TRAIN, seed=seed)
            if method == "backprop LoRA":
                config = replace(config, learning_rate=BACKPROP_LEARNING_RATE)
            start = time.perf_counter()
            METHODS[method](engine, config, train_set)
            seconds = time.perf_counter() - start
            result = engine.evaluate(held_out)
            assert result.accuracy is not None
            rows.append(Row(method, seed, result.loss, result.accuracy, seconds))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: a line a method, losses and accuracies of the seeds and their medians."""
    lines = ["| method | held-out loss | accuracy | median loss |", "| --- | --- | --- | --- |"]
    for method in METHODS:
        mine = [row for row in rows if row.method == method]
        losses = " / ".join(f"{row.loss:.4f}" for row in mine)
        accuracies = " / ".join(f"{100 * row.accuracy:.1f}%" for row in mine)
        median = statistics.median(row.loss for row in mine)
        lines.append(f"| {method} | {losses} | {accuracies} | {median:.4f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--held-out", type=int, default=5000)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    seeds = [int(seed) for seed in options.seeds.split(",")]
    rows = run(options.model, options.data, seeds, options.held_out, options.methods.split(","))
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    if set(METHODS) <= {row.method for row in rows}:
        print(table(rows))


if __name__ == "__main__":
    main()
