"""Reports of measurements: tables for the terminal, saved results, comparison of two results."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from fwdllm.cli.console import Terminal
from fwdllm.engine.backends import OWN
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import atomic_write

# Entries without figures of their own: settings, and values that follow from other figures.
_NOT_COMPARED = ("settings", "fraction", "overhead")

_FILE_WIDTH = 120


def save(result: Mapping[str, Any], path: Path) -> None:
    """Write a result as JSON, for later comparison."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def load(path: Path, command: str) -> dict[str, Any]:
    """A saved result of ``command``; ConfigError if the file is something else."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    if not isinstance(result, dict) or result.get("command") != command:
        raise ConfigError(f"{path} is not a saved result of: fwdllm bench {command}")
    return result


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, float]:
    """new / old for every figure in both results, by path, such as "peer.seconds"."""
    before = dict(figures(old))
    return {name: value / before[name] for name, value in figures(new) if before.get(name)}


def figures(result: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The path and value of every number of a result that can be compared."""
    for name, value in result.items():
        if name in _NOT_COMPARED:
            continue
        if isinstance(value, Mapping):
            yield from figures(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)):
            yield f"{prefix}{name}", value


def render_comparison(new: Mapping[str, Any], old: Mapping[str, Any], path: Path) -> RenderableType:
    """The ratios of ``compare``, and the settings that differ."""
    table = _table("figure", f"{path.name}", "now", "now / then")
    before, after = dict(figures(old)), dict(figures(new))
    for name, ratio in compare(new, old).items():
        table.add_row(name, f"{before[name]:.6g}", f"{after[name]:.6g}", f"{ratio:.3f}")
    then, now = old.get("settings", {}), new["settings"]
    changed = [
        f"{key} was {then.get(key)}, is {now.get(key)}"
        for key in sorted({*then, *now})
        if then.get(key) != now.get(key)
    ]
    return Group("", *changed, table)


def render_protocol(result: Mapping[str, Any]) -> RenderableType:
    """A result of ``bench.protocol`` as a table."""
    table = _table("", "figure")
    low, high = result["ratio_range"]
    rows = {
        "closing a round": f"{result['close_seconds']:.3f} s",
        "generating its normal numbers alone": f"{result['normals_seconds']:.3f} s",
        "ratio": f"{result['ratio']:.3f} ({low:.3f} to {high:.3f})",
        "planning it": f"{result['plan_seconds']:.3f} s",
        "receiving a contribution": f"{1e6 * result['receive_seconds']:,.0f} us",
        "bytes of a contribution": f"{result['report_bytes']:,}",
        "bytes of the update": f"{result['update_bytes']:,}",
        "bytes of the adapter": f"{result['state_bytes']:,}",
    }
    for name, figure in rows.items():
        table.add_row(name, figure)
    return Group(_settings(result), "", table)


def render_shards(result: Mapping[str, Any]) -> RenderableType:
    """A result of ``bench.shards`` as a table."""
    table = _table("", "figure")
    rows = {
        "reports taken in a second": f"{result['reports_per_s']:,.0f}",
        "taking them": f"{result['take_seconds']:.2f} s",
        "all cores' time in it": f"{result['take_core_seconds']:.2f} s",
        "planning the round": f"{result['plan_seconds']:.2f} s",
        "closing it": f"{result['close_seconds']:.2f} s",
        "the round": f"{result['round_seconds']:.2f} s",
        "bytes of a report": f"{result['report_bytes']:,}",
        "ledgers of the processes, a round": f"{result['shards_bytes'] / 1e6:,.1f} MB",
        "the run's ledger, a round": f"{result['ledger_bytes'] / 1e6:,.1f} MB",
        "most memory of a process, with its reports": (
            f"{result['shard_peak_rss_bytes'] / 1e6:,.0f} MB"
        ),
        "most memory of the root": f"{result['peak_rss_bytes'] / 1e6:,.0f} MB",
    }
    for name, figure in rows.items():
        table.add_row(name, figure)
    return Group(_settings(result), "", table)


def render_serve(result: Mapping[str, Any]) -> RenderableType:
    """A result of ``bench.serve`` as a table."""
    pace = result["steps_per_s"]
    return Group(
        _settings(result),
        "",
        _latencies(result, "a job"),
        "",
        f"answers: {_statuses(result['statuses'])}; jobs lost: {result['jobs_lost']}",
        f"the job: {pace['alone']:.2f} steps/s alone, {pace['with']:.2f} beside the clients",
        f"first answer {result['first_answer_s']:.2f} s after the start, "
        f"and {result['tuned_answer_s']:.2f} s after a job's end by its model",
    )


def render_attack(result: Mapping[str, Any]) -> RenderableType:
    """A result of ``bench.attack`` as tables."""
    attacks = _table("attack", "answers")
    for kind, statuses in result["attacks"].items():
        attacks.add_row(kind, _statuses(statuses))
    memory = result["resident_bytes"]
    ends = ", ".join(f"{n / 1e6:,.0f}" for n in memory["ends"])
    return Group(
        _settings(result),
        "",
        _latencies(result, "attackers"),
        "",
        attacks,
        "",
        f"answers to clients: {_statuses(result['statuses'])}; of 500 and above, to all: "
        f"{result['errors']}",
        f"memory at the ends of the parts: {ends} MB; at most {memory['most'] / 1e6:,.0f} MB",
    )


def _latencies(result: Mapping[str, Any], beside: str) -> Table:
    table = _table("latency", "requests", "p50", "p95", "longest")
    for part in ("without", "with"):
        for kind, found in result[part].items():
            times = (f"{found[name]:.3f} s" for name in ("p50", "p95", "max"))
            table.add_row(f"{kind}, {part} {beside}", f"{found['requests']:,}", *times)
    return table


def _statuses(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} of {status}" for status, n in counts.items())


def render_sides(result: Mapping[str, Any]) -> RenderableType:
    """A result of ``bench.measure`` as tables."""
    peer = result["peer"]
    table = _table("", "tokens/s", "lowest to highest", "seconds", "memory", "loss")
    ours = "fwdllm" if result["settings"]["backend"] == OWN else "fwdllm by llama.cpp"
    for name, side in ((ours, result), *([(_name(peer), peer)] if peer else [])):
        table.add_row(
            name,
            f"{side['tokens_per_s']:,.1f}",
            _range(side["tokens_per_s_range"], ",.1f"),
            f"{side['seconds']:.3f}",
            f"{side['peak_rss_bytes'] / 1e6:,.0f} MB",
            f"{side['loss']:.4f}",
        )
    parts: list[RenderableType] = [_settings(result), "", table]
    if peer:
        spread = _range(result["ratio_range"], ".3f")
        parts += ["", f"{result['ratio']:.3f} times as fast as {peer['name']} ({spread})"]
    if "breakdown" in result:
        parts += ["", _render_breakdown(result["breakdown"])]
    return Group(*parts)


def render_kernels(result: Mapping[str, Any]) -> RenderableType:
    """A result of ``bench.kernels`` as tables."""
    parts: list[RenderableType] = [_settings(result)]
    for isa, found in result["kernels"].items():
        peaks = [f"{kind} {rate:,.1f}" for kind, rate in result["peaks"][isa].items() if rate]
        table = _table("kernel", "rate", "", "lowest to highest", "of the limit", "", "overhead")
        for name, entry in found.items():
            table.add_row(
                name,
                f"{entry['rate']:,.2f}",
                entry["unit"],
                _range(entry["rate_range"], ",.2f"),
                f"{entry['fraction']:.1%}" if "fraction" in entry else "",
                entry.get("of", ""),
                f"{entry['overhead']:.1%}" if "overhead" in entry else "",
            )
        parts += ["", f"{isa}; limits in 10^9/s: {', '.join(peaks)}", "", table]
    return Group(*parts)


def _render_breakdown(seconds: Mapping[str, float]) -> RenderableType:
    total = sum(seconds.values())
    table = _table("operation", "seconds", "share")
    for name, value in seconds.items():
        table.add_row(name, f"{value:.4f}", f"{value / total:.1%}")
    return table


def _settings(result: Mapping[str, Any]) -> str:
    shown = []
    for name, value in result["settings"].items():
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            shown.append(f"{name} {text}")
    return ", ".join(shown)


def _name(peer: Mapping[str, Any]) -> str:
    notes = [str(peer[key]) for key in ("version", "dtype") if key in peer]
    return f"{peer['name']} ({', '.join(notes)})" if notes else str(peer["name"])


def _range(bounds: tuple[float, float], form: str) -> str:
    return f"{bounds[0]:{form}} to {bounds[1]:{form}}"


def show(*parts: RenderableType) -> None:
    """Print on stdout; in a file or pipe, lines are ``_FILE_WIDTH`` wide."""
    console = Terminal()
    if not console.is_terminal:
        console = Terminal(width=_FILE_WIDTH)
    for part in parts:
        console.print(part)


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table
