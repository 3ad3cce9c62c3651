"""The loss curve of a run as a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

LINE, _HELD_OUT, _TEXT, _GRID = "#4c78a8", "#e4572e", "#444444", "#e6e6e6"


def draw(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw loss and held-out loss over steps as a PNG.

    records: the lines of metrics.jsonl. The batch loss is drawn faintly, with its running
    mean on top, because single batches scatter more than the loss changes.
    """
    train = _series(records, "step")
    held_out = _series(records, "eval")
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no global state and no window system, unlike pyplot
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color=LINE, alpha=0.25, linewidth=1)
        axes.plot(steps, _running_mean(losses), color=LINE, linewidth=1.8, label="training")
    if held_out:
        steps, losses = zip(*held_out, strict=True)
        axes.plot(steps, losses, "o-", color=_HELD_OUT, markersize=4, label="held out")
    style(axes, "step", "loss (nats)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, format="png")


def _series(records: Sequence[dict[str, Any]], event: str) -> list[tuple[int, float]]:
    return [
        (record["step"], record["loss"])
        for record in records
        if record["event"] == event and record["loss"] is not None
    ]


def _running_mean(losses: Sequence[float], decay: float = 0.9) -> list[float]:
    """Exponential moving average, with bias correction as in Adam."""
    total, weight, means = 0.0, 0.0, []
    for loss in losses:
        total = decay * total + loss
        weight = decay * weight + 1
        means.append(total / weight)
    return means


def style(axes: Axes, x_label: str, y_label: str) -> None:
    """The look of all plots."""
    axes.set_xlabel(x_label, color=_TEXT)
    axes.set_ylabel(y_label, color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_TEXT)
    axes.tick_params(colors=_TEXT)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, labelcolor=_TEXT)
