"""Training loss of runs against lane-tokens: a table, and a picture.

    python bench/studies/runs.py PLOT.png NAME=RUN_DIR NAME=RUN_DIR ... [--at LOSS,LOSS]

Reads the metrics.jsonl that ``fwdllm tune`` writes. The loss is a running mean over steps, as
single batches scatter more than training moves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from fwdllm.bench.pictures import curves

_DECAY = 0.95
_POINTS = 100  # of a line in the picture


def training_curve(run_dir: Path) -> list[tuple[float, float]]:
    """(million lane-tokens so far, running mean of the loss) after each step."""
    points, tokens, total, weight = [], 0, 0.0, 0.0
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        if record["event"] != "step":
            continue
        tokens += record["n_tokens"]
        total = _DECAY * total + record["loss"]
        weight = _DECAY * weight + 1
        points.append((tokens / 1e6, total / weight))
    return points


def tokens_to_reach(curve: Sequence[tuple[float, float]], loss: float) -> float | None:
    """Million lane-tokens until the running mean is first at ``loss``, None if it never is."""
    return next((tokens for tokens, value in curve if value <= loss), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plot", type=Path)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN_DIR")
    parser.add_argument("--at", default="", help="losses to look for, with commas")
    options = parser.parse_args()
    named = dict(run.split("=", 1) for run in options.runs)
    lines = {name: training_curve(Path(folder)) for name, folder in named.items()}
    losses = [float(loss) for loss in options.at.split(",") if loss]
    print("| run | last |" + "".join(f" {loss:g} nats |" for loss in losses))
    print("| --- | --- |" + " --- |" * len(losses))
    for name, line in lines.items():
        found = [tokens_to_reach(line, loss) for loss in losses]
        cells = "".join(" never |" if t is None else f" {t:.2f} M |" for t in found)
        print(f"| {name} | {line[-1][1]:.4f} |{cells}")
    thin = {n: line[:: max(1, len(line) // _POINTS)] for n, line in lines.items()}
    curves(thin, {}, "million lane-tokens", "training loss (nats)", options.plot)


if __name__ == "__main__":
    main()
