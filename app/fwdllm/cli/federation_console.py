"""Federated runs in a terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Table

from fwdllm.cli.console import Terminal, progress_bar, say

if TYPE_CHECKING:
    from fwdllm.federation.simulation import Event, SimulationResult
    from fwdllm.federation.status import Status
    from fwdllm.protocol.ledger import Ledger
    from fwdllm.protocol.replay import Verified

# How many clients and how many rejections are listed.
_LISTED = 10
# Between two looks at a run that is watched.
_SECONDS = 5.0


@contextlib.contextmanager
def simulation_progress(rounds: int) -> Iterator[Callable[[Event], None]]:
    """Show a simulation on stderr: a live bar in a terminal, else a line at each evaluation."""
    from fwdllm.federation.simulation import Evaluated

    console = Terminal(stderr=True)
    with progress_bar(console) as bar:
        task = bar.add_task("rounds", total=rounds, status="")
        status = {"loss": "", "held out": ""}

        def follow(event: Event) -> None:
            if isinstance(event, Evaluated):
                status["held out"] = f"held out {event.loss:.3f}"
                if event.accuracy is not None:
                    status["held out"] += f" ({event.accuracy:.1%})"
                if not console.is_terminal:
                    console.print(f"round {event.round}/{rounds}  {_joined(status)}")
            else:
                if event.loss is not None:
                    status["loss"] = f"loss {event.loss:.3f}"
                bar.update(task, completed=event.round)
            bar.update(task, status=_joined(status))

        yield follow


def print_simulation(result: SimulationResult) -> None:
    """The outcome of a simulation on stdout."""
    r = result
    table = Table(show_header=False, box=None, pad_edge=False)
    rows = [
        ("rounds", f"{r.rounds}" + (", stopped early" if r.stopped_early else "")),
        ("clients", f"{r.n_clients:,}"),
        ("contributions", f"{r.n_contributions:,} accepted, {r.n_rejected:,} rejected"),
        ("perturbations", f"{r.n_perturbations:,}"),
        ("client-seconds", f"{r.client_seconds:,.0f} (simulated)"),
        ("bytes up", f"{r.bytes_up:,}, {_per(r.bytes_up, r.n_contributions)} a contribution"),
        ("bytes down", f"{r.bytes_down:,}, {_per(r.bytes_down, r.n_contributions)} a contribution"),
        ("held-out loss", f"{r.loss_before:.4f} -> {r.loss_after:.4f}"),
    ]
    if r.accuracy_before is not None and r.accuracy_after is not None:
        rows.append(("held-out accuracy", f"{r.accuracy_before:.1%} -> {r.accuracy_after:.1%}"))
    if r.epsilon is not None:
        rows.append(("epsilon", f"{r.epsilon:.3g}"))
    if r.head is not None:
        rows.append(("ledger's head", r.head))
    rows += [("adapter", str(r.adapter)), ("run", f"{r.run_dir}, in {r.seconds:.0f} s")]
    for name, value in rows:
        table.add_row(name, value)
    Terminal().print(table, soft_wrap=True)


def status_table(s: Status, now: float) -> Table:
    """How a run stands. now: seconds since 1970."""
    from fwdllm.federation.status import LATELY, RECENT

    def since(then: float) -> str:
        return f"at {then:,.0f} s" if s.simulated else f"{_span(now - then)} ago"

    left = s.rounds_of - s.rounds
    to_go = f", about {_span(s.seconds_a_round * left)} to go" if s.seconds_a_round and left else ""
    rows = [("rounds", f"{s.rounds:,} of {s.rounds_of:,}{to_go}")]
    if s.open_part is not None:
        p = s.open_part
        last = "" if p.last_answer is None else f", the last {since(p.last_answer)}"
        rows.append((f"round {p.round}", f"part {p.part}, asked {since(p.opened)}"))
        rows.append(("", f"{p.answered} of {p.asked} have answered{last}"))
    if s.seconds_a_round is not None:
        rows.append(("a round", f"{_span(s.seconds_a_round)} (median of the last {RECENT})"))
    asked = sum(c.asked_lately > 0 for c in s.clients)
    answered = sum(c.answered_lately > 0 for c in s.clients)
    lately = (
        f"{answered:,} of {asked:,} asked in the last {min(LATELY, s.rounds)} rounds have answered"
    )
    rows.append(("clients", f"{len(s.clients):,} seen; {lately}"))
    silent = sorted((c for c in s.clients if c.is_silent), key=lambda c: -c.asked_lately)
    for c in silent[:_LISTED]:
        name = f"client {c.client}" + (f", node {c.node}" if c.node else "")
        last = f"the last was in round {c.last_round}" if c.last_round else "none before"
        rows.append(("", f"{name}: 0 of {c.asked_lately} answers accepted, {last}"))
    if len(silent) > _LISTED:
        rows.append(("", f"and {len(silent) - _LISTED:,} more"))
    rejected = ", ".join(f"{count:,} {word}" for word, count in s.rejected.items())
    rows += [
        ("rejected", rejected or "none"),
        ("bytes up", f"{s.bytes_up:,}, {s.bytes_up_a_round:,.0f} a round"),
        ("bytes down", f"{s.bytes_down:,}, {s.bytes_down_a_round:,.0f} a round"),
    ]
    if s.loss is not None:
        rows.append(("loss", f"{s.loss:.4f}"))
    if s.held_out is not None:
        accuracy = s.held_out.accuracy
        figures = f"loss {s.held_out.loss:.4f}" + (
            f", {accuracy:.1%}" if accuracy is not None else ""
        )
        rows.append(("held out", f"{figures}, after round {s.held_out.round}"))
    if s.epsilon is not None:
        rows.append(("epsilon", f"{s.epsilon:.3g}"))
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    return table


def watch(table: Callable[[], Table]) -> None:
    """Show a table anew every few seconds until Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt), Live(console=Terminal(), screen=False) as live:
        while True:
            live.update(table(), refresh=True)
            time.sleep(_SECONDS)


def print_ledger(ledger: Ledger) -> None:
    """Rounds, clients and rejections of a run on stdout."""
    from fwdllm.federation.summary import epsilons, summarize
    from fwdllm.protocol.figures import traffic_by_client

    console, config = Terminal(), ledger.meta.config
    rounds = summarize(ledger)
    table = Table(box=None, pad_edge=False)
    for name in ("round", "parts", "answers", "rejected", "perturbations", "loss", "variance"):
        table.add_column(name, justify="right", no_wrap=True)
    optional = {"KB up": True, "KB down": True, "epsilon": config.sigma > 0, "held out": True}
    optional["accuracy"] = any(r.accuracy is not None for r in rounds)
    for name, is_shown in optional.items():
        if is_shown:
            table.add_column(name, justify="right", no_wrap=True)
    for r, spent in zip(rounds, epsilons(ledger), strict=True):
        last = (
            f"{r.bytes_up / 1e3:,.1f}",
            f"{r.bytes_down / 1e3:,.1f}",
            _number(spent, ".3g"),
            _number(r.held_out_loss, ".4f"),
            _number(r.accuracy, ".1%"),
        )
        table.add_row(
            str(r.round),
            str(r.parts),
            f"{r.n_accepted} of {r.n_asked}",
            str(r.n_rejected),
            f"{r.n_perturbations:,}",
            _number(r.loss, ".4f"),
            _number(r.variance, ".3g"),
            *(cell for cell, shown in zip(last, optional.values(), strict=True) if shown),
        )
    console.print(f"{len(rounds)} of {config.rounds} rounds")
    # On a narrow terminal, lines that wrap are better than columns that are cut off.
    Terminal(width=max(console.width, 100)).print(table)
    clients = traffic_by_client(ledger)
    if ledger.meta.shards:
        console.print(f"\nclients' reports are in the ledgers of {ledger.meta.shards} shards")
    else:
        console.print(f"\n{len(clients)} clients were asked; those that received most:")
    busiest = sorted(clients, key=lambda row: -row[3])[:_LISTED]
    for client, asked, accepted, down, up in busiest:
        console.print(
            f"  client {client}: asked {asked} times, {accepted} answers accepted, "
            f"{up:,} bytes up, {down:,} bytes down",
        )
    rejections = ledger.rejections()
    if rejections:
        console.print(f"\n{len(rejections)} contributions were rejected, the last of them:")
    for round, part, client, reason in rejections[-_LISTED:]:
        console.print(
            f"  round {round + 1}, part {part + 1}, client {client}: {reason}",
        )


def print_verified(found: Verified, not_covered: Sequence[str]) -> None:
    """What a check of a ledger has found, on stdout."""
    say(f"{found.rounds} rounds, nothing changed; hash {found.hash.hex() or None}")
    if found.head is not None and found.key is not None:
        say(f"head {found.head.hash.hex()}, of {found.head.entries} entries")
        say(f"signed by key {found.key.hex()}")
        for rotation in reversed(found.rotations):
            say(f"  to entry {rotation.before.entries} by key {rotation.old.hex()}, which named it")
        say("covered, to the last entry: settings, nodes, assignments, answers, rejections,")
        say("  updates, snapshots, evaluations, times and bytes")
    else:
        say("NOT SIGNED: an older version began this run")
        say("covered, against damage: settings, assignments, answers, updates, snapshots")
    for what in not_covered:
        say(f"not covered: {what}")


def not_covered_by(found: Verified, key: bytes | None, *, with_adapter: bool) -> list[str]:
    """What a check of a ledger cannot tell.

    key: the one that was asked for.  with_adapter: adapter.gguf was compared with a replay.
    """
    told, with_key = [], key is not None
    if found.head is None:
        told.append("who wrote it: a forger makes the hashes again")
        told.append("times, bytes, rejections, evaluations, and what was deleted from its end")
    else:
        if not with_key and found.since is None:
            told.append("whose key this is: --key takes the one that the server's owner gives you")
        if not with_key and found.since:
            told.append(f"who wrote the last {found.since} entries, after that head (--key)")
        if with_key and key != found.key:
            told.append("what others wrote, if they have that earlier key")
        if found.since is None:
            told.append(
                "an older or another ledger of the same key: --head takes a head noted before"
            )
        elif found.since:
            told.append("an older copy of this ledger that is newer than that head")
            told.append("bytes down before that head, which later entries may correct")
    if not with_adapter:
        told.append("adapter.gguf: --replay makes it again and compares")
    return [*told, "whether what clients sent, and the server's clock, was true"]


def _span(seconds: float) -> str:
    """A time that has passed: "12 s", "3 min", "5.2 h", "2.5 days"."""
    seconds = max(0.0, seconds)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _number(value: float | None, format: str) -> str:
    return "" if value is None else f"{value:{format}}"


def _per(total: int, count: int) -> str:
    return f"{total / count:,.0f}" if count else "0"


def _joined(status: dict[str, str]) -> str:
    return "  ".join(part for part in status.values() if part)
