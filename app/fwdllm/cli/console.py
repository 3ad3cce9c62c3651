"""Terminal output: progress on stderr, results on stdout, each error as one sentence."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

if TYPE_CHECKING:
    from fwdllm.tuning.tune import Progress as Event
    from fwdllm.tuning.tune import Started, TuneResult


# The first argument of most commands.
Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="GGUF file, or hf://owner/repo/file.gguf.")
]
RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the run.")]
Device = Annotated[str, typer.Option("--device", help="cpu, or cuda for an NVIDIA GPU.")]
Backend = Annotated[
    str,
    typer.Option(
        "--backend", help="auto, fwdllm (our own graphs) or llama.cpp (any model it knows)."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file of settings, or a run's config.json; options win."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run; repeat its other options.")
]
MemoryBudget = Annotated[
    str | None, typer.Option(help='Memory to stay within, such as "1GiB", weights included.')
]


# What controls a terminal or turns the direction of its text, and what no encoding can write.
_UNSAFE = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """A text that may come from a file or a model, with its controls written out: "\\x1b"."""
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def say(
    text: object = "", *, end: str = "\n", file: TextIO | None = None, flush: bool = False
) -> None:
    """Print a text by ``visible``: all plain text of commands is printed here."""
    print(visible(str(text)), end=end, file=file, flush=flush)


class Terminal(Console):
    """A console to which no text is markup, and that shows controls by ``visible``."""

    def __init__(self, *, stderr: bool = False, width: int | None = None) -> None:
        super().__init__(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout; paths become strings."""
    text = json.dumps(value, default=str, allow_nan=False, ensure_ascii=False)
    print(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def explain(error: BaseException) -> str | None:
    """One sentence for an error that a user can fix; None for a bug in this package."""
    from fwdllm.engine.errors import FwdllmError  # slow to import, and errors are rare

    if isinstance(error, FwdllmError):
        return " ".join(str(error).split("\n"))
    if isinstance(error, MemoryError):
        return (
            "there is not enough memory; use a smaller batch, fewer perturbations or --max-tokens"
        )
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}"
    return None


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """For ``warnings.showwarning``: a FwdllmWarning is printed without file and line."""
    from fwdllm.engine.errors import FwdllmWarning

    ours = issubclass(category, FwdllmWarning)
    text = warnings.formatwarning(message, category, filename, lineno, line)
    say(f"fwdllm: {message}" if ours else text.rstrip(), file=file or sys.stderr)


@contextlib.contextmanager
def tuning_progress() -> Iterator[Callable[[Event], None]]:
    """Show a run on stderr: a live bar in a terminal, else a line at each evaluation.

    Yields the function to call with every event.
    """
    console = Terminal(stderr=True)
    with progress_bar(console) as bar:
        yield _Follower(console, bar)


def progress_bar(console: Console) -> Progress:
    """A live bar whose tasks have a field ``status``; shows nothing if this is no terminal."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}", markup=False),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


# What each method does, for one line at the start of a run.
_METHODS = {
    "backprop": "exact gradients, forward and back; --method readout goes forward only",
    "forward-ad": "exact slopes along random directions, by tangents that go forward",
    "central": "slopes along random directions, by differences of losses",
    "forward-difference": "slopes along random directions, by differences to one loss",
    "readout": "exact gradients of what the last layer writes, forward only",
    "activation": "gradients estimated from perturbed activations",
}


# A step of more tokens than this is announced, as nothing is said while it goes. The first tokens
# that are evaluated tell its speed only if they are so many that the start does not matter.
_LARGE_STEP, _TYPICAL = 500_000, 1000


class _Follower:
    """Shows the events of ``tuning_progress``."""

    def __init__(self, console: Console, bar: Progress) -> None:
        self._console, self._bar = console, bar
        self._task = bar.add_task("reading", total=None, status="")
        self._clock = time.perf_counter()
        self._steps = 0
        self._step_tokens = 0
        self._durations: list[float] = []
        self._loss: float | None = None
        self._held_out: float | None = None
        self._speed = 0.0

    def __call__(self, event: Event) -> None:
        from fwdllm.protocol.local import EvalResult, StepResult
        from fwdllm.tuning.tune import Started

        now = time.perf_counter()
        if isinstance(event, Started):
            self._start(event)
        elif isinstance(event, StepResult):
            seconds = now - self._clock
            self._durations.append(seconds)
            self._loss, self._speed = event.loss, event.n_tokens / seconds
            self._show(event.step)
        elif isinstance(event, EvalResult):
            if self._held_out is None:
                self._announce_large_steps(event.n_tokens, now - self._clock)
            self._held_out = event.loss
            self._show(event.step)
            if not self._console.is_terminal:
                self._print_line(event.step)
        self._clock = now

    def _start(self, event: Started) -> None:
        self._steps, self._step_tokens = event.steps, event.step_tokens
        self._bar.update(self._task, description="tuning", total=event.steps, completed=event.step)
        for path in event.damaged:
            self._say(f"passed over {path}, a damaged checkpoint")
        begun = f"resuming after step {event.step}: " if event.step else ""
        self._say(
            f"{begun}{event.n_trainable:,} parameters, {event.n_examples:,} examples, "
            f"{event.n_held_out:,} held out"
        )
        self._say(f"method {event.method}: {_METHODS[event.method]}")

    def _announce_large_steps(self, n_evaluated: int, seconds: float) -> None:
        if self._step_tokens < _LARGE_STEP:
            return
        line = f"every step computes some {self._step_tokens:,} tokens"
        if n_evaluated >= _TYPICAL:
            expected = self._step_tokens / n_evaluated * seconds
            line += f": {expected:,.0f} s at the speed of the evaluation"
        self._say(line)

    def _show(self, step: int) -> None:
        self._bar.update(self._task, completed=step, status=self._status())

    def _status(self) -> str:
        parts = []
        if self._loss is not None:
            parts.append(f"loss {self._loss:.3f}")
        if self._held_out is not None:
            parts.append(f"held out {self._held_out:.3f}")
        if self._speed:
            parts.append(f"{self._speed:,.0f} tokens/s")
        return "  ".join(parts)

    def _print_line(self, step: int) -> None:
        line = f"step {step}/{self._steps}  {self._status()}"
        if self._durations and step < self._steps:
            mean = sum(self._durations) / len(self._durations)
            line += f"  {(self._steps - step) * mean:.0f} s left"
        self._say(line)

    def _say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)


def print_result(result: TuneResult) -> None:
    """The outcome of a run on stdout."""
    change = result.loss_after / result.loss_before - 1
    stopped = "stopped early after" if result.stopped_early else "tuned in"
    say(f"{stopped} {result.steps} steps, {result.seconds:.0f} s, ", end="")
    say(f"{result.tokens_per_s:,.0f} tokens/s, {result.peak_rss_bytes / 1e6:,.0f} MB")
    say(f"held-out loss {result.loss_before:.4f} -> {result.loss_after:.4f} ({change:+.1%})")
    if result.accuracy_before is not None and result.accuracy_after is not None:
        say(f"held-out accuracy {result.accuracy_before:.1%} -> {result.accuracy_after:.1%}")
    say(f"adapter: {result.adapter}")
    say(f"run: {result.run_dir}")
    if result.stopped_early:
        say("the same command with --resume continues it", file=sys.stderr)


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Layer numbers and ranges of them, separated by commas: "0,4-6" is (0, 4, 5, 6)."""
    if text is None:
        return None
    layers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or not (last or first).isdecimal():
            raise typer.BadParameter(f'--layers is like "4-5" or "0,2", not {text!r}')
        layers += range(int(first), int(last or first) + 1)
    return tuple(layers)
