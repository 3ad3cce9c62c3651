"""A federated run as a plot: accuracy or loss against costs, and the effect of pacing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fwdllm.federation.summary import summarize
from fwdllm.protocol.ledger import Ledger
from fwdllm.tuning.plot import LINE, style


def draw(ledger: Ledger, path: Path) -> None:
    """Write a PNG: held-out accuracy (loss if there are no labels) against rounds, client-seconds
    and bytes; perturbations, variance and clients' loss of each round."""
    rounds, evaluations = summarize(ledger), ledger.evaluations()
    has_accuracy = any(accuracy is not None for _, _, accuracy, _ in evaluations)
    values = [accuracy if has_accuracy else loss for _, loss, accuracy, _ in evaluations]
    label = "held-out accuracy" if has_accuracy else "held-out loss (nats)"
    at = [evaluation[0] for evaluation in evaluations]
    costs = {
        "round": [float(i) for i in range(len(rounds) + 1)],
        "client-seconds": _total([r.client_seconds for r in rounds]),
        "bytes up and down": _total([r.bytes_up + r.bytes_down for r in rounds]),
    }
    figure = Figure(figsize=(11, 6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 3).ravel()
    for axis, (name, cost) in zip(axes, costs.items(), strict=False):
        axis.plot([cost[i] for i in at], values, "o-", color=LINE, markersize=4)
        style(axis, name, label)
    numbers = [r.round for r in rounds]
    _series(axes[3], numbers, [float(r.n_perturbations) for r in rounds], "perturbations")
    _series(axes[4], numbers, [r.variance for r in rounds], "variance of the gradient")
    _series(axes[5], numbers, [r.loss for r in rounds], "clients' loss (nats)")
    figure.savefig(path, format="png")


def _series(axis: Axes, rounds: Sequence[int], values: Sequence[float | None], label: str) -> None:
    known = [(r, v) for r, v in zip(rounds, values, strict=True) if v is not None]
    if known:
        axis.plot(*zip(*known, strict=True), color=LINE, linewidth=1.2)
    style(axis, "round", label)


def _total(values: Sequence[float]) -> list[float]:
    return list(accumulate(values, initial=0.0))
