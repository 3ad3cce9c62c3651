"""Sentiment by MiniLM: how much of what backprop gains over a head alone do forward passes gain?

    python bench/studies/sst2.py MODEL.gguf SST2.train.jsonl OUT.jsonl [--runs NAMES]
        [--seeds 0,1,2]
    python bench/studies/sst2.py --report OUT.jsonl [--plot PLOT.png]

All runs see the same 600 batches of 32, with a linear schedule and Adam; forward passes have at
most 64 lanes. Each run's learning rate is its own, chosen on seed 0. Held-out examples are split
from the training file. Each evaluation is a line of OUT.jsonl, written when it is made.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.data.jsonl import labels_of, split
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import StepResult, TrainState, train
from fwdllm.protocol.optimizers import OptimizerState, apply
from fwdllm.protocol.schedule import lr_factor
from fwdllm.protocol.seeds import batch_indices
from fwdllm.protocol.settings import OptimizerConfig

STEPS, BATCH, EVAL_EVERY, HEAD_RATE = 600, 32, 100, 1e-2

# What LoRA usually adapts, and the layers after which bottlenecks are worth perturbing.
WEIGHTS = LoRAConfig(rank=8, alpha=16)
BOTTLENECKS = LoRAConfig(rank=1, alpha=1, targets=("attn_v", "attn_output", "ffn_up", "ffn_down"))

# One update: yields the lane-tokens forwarded so far, and -1 where they are not comparable.
Trainer = Callable[[Engine, TrainConfig, Sequence[Example]], Iterator[int]]


def forward_passes(
    engine: Engine, config: TrainConfig, examples: Sequence[Example]
) -> Iterator[int]:
    """The product's own trainer."""
    if config.method == "activation":
        engine.use_activations()
    n_tokens = 0
    for event in train(engine, config, examples, [], TrainState.initial(config, engine)):
        if isinstance(event, StepResult):
            n_tokens += event.n_tokens
            yield n_tokens


def head_alone(engine: Engine, config: TrainConfig, examples: Sequence[Example]) -> Iterator[int]:
    """The head by its exact gradient; the adapter stays as it is."""
    adapter = engine.adapter
    assert adapter is not None
    optimizer = OptimizerConfig()
    state = OptimizerState.initial(optimizer, adapter.n_head)
    n_tokens = 0
    for step in range(config.steps):
        found = engine.head_step(_batch(engine, config, examples, step))
        assert found.head_gradient is not None
        rate = HEAD_RATE * lr_factor(step, config.steps, config.warmup, config.schedule)
        apply(optimizer, state, adapter.theta[adapter.n_lora :], found.head_gradient, rate)
        n_tokens += found.n_tokens
        yield n_tokens


def backprop(engine: Engine, config: TrainConfig, examples: Sequence[Example]) -> Iterator[int]:
    """Adapter and head by PyTorch on the decoded weights."""
    import torch
    from torch_model import TorchModel

    adapter = engine.adapter
    assert adapter is not None
    model = TorchModel(engine, torch.float32)
    theta = model.theta()
    rates = torch.full_like(theta, config.learning_rate, requires_grad=False)
    rates[adapter.n_lora :] = HEAD_RATE
    optimizer = torch.optim.Adam([theta], lr=1.0, betas=(config.beta1, config.beta2))
    for step in range(config.steps):
        optimizer.zero_grad()
        model.loss(theta, _batch(engine, config, examples, step)).backward()
        before = theta.detach().clone()
        optimizer.step()
        factor = lr_factor(step, config.steps, config.warmup, config.schedule)
        with torch.no_grad():  # Adam's step of rate 1, scaled for each parameter
            theta.copy_(before + (theta - before) * rates * factor)
        adapter.theta[:] = theta.detach().numpy()
        yield -1


@dataclass(frozen=True)
class Run:
    """learning_rate: of the adapter. method, perturbations, per_example: as in TrainConfig."""

    lora: LoRAConfig
    learning_rate: float
    trainer: Trainer = forward_passes
    method: str = "forward-ad"
    perturbations: int = 63
    per_example: bool = False


RUNS = {
    "head alone": Run(WEIGHTS, 1e-2, head_alone),
    "central": Run(WEIGHTS, 1e-3, method="central", perturbations=31),
    "forward-ad": Run(WEIGHTS, 1e-3),
    "forward-ad, per example": Run(WEIGHTS, 1e-3, per_example=True),
    "activation": Run(BOTTLENECKS, 1e-2, method="activation", perturbations=62),
    "backprop, same bottlenecks": Run(BOTTLENECKS, 1e-2, backprop),
    "backprop": Run(WEIGHTS, 5e-3, backprop),
}


@dataclass(frozen=True)
class Row:
    """The held-out loss and accuracy after ``step`` updates. n_tokens: lane-tokens, -1 unknown."""

    run: str
    seed: int
    step: int
    n_tokens: int
    loss: float
    accuracy: float
    seconds: float


def measure(
    model: Path, data: Path, name: str, seed: int, n_held_out: int, steps: int = STEPS
) -> Iterator[Row]:
    """Train one run and evaluate it on the way."""
    run, examples = RUNS[name], read_jsonl(data)
    train_set, held_out = split(examples, n_held_out, seed)
    engine = Engine.load(model, run.lora, labels=labels_of(examples), seed=seed)
    config = TrainConfig(
        steps=steps,
        batch_size=BATCH,
        perturbations=run.perturbations,
        method=run.method,
        per_example=run.per_example,
        learning_rate=run.learning_rate,
        head_learning_rate=HEAD_RATE,
        checkpoint_every=0,
        seed=seed,
    )
    seconds, clock = 0.0, time.perf_counter()
    for step, n_tokens in enumerate(run.trainer(engine, config, train_set), 1):
        if step % EVAL_EVERY and step != steps:
            continue
        seconds += time.perf_counter() - clock
        found = engine.evaluate(held_out)
        assert found.accuracy is not None
        yield Row(name, seed, step, n_tokens, found.loss, found.accuracy, seconds)
        clock = time.perf_counter()


def report(rows: Sequence[Row]) -> str:
    """Markdown: of each run the last losses of all seeds, and its share of the gap."""
    lines = [
        "| run | held-out loss, by seed | accuracy | share of the gap | lane-tokens |",
        "| --- | --- | --- | --- | --- |",
    ]
    last = {(row.run, row.seed): row for row in rows if row.step == max(r.step for r in rows)}
    for name in RUNS:
        mine = [row for (run, _), row in sorted(last.items()) if run == name]
        if not mine:
            continue
        shares = [share for row in mine if (share := _share(last, row)) is not None]
        tokens = statistics.median(row.n_tokens for row in mine)
        lines.append(
            f"| {name} | {' / '.join(f'{row.loss:.4f}' for row in mine)}"
            f" | {' / '.join(f'{100 * row.accuracy:.1f}%' for row in mine)}"
            f" | {' / '.join(f'{100 * share:.0f}%' for share in shares)}"
            f" | {f'{tokens / 1e6:.1f} M' if tokens > 0 else ''} |"
        )
    return "\n".join(lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Held-out loss against lane-tokens, seed 0, with the ends of the gap as lines."""
    from fwdllm.bench.pictures import curves

    lines, levels = {}, {}
    final = max(row.step for row in rows)
    for name, run in RUNS.items():
        mine = [row for row in rows if row.run == name and row.seed == 0]
        if run.trainer is forward_passes and mine:
            lines[name] = [(row.n_tokens / 1e6, row.loss) for row in mine]
        elif mine:
            levels[name] = next(row.loss for row in mine if row.step == final)
    curves(lines, levels, "million lane-tokens", "held-out loss (nats)", path)


def _share(last: dict[tuple[str, int], Row], row: Row) -> float | None:
    """What of the gap between the head alone and backprop, of the same seed, a run closed."""
    ends = [last.get((name, row.seed)) for name in ("head alone", "backprop")]
    if ends[0] is None or ends[1] is None:
        return None
    return (ends[0].loss - row.loss) / (ends[0].loss - ends[1].loss)


def _batch(engine: Engine, config: TrainConfig, examples: Sequence[Example], step: int) -> Batch:
    chosen = batch_indices(config.seed, step, len(examples), config.batch_size)
    return engine.encode([examples[i] for i in chosen])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--runs", default=";".join(RUNS), help="names with ; between them")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--held-out", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    if options.report:
        rows = [Row(**json.loads(line)) for line in options.report.read_text().splitlines()]
        print(report(rows))
        if options.plot:
            plot(rows, options.plot)
        return
    for seed in map(int, options.seeds.split(",")):
        for name in options.runs.split(";"):
            for row in measure(
                options.model, options.data, name, seed, options.held_out, options.steps
            ):
                print(row, file=sys.stderr, flush=True)
                with open(options.output, "a", encoding="utf-8") as out:
                    out.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
