"""Plots of measurements, in the style of ``fwdllm.tuning.plot``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

_OURS, _PEER, _TEXT, _GRID = "#4c78a8", "#e4572e", "#444444", "#e6e6e6"
_COLORS = (_OURS, _PEER, "#54a24b", "#b279a2", "#9d755d", "#777777")
_BAR_INCHES = 0.28
_ROOFLINE_BARS = 15  # a roofline is as high as so many bars
_MARKED = 20  # lines with fewer points get markers


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a result of ``fwdllm bench`` as a PNG: horizontal bars, thin lines for the range.

    Of kernels there is a second one, NAME-roofline.png.
    """
    if result["command"] != "kernels":
        _draw_sides(result).savefig(path, format="png")
        return
    _draw_kernels(result).savefig(path, format="png")
    if rooflines := _draw_rooflines(result):
        rooflines.savefig(path.with_stem(f"{path.stem}-roofline"), format="png")


def curves(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    levels: Mapping[str, float],
    x_label: str,
    y_label: str,
    path: Path,
    log: bool = False,
) -> None:
    """Draw a PNG of lines through points, and levels as dotted lines. log: logarithmic x axis."""
    figure = Figure(figsize=(7.2, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no global state and no window system, unlike pyplot
    axes = figure.add_subplot()
    for i, (name, points) in enumerate(lines.items()):
        x, y = zip(*points, strict=True)
        style = ("-", "--", ":")[i // len(_COLORS) % 3]
        marker = "o" if len(points) < _MARKED else ""
        color = _COLORS[i % len(_COLORS)]
        axes.plot(x, y, style, color=color, marker=marker, markersize=3, label=name)
    for name, level in levels.items():
        axes.axhline(level, color=_TEXT, linewidth=1, linestyle=":")
        axes.annotate(name, (1, level), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    if log:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(x_label, color=_TEXT)
    axes.set_ylabel(y_label, color=_TEXT)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_TEXT)
    axes.tick_params(colors=_TEXT)
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(
        frameon=False,
        labelcolor=_TEXT,
        fontsize=7,
        handlelength=3,  # so that dashes show
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )
    figure.savefig(path, format="png")


def _draw_kernels(result: Mapping[str, Any]) -> Figure:
    """Each kernel's share of this machine's limit, a bar for each instruction set."""
    isas = list(result["kernels"])
    names = [n for n, entry in result["kernels"][isas[0]].items() if "fraction" in entry]
    figure, (axes,) = _figure([len(names) * len(isas)])
    for i, isa in enumerate(isas):
        entries = [result["kernels"][isa][name] for name in names]
        places = [at + (i - (len(isas) - 1) / 2) * 0.8 / len(isas) for at in range(len(names))]
        shares = [entry["fraction"] for entry in entries]
        ranges = [
            [bound * entry["fraction"] / entry["rate"] for bound in entry["rate_range"]]
            for entry in entries
        ]
        _bars(axes, places, shares, ranges, 0.8 / len(isas), _COLORS[i % len(_COLORS)], isa)
    limits = {entry["of"] for entry in result["kernels"][isas[0]].values() if "of" in entry}
    axes.set_xlabel(f"share of the machine's limit ({', '.join(sorted(limits))})", color=_TEXT)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.axvline(1, color=_TEXT, linewidth=0.8)
    if len(isas) > 1:
        axes.legend(frameon=False, labelcolor=_TEXT)
    return figure


def _draw_rooflines(result: Mapping[str, Any]) -> Figure | None:
    """A roofline for each instruction set; None if no kernel says its operations a byte."""
    points = {isa: _points(kernels) for isa, kernels in result["kernels"].items()}
    if not any(points.values()):
        return None
    figure, axes = _figure([_ROOFLINE_BARS] * len(points))
    for (isa, found), ax in zip(points.items(), axes, strict=True):
        _roofline(ax, isa, found, result["peaks"][isa])
    return figure


def _points(kernels: Mapping[str, Any]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """(operations a byte, 10^9 operations a second) by limit and by the kind of kernel."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name, entry in kernels.items():
        if "intensity" in entry and "of" in entry:
            kind = name.removeprefix("exact ").split()[0]
            points = found.setdefault(entry["of"], {}).setdefault(kind, [])
            points.append((entry["intensity"], entry["rate"]))
    return found


def _roofline(
    axes: Axes,
    isa: str,
    points: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    peaks: Mapping[str, float],
) -> None:
    """Rates by operations a byte, under the lines of what memory and arithmetic allow."""
    every = [x for kinds in points.values() for own in kinds.values() for x, _ in own]
    read, right = peaks["read"], 2 * max(every)
    left = min(min(every), peaks["fp32"] / read) / 2
    for i, (of, kinds) in enumerate(points.items()):
        color, knee = _COLORS[i % len(_COLORS)], peaks[of] / read
        axes.plot([left, knee, right], [left * read, peaks[of], peaks[of]], color=color, label=of)
        for marker, (kind, own) in zip("osD^v", kinds.items(), strict=False):
            x, y = zip(*own, strict=True)
            axes.plot(
                x,
                y,
                marker,
                color=color,
                markersize=4,
                markerfacecolor="none",
                label=f"{kind}, {of}",
            )
    axes.invert_yaxis()  # unlike bars
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.grid(color=_GRID, linewidth=0.8)
    axes.set_xlabel(f"{isa}: operations for a byte of operands and results", color=_TEXT)
    axes.set_ylabel("10^9 operations a second", color=_TEXT)
    axes.legend(frameon=False, labelcolor=_TEXT, fontsize=7, loc="lower right")


def _draw_sides(result: Mapping[str, Any]) -> Figure:
    """Tokens per second and memory of each side, and the breakdown of a step."""
    sides = {"fwdllm": result}
    if result["peer"]:
        sides[result["peer"]["name"]] = result["peer"]
    breakdown = result.get("breakdown", {})
    figure, axes = _figure([len(sides), len(sides), *([len(breakdown)] if breakdown else [])])
    colors = (_OURS, _PEER)
    for i, side in enumerate(sides.values()):
        speed, memory = side["tokens_per_s"], side["peak_rss_bytes"] / 1e6
        _bars(axes[0], [i], [speed], [side["tokens_per_s_range"]], 0.6, colors[i])
        _bars(axes[1], [i], [memory], [[memory, memory]], 0.6, colors[i])
    for ax, label in zip(axes, ("tokens/s", "peak resident memory (MB)"), strict=False):
        ax.set_yticks(range(len(sides)), sides)
        ax.set_xlabel(label, color=_TEXT)
    if breakdown:
        seconds = list(breakdown.values())
        _bars(axes[2], range(len(seconds)), seconds, [[s, s] for s in seconds], 0.6, _OURS)
        axes[2].set_yticks(range(len(seconds)), breakdown)
        axes[2].set_xlabel("seconds of one step", color=_TEXT)
    return figure


def gpu_steps(result: Mapping[str, Any], path: Path) -> None:
    """Draw seconds and peak memory of the steps in a ``bench-gpu.json`` as a PNG."""
    parts = {_OURS: result["step"], _PEER: result["peers"]}
    found = [
        (f"PyTorch, {name}" if color == _PEER else f"fwdllm, {name}", entry, color)
        for color, part in parts.items()
        for name, entry in part.items()
        if isinstance(entry, dict) and "seconds" in entry
    ]
    found.sort(key=lambda side: side[1]["seconds"])
    figure, axes = _figure([len(found)] * 2)
    for i, (_, entry, color) in enumerate(found):
        _bars(axes[0], [i], [entry["seconds"]], [entry["seconds_range"]], 0.6, color)
        gib = entry["peak_bytes"] / 2**30
        _bars(axes[1], [i], [gib], [[gib, gib]], 0.6, color)
    for ax, label in zip(axes, ("seconds of a step", "peak GiB of the GPU"), strict=True):
        ax.set_yticks(range(len(found)), [name for name, _, _ in found], fontsize=8)
        ax.set_xlabel(label, color=_TEXT)
    figure.savefig(path, format="png")


def _figure(bars: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """Plots one below the other, each as high as its number of bars requires."""
    heights = [_BAR_INCHES * n + 0.8 for n in bars]
    figure = Figure(figsize=(7.2, sum(heights)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # no global state and no window system, unlike pyplot
    grid = figure.subplots(len(bars), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    axes = list(grid[:, 0])
    for ax in axes:
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color(_TEXT)
        ax.tick_params(colors=_TEXT)
        ax.grid(axis="x", color=_GRID, linewidth=0.8)
        ax.set_axisbelow(True)
        ax.margins(y=0.02)
    return figure, axes


def _bars(
    axes: Axes,
    places: Sequence[float],
    values: Sequence[float],
    ranges: Sequence[Sequence[float]],
    height: float,
    color: str,
    label: str | None = None,
) -> None:
    below = [max(0.0, value - low) for value, (low, _) in zip(values, ranges, strict=True)]
    above = [max(0.0, high - value) for value, (_, high) in zip(values, ranges, strict=True)]
    style = {"elinewidth": 0.8, "ecolor": _TEXT}
    axes.barh(places, values, height, xerr=[below, above], color=color, error_kw=style, label=label)
