"""How far forward passes bring a language model, beside backprop: held-out loss by lane-tokens.

    python bench/studies/forward_only.py run MODEL.gguf TRAIN.jsonl OUT.jsonl [--ways "NAME;NAME"]
        [--seeds 0,1,2] [--split reported] [--rates 0.005,0.01] [--max-tokens 192]
        [--evaluated 0,20,60]
    python bench/studies/forward_only.py report OUT.jsonl [--plot PLOT.png] [--at 1.3,1.2,1.06]

The first 200 rows of the training file are held out to choose rates by, the next 200 to report;
all ways train on the rest, in the same batches of a seed. A tangent or a lane counts one a token,
backprop four, readout two. Each evaluation is a line of OUT.jsonl, written when it is made.

Ways along random directions are simulated: their slopes are products with the exact gradient, which
is what forward-ad finds without it ("forward-ad, not simulated" shows it), in a tenth of the time.
Feedback through the stream alone is simulated with PyTorch: what a layer adds has the gradient
that the last layer's output has, as if the layers between added nothing that depends on it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.bench.pictures import curves
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.estimators.plan import Probe
from fwdllm.engine.settings import DirectionsConfig
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.descent import descend
from fwdllm.protocol.local import TrainState, train_step
from fwdllm.protocol.seeds import batch_indices, derive_seeds

HELD_OUT = 200
EVALUATED = (0, 5, 10, 20, 40, 60, 100, 200, 400)
# What a token of backprop counts by convention; the engine counts passes.
_BACKPROP = 4
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
QV = ("attn_q", "attn_v")

# One update: lane-tokens of it.
Step = Callable[[TrainState, Sequence[Example]], int]


@dataclass(frozen=True)
class Way:
    """A way to train. layers: the last so many are adapted, None for all.  feedback: simulated.

    simulated: slopes come from the exact gradient.  also: K, the other layers' q and v learn from
    as many random directions, simulated.  muon: see _by_muon.
    """

    rank: int
    targets: tuple[str, ...]
    layers: int | None
    steps: int
    train: dict[str, Any]
    directions: DirectionsConfig = field(default_factory=DirectionsConfig)
    feedback: bool = False
    also: int = 0
    simulated: bool = True
    muon: bool = False


class Simulated:
    """An engine that finds slopes by the exact gradient, and counts the passes of forward-ad."""

    def __init__(self, engine: Engine):
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def directional_derivatives(self, batch: Any, seeds: np.ndarray, **_: Any) -> Probe:
        found = self._engine.directional_derivatives(batch, seeds, "backprop")
        return dataclasses.replace(found, n_tokens=(1 + len(seeds)) * batch.n_rows)


def _back(rate: float) -> dict[str, Any]:
    return {"method": "backprop", "learning_rate": rate}


def _forward(k: int, rate: float, **more: Any) -> dict[str, Any]:
    return {"method": "forward-ad", "perturbations": k, "learning_rate": rate, **more}


_XS = DirectionsConfig("lora-xs")
WAYS = {
    "backprop": Way(8, QV, None, 40, _back(6e-3)),
    "backprop, the last layer": Way(8, LINEAR, 1, 60, _back(9e-3)),
    "backprop, the last 3 layers": Way(8, LINEAR, 3, 40, _back(9e-3)),
    "readout": Way(32, ("ffn_down",), 1, 100, {"method": "readout", "learning_rate": 5e-3}),
    "readout, 400 steps": Way(
        32,
        ("ffn_down",),
        1,
        400,
        {"method": "readout", "learning_rate": 5e-3, "schedule": "linear"},
    ),
    "readout, rank 8": Way(8, ("ffn_down",), 1, 100, {"method": "readout", "learning_rate": 1e-2}),
    "forward-ad": Way(8, QV, None, 40, _forward(8, 3e-3)),
    "forward-ad, not simulated": Way(8, QV, None, 60, _forward(8, 1e-3), simulated=False),
    "forward-ad, 64 directions": Way(8, QV, None, 40, _forward(64, 3e-3)),
    "forward-ad, rank 1": Way(1, QV, None, 40, _forward(16, 9e-3)),
    "forward-ad, momentum orthogonalised": Way(8, QV, None, 40, _forward(16, 3e-3), muon=True),
    "forward-ad on readout's matrix": Way(32, ("ffn_down",), 1, 40, _forward(16, 1.5e-2)),
    "forward-ad, the last 3 layers": Way(8, QV, 3, 40, _forward(16, 9e-3)),
    "lora-xs": Way(4, QV, None, 40, _forward(16, 0.05), _XS),
    "lora-xs, all matrices, rank 1": Way(1, LINEAR, None, 40, _forward(16, 0.15), _XS),
    "lora-xs, the last 6 layers": Way(4, LINEAR, 6, 40, _forward(16, 0.05), _XS),
    "lora-xs on readout's matrix": Way(16, ("ffn_down",), 1, 40, _forward(16, 0.05), _XS),
    "subzero": Way(8, QV, None, 40, _forward(16, 0.06), DirectionsConfig("subzero")),
    "activation": Way(
        1,
        ("attn_v", "attn_output", "ffn_up", "ffn_down"),
        None,
        20,
        {"method": "activation", "perturbations": 16, "learning_rate": 1e-2},
    ),
    "feedback through the stream, 3 layers": Way(
        8, ("attn_output", "ffn_down"), 3, 40, _back(3e-3), feedback=True
    ),
    "feedback through the stream, all layers": Way(
        8, ("attn_output", "ffn_down"), None, 40, _back(3e-3), feedback=True
    ),
    "readout, and q and v by 16 directions": Way(
        8, (*QV, "ffn_down"), None, 40, _back(3e-3), also=16
    ),
}


def run(
    model: str,
    examples: Sequence[Example],
    held_out: Sequence[Example],
    name: str,
    seed: int,
    rate: float | None,
    max_tokens: int,
    evaluated: Sequence[int],
    before: float,
) -> Iterator[dict[str, Any]]:
    """Train one way; a value for each evaluation. before: the loss that all start from."""
    way = WAYS[name]
    settings = {"schedule": "constant", **way.train}
    settings["learning_rate"] = rate or settings["learning_rate"]
    config = TrainConfig(way.steps, seed=seed, max_tokens=max_tokens, **settings)
    n_layers = Engine.load(model).args.n_layers
    layers = None if way.layers is None else tuple(range(n_layers - way.layers, n_layers))
    lora = LoRAConfig(way.rank, 2.0 * way.rank, way.targets, layers)
    engine = Engine.load(model, lora, seed=seed)
    step = _step_of(engine, config, way)
    if config.method == "activation":
        engine.use_activations()
    else:
        engine.use_directions(way.directions, seed, examples[:8])
    state, n_tokens = TrainState.initial(config, engine), 0
    for at in range(way.steps + 1):
        if at in evaluated or at == way.steps:
            loss = engine.evaluate(held_out, max_tokens).loss if at else before
            fields = {"way": name, "seed": seed, "rate": config.learning_rate, "step": at}
            yield {**fields, "lane_tokens": n_tokens, "loss": loss}
        if at < way.steps:
            n_tokens += step(state, examples)


def _step_of(engine: Engine, config: TrainConfig, way: Way) -> Step:
    if way.muon:
        return _by_muon(engine, config)
    if way.feedback:
        return partial(_by_stream, engine, config, _stream_model(engine))
    if way.also:
        return partial(_readout_and_others, engine, config, way.also)

    by_slopes = config.method == "forward-ad" and way.simulated
    used: Any = Simulated(engine) if by_slopes else engine

    def step(state: TrainState, examples: Sequence[Example]) -> int:
        found = train_step(used, config, state, examples)
        if config.method != "backprop":
            return found.n_tokens
        return _BACKPROP * _batch(engine, config, state.step - 1, examples).n_rows

    return step


def _batch(engine: Engine, config: TrainConfig, step: int, examples: Sequence[Example]) -> Any:
    chosen = batch_indices(config.seed, step, len(examples), config.batch_size)
    return engine.encode([examples[i] for i in chosen], config.max_tokens)


def _by_muon(engine: Engine, config: TrainConfig) -> Step:
    """ZO-Muon (arXiv 2602.17155): each factor of the adapter moves by its momentum's nearest
    orthogonal matrix, scaled to a root mean square of 1, as Adam's updates have."""
    adapter, directions = engine.adapter, engine.directions
    assert adapter is not None
    momentum, rank = np.zeros_like(adapter.theta), adapter.config.rank

    def step(state: TrainState, examples: Sequence[Example]) -> int:
        batch = _batch(engine, config, state.step, examples)
        seeds = derive_seeds(config.seed, state.step, config.perturbations)
        found = Simulated(engine).directional_derivatives(batch, seeds)
        coefficients = (found.derivative / len(seeds)).astype(np.float32)
        momentum[:] = 0.9 * momentum + directions.expand(directions.combine(seeds, coefficients))
        for target in adapter.targets:
            middle = target.offset + rank * target.n_in
            a, b = slice(target.offset, middle), slice(middle, target.offset + target.size(rank))
            for part, shape in ((a, (rank, target.n_in)), (b, (target.n_out, rank))):
                u, _, vt = np.linalg.svd(momentum[part].reshape(shape), full_matrices=False)
                move = (u @ vt) * np.sqrt(max(shape))
                adapter.theta[part] -= config.learning_rate * move.ravel()
        state.step += 1
        return found.n_tokens

    return step


def _update(engine: Engine, config: TrainConfig, state: TrainState, gradient: np.ndarray) -> None:
    assert engine.adapter is not None
    rate = config.learning_rate
    descend(engine.adapter, engine.directions, config, state.optimizer, gradient, rate, rate)
    state.step += 1


def _stream_model(engine: Engine) -> Any:
    import torch
    import torch.nn.functional as F
    from torch_model import TorchModel

    class Stream(TorchModel):
        """Layers read the stream as a constant, so that their gradients reach it by its sums."""

        def hidden(self, theta: torch.Tensor, batch: Any) -> torch.Tensor:
            x = self.tensors["token_embd.weight"][torch.tensor(batch.ids, dtype=torch.long)]
            for i in range(self.args.n_layers):
                block = f"blk.{i}"
                h = self._rms_norm(x.detach(), f"{block}.attn_norm")
                x = x + self._self_attention(theta, batch, block, h)
                h = self._rms_norm(x.detach(), f"{block}.ffn_norm")
                gate = self._linear(theta, h, f"{block}.ffn_gate")
                up = self._linear(theta, h, f"{block}.ffn_up")
                x = x + self._linear(theta, F.silu(gate) * up, f"{block}.ffn_down")
            return x

    return Stream(engine, torch.float32)


def _by_stream(
    engine: Engine, config: TrainConfig, model: Any, state: TrainState, examples: Sequence[Example]
) -> int:
    from torch_model import gradient

    batch = _batch(engine, config, state.step, examples)
    _update(engine, config, state, gradient(model, batch).astype(np.float32))
    return 2 * batch.n_rows


def _readout_and_others(
    engine: Engine, config: TrainConfig, k: int, state: TrainState, examples: Sequence[Example]
) -> int:
    """Of the exact gradient what readout has, and of q and v what K random slopes say."""
    adapter, batch = engine.adapter, _batch(engine, config, state.step, examples)
    assert adapter is not None
    exact, last = engine.gradient(batch).values, f"blk.{engine.args.n_layers - 1}.ffn_down"
    found, others = np.zeros_like(exact), np.zeros(len(exact), bool)
    for target in adapter.targets:
        part = slice(target.offset, target.offset + target.size(adapter.config.rank))
        if target.name == last:
            found[part] = exact[part]
        elif "attn" in target.name:
            others[part] = True
    rng = np.random.default_rng([config.seed, state.step])
    for _ in range(k):
        z = rng.standard_normal(int(others.sum()), np.float32)
        found[others] += (z @ exact[others]) / k * z
    _update(engine, config, state, found)
    return (2 + k) * int(batch.n_rows)


def first_at(lines: Sequence[dict[str, Any]], loss: float) -> float | None:
    """Lane-tokens at which a run's loss is first at a value, between evaluations by a line."""
    for before, after in itertools.pairwise(lines):
        if after["loss"] <= loss < before["loss"]:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            n_tokens: int = before["lane_tokens"]
            return n_tokens + share * (after["lane_tokens"] - n_tokens)
    return None


def report(out: Path, at: Sequence[float], plot: Path | None) -> None:
    """A table in Markdown, medians and ranges of seeds; a picture of the first seed of each way."""
    runs: dict[str, dict[tuple[int, float], list[dict[str, Any]]]] = {}
    for text in out.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        runs.setdefault(line["way"], {}).setdefault((line["seed"], line["rate"]), []).append(line)
    heads = " | ".join(f"at {loss:g}" for loss in at)
    print(
        f"| way | seeds | rate | {heads} | last loss | lane-tokens |\n| {'--- | ' * (len(at) + 5)}"
    )
    for name, found in runs.items():
        cells = [_cell([first_at(lines, loss) for lines in found.values()], "M") for loss in at]
        ends = [lines[-1] for lines in found.values()]
        cells.append(_cell([end["loss"] for end in ends], ""))
        rates = sorted({rate for _, rate in found})
        print(
            f"| {name} | {len(found)} | {', '.join(map(str, rates))} | {' | '.join(cells)} | "
            f"{ends[0]['lane_tokens'] / 1e6:.3f} M |"
        )
    if plot is not None:
        lines = {
            name: [(line["lane_tokens"], line["loss"]) for line in next(iter(found.values()))[1:]]
            for name, found in runs.items()
        }
        before = next(iter(runs.values()))
        levels = {"before": next(iter(before.values()))[0]["loss"]}
        curves(lines, levels, "lane-tokens", "held-out loss (nats)", plot, log=True)


def _cell(values: Sequence[float | None], unit: str) -> str:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "not reached" if not known else f"{len(known)} of {len(values)}"
    if unit:
        known = [value / 1e6 for value in known]
    middle = f"{statistics.median(known):.4f}" if unit else f"{statistics.median(known):.3f}"
    if len(known) == 1:
        return f"{middle} {unit}".strip()
    digits = 4 if unit else 3
    return f"{middle} ({min(known):.{digits}f}-{max(known):.{digits}f}) {unit}".strip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    for name in ("model", "data", "out"):
        running.add_argument(name, type=Path)
    running.add_argument("--ways", default=";".join(WAYS))
    running.add_argument("--seeds", default="0")
    running.add_argument("--split", choices=("rates", "reported"), default="reported")
    running.add_argument("--rates")
    running.add_argument("--max-tokens", type=int, default=192)
    running.add_argument("--evaluated", default=",".join(map(str, EVALUATED)))
    reporting = commands.add_parser("report")
    reporting.add_argument("out", type=Path)
    reporting.add_argument("--plot", type=Path)
    reporting.add_argument("--at", default="1.3,1.2,1.06")
    given = parser.parse_args()
    if given.command == "report":
        report(given.out, [float(loss) for loss in given.at.split(",")], given.plot)
        return
    rows = read_jsonl(given.data)
    first = 0 if given.split == "rates" else HELD_OUT
    held_out, rest = rows[first : first + HELD_OUT], rows[2 * HELD_OUT :]
    rates = [float(rate) for rate in given.rates.split(",")] if given.rates else [None]
    evaluated = [int(step) for step in given.evaluated.split(",")]
    seeds = [int(seed) for seed in given.seeds.split(",")]
    before = Engine.load(str(given.model)).evaluate(held_out, given.max_tokens).loss
    with open(given.out, "a", encoding="utf-8") as out:
        for name, seed, rate in itertools.product(given.ways.split(";"), seeds, rates):
            options = (name, seed, rate, given.max_tokens, evaluated, before)
            for line in run(str(given.model), rest, held_out, *options):
                print(json.dumps(line), file=out, flush=True)
                print(line, flush=True)


if __name__ == "__main__":
    main()
