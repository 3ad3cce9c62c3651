"""What ``bench/studies/federated`` has measured: tables in Markdown and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Row:
    """The held-out loss and accuracy after ``round`` rounds, and what all of them took.

    n_tokens: lane-tokens of accepted answers, n_answers of them.  client_seconds: simulated, of all
    clients together.  wall_seconds: simulated, since the run began; None where it was not noted.
    bytes_up, bytes_down: of all clients.  n_perturbations: scalars of the adapter.  variance: of
    the last round's gradient, None where it is not known.  epsilon: of differential privacy, None
    without.  accuracy: None where examples
    have no labels.  seconds: of this machine, without evaluations.
    """

    run: str
    partition: str
    seed: int
    round: int
    n_tokens: int
    n_answers: int
    client_seconds: float
    bytes_up: int
    bytes_down: int
    n_perturbations: int
    variance: float | None
    epsilon: float | None
    loss: float
    accuracy: float | None
    seconds: float
    wall_seconds: float | None = None


def report(rows: Sequence[Row], target_loss: float | None = None) -> str:
    """Markdown: of each partition a table of the runs' ends, and of how they met a target."""
    parts = []
    for partition in dict.fromkeys(row.partition for row in rows):
        mine = by_run([row for row in rows if row.partition == partition])
        if mine:
            parts += [f"### {partition}", _ends(mine)]
        if mine and target_loss is not None:
            parts += [f"First evaluation at {target_loss:g} nats or below:"]
            parts += [_arrivals(mine, target_loss)]
    return "\n\n".join(parts)


# The rows of one run and seed, in order of rounds.
Curve = list[Row]


def by_run(rows: Sequence[Row]) -> dict[str, list[Curve]]:
    """Of each run the rows of its seeds."""
    found: dict[str, list[Curve]] = {}
    for name in dict.fromkeys(row.run for row in rows):
        seeds = sorted({row.seed for row in rows if row.run == name})
        curves = [[r for r in rows if (r.run, r.seed) == (name, seed)] for seed in seeds]
        if curves:
            found[name] = [sorted(curve, key=lambda row: row.round) for curve in curves]
    return found


def _score(row: Row) -> float:
    """The accuracy, or the loss of examples without labels."""
    return row.loss if row.accuracy is None else row.accuracy


def _name(runs: Mapping[str, list[Curve]]) -> str:
    rows = next(iter(runs.values()))[0]
    return "held-out loss" if rows[0].accuracy is None else "held-out accuracy"


def _ends(runs: Mapping[str, list[Curve]]) -> str:
    def text(score: float) -> str:
        return f"{score:.4f}" if ends[0].accuracy is None else f"{100 * score:.1f}%"

    lines = [
        f"| run | {_name(runs)}, by seed | median | loss | rounds | lane-tokens"
        " | client-seconds | up / down per client-round |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, curves in runs.items():
        ends = [curve[-1] for curve in curves]
        up = _median([row.bytes_up / max(1, row.n_answers) for row in ends])
        down = _median([row.bytes_down / max(1, row.n_answers) for row in ends])
        lines.append(
            f"| {name} | {' / '.join(text(_score(row)) for row in ends)}"
            f" | {text(_median([_score(row) for row in ends]))}"
            f" | {_median([r.loss for r in ends]):.4f} | {_median([r.round for r in ends]):.0f}"
            f" | {_short(_median([r.n_tokens for r in ends]))}"
            f" | {_short(_median([r.client_seconds for r in ends]))}"
            f" | {_short(up)}B / {_short(down)}B |"
        )
    return "\n".join(lines)


def _arrivals(runs: Mapping[str, list[Curve]], target_loss: float) -> str:
    lines = [
        "| run | seeds that met it | rounds | simulated seconds | client-seconds | lane-tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, curves in runs.items():
        firsts = [next((row for row in c if row.loss <= target_loss), None) for c in curves]
        met = [row for row in firsts if row is not None]
        costs = [
            [float(row.round) for row in met],
            [row.wall_seconds for row in met if row.wall_seconds is not None],
            [row.client_seconds for row in met],
            [float(row.n_tokens) for row in met],
        ]
        cells = " | ".join(_spread(values) for values in costs)
        lines.append(f"| {name} | {len(met)} of {len(curves)} | {cells} |")
    return "\n".join(lines)


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _spread(values: Sequence[float]) -> str:
    """The median, and the least and the most where they differ."""
    if not values:
        return ""
    middle, low, high = (_short(v) for v in (_median(values), min(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _short(value: float) -> str:
    """Three digits, with k, M or G."""
    for scale, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{sign}"
    return f"{value:.3g}"


def plot(rows: Sequence[Row], folder: Path) -> None:
    """Held-out accuracy or loss against three costs, median and range of seeds; as PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    for partition in dict.fromkeys(row.partition for row in rows):
        mine = by_run([row for row in rows if row.partition == partition])
        if mine:
            _draw(mine, folder / f"federated-{partition.replace(' ', '-')}.png")


_COSTS: dict[str, Callable[[Row], float]] = {
    "clients' lane-tokens (million)": lambda row: row.n_tokens / 1e6,
    "rounds": lambda row: float(row.round),
    "bytes up and down": lambda row: float(row.bytes_up + row.bytes_down),
}


def _draw(runs: Mapping[str, list[Curve]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from fwdllm.tuning.plot import style

    figure = Figure(figsize=(13, 5), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)  # no global state and no window system, unlike pyplot
    axes = figure.subplots(1, len(_COSTS), sharey=True)
    handles: list[Any] = []
    for axis, (label, cost) in zip(axes, _COSTS.items(), strict=True):
        is_log = label != next(iter(_COSTS))  # scalars and weights are far apart
        if is_log:
            axis.set_xscale("log")
        handles = []
        for i, (name, curves) in enumerate(runs.items()):
            line = "-" if "," not in name else "--"
            x, low, middle, high = _band(curves, cost, is_log)
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.15, linewidth=0)
            handles += axis.plot(x, middle, line, color=f"C{i}", linewidth=1.5)
        style(axis, label, _name(runs) if not is_log else "")
    figure.legend(handles, list(runs), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, format="png")


def _band(
    curves: Sequence[Curve], cost: Callable[[Row], float], is_log: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Costs that all seeds have met, and least, median and greatest score there."""
    seeds = [[row for row in curve if cost(row) > 0 or not is_log] for curve in curves]
    costs = [np.array([cost(row) for row in curve]) for curve in seeds]
    first, last = max(c[0] for c in costs), min(c[-1] for c in costs)
    x = np.unique(np.concatenate(costs))
    x = x[(x >= first) & (x <= last)]
    scale = np.log if is_log else np.asarray
    scores = [
        np.interp(scale(x), scale(c), [_score(row) for row in curve])
        for c, curve in zip(costs, seeds, strict=True)
    ]
    return x, np.min(scores, 0), np.median(scores, 0), np.max(scores, 0)
