"""``fwdllm bench``: options in, measurements out. What is slow to import is imported inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fwdllm.cli.console import Backend, Model, Terminal, parse_layers, print_json, say
from fwdllm.resources import parse_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.status import Status

app = typer.Typer(
    help="Measure this engine, and others beside it, on this machine.", no_args_is_help=True
)

Rounds = Annotated[int, typer.Option("--rounds", help="Times each side works; medians are shown.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE.png", help="Draw the result.")]
Save = Annotated[
    Path | None, typer.Option("--save", metavar="FILE.json", help="Keep the result in a file.")
]
Compare = Annotated[
    Path | None,
    typer.Option("--compare", metavar="FILE.json", help="Print new / old of a kept result."),
]


@app.command("make-model")
def make_model(
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="File to write.")],
    shape: Annotated[str, typer.Option("--shape", help="Model, or architecture, to imitate.")],
    type: Annotated[str, typer.Option("--type", help="Tensor type, such as Q4_0.")] = "Q4_0",
    seed: Annotated[int, typer.Option(help="Of the weights.")] = 0,
) -> None:
    """Write a model of random weights, to measure or test without a download."""
    from fwdllm.bench.architectures import make_named
    from fwdllm.bench.shapes import type_named

    make_named(output, shape, type_named(type), seed)
    say(output)


@app.command()
def prompt(
    model: Model,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    lanes: Annotated[
        int, typer.Option(help="Variants of an adapter in one pass; 1 is no adapter.")
    ] = 1,
    backend: Backend = "fwdllm",
    peer: Annotated[
        str | None,
        typer.Option(help="llama.cpp, plain (as many copies, no adapter), or fwdllm."),
    ] = None,
    rounds: Rounds = 5,
    json: Json = False,
    plot: Plot = None,
    save: Save = None,
    compare: Compare = None,
) -> None:
    """Tokens per second of one prompt of random tokens."""
    from fwdllm.bench.measure import measure_prompt
    from fwdllm.bench.report import render_sides
    from fwdllm.hub import local_path

    finish = _prepare("prompt", json, plot, save, compare)
    with _status():
        result = measure_prompt(local_path(model), tokens, lanes, backend, peer, rounds)
    finish(result, render_sides)


@app.command()
def step(
    model: Model,
    examples: Annotated[int, typer.Option(help="Sequences of the batch.")] = 4,
    tokens: Annotated[int, typer.Option(help="Length of each.")] = 64,
    perturbations: Annotated[int, typer.Option("--perturbations", "-k", help="Directions.")] = 8,
    method: Annotated[
        str, typer.Option(help="forward-ad, central, forward-difference or backprop.")
    ] = "forward-ad",
    rank: Annotated[int, typer.Option(help="Rank of the LoRA factors.")] = 8,
    targets: Annotated[
        str, typer.Option(help="Tensors to adapt; all: every linear layer.")
    ] = "attn_q,attn_v",
    scope: Annotated[
        str | None,
        typer.Option(help='Layers to perturb, such as "4-5" or "0,2".', show_default="all"),
    ] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help='Resident memory to keep to, such as "1GiB".')
    ] = None,
    backend: Backend = "fwdllm",
    peer: Annotated[
        str | None,
        typer.Option(
            help="plain (as many rows, no adapter), central (the same by differences), unscoped "
            "(the same without --scope), fwdllm (beside --backend llama.cpp); by differences too, "
            "llama.cpp (by its C interface, the model kept open), llama-cpp-python (a new Llama "
            "for every lane) or peft (PyTorch)."
        ),
    ] = None,
    rounds: Rounds = 5,
    json: Json = False,
    plot: Plot = None,
    save: Save = None,
    compare: Compare = None,
) -> None:
    """Time, memory and breakdown of one step of tuning."""
    from fwdllm.bench.measure import StepConfig, measure_step
    from fwdllm.bench.report import render_sides
    from fwdllm.hub import local_path

    finish = _prepare("step", json, plot, save, compare)
    config = StepConfig(
        examples=examples,
        tokens=tokens,
        perturbations=perturbations,
        method=method,
        rank=rank,
        targets=None if targets == "all" else tuple(targets.split(",")),
        scope=parse_layers(scope),
        memory_budget=parse_bytes(memory_budget) if memory_budget is not None else None,
        backend=backend,
    )
    with _status():
        result = measure_step(local_path(model), config, peer, rounds)
    finish(result, render_sides)


@app.command()
def kernels(
    isa: Annotated[
        list[str] | None, typer.Option(help="Instruction set.", show_default="the best one")
    ] = None,
    type: Annotated[
        list[str] | None,
        typer.Option(help="Tensor type of products.", show_default="the common ones"),
    ] = None,
    rows: Annotated[
        list[int] | None,
        typer.Option(help="Rows of products.", show_default="512, on a GPU 1 to 4096"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda for a GPU.")] = "cpu",
    rounds: Rounds = 5,
    json: Json = False,
    plot: Plot = None,
    save: Save = None,
    compare: Compare = None,
) -> None:
    """Speed of each kernel, beside what this machine can do. Repeat options to widen it."""
    from fwdllm.bench.kernels import measure_kernels
    from fwdllm.bench.report import render_kernels
    from fwdllm.engine.devices import kernels_of

    finish = _prepare("kernels", json, plot, save, compare)
    kernels_of(device)
    with _status() as status:
        if device == "cuda":
            result = _gpu_kernels(isa or (), type or (), rows or (), rounds, status.update)
        else:
            result = measure_kernels(isa or (), type or (), rows or (512,), rounds, status.update)
    finish(result, render_kernels)


def _gpu_kernels(
    isa: Sequence[str],
    types: Sequence[str],
    rows: Sequence[int],
    rounds: int,
    on_case: Callable[[str], None],
) -> dict[str, Any]:
    from fwdllm.bench.gpu_kernels import DEFAULT_ROWS, DEFAULT_TYPES, measure_gpu_kernels
    from fwdllm.bench.shapes import type_named
    from fwdllm.engine.errors import ConfigError

    if isa:
        raise ConfigError("--isa is for device cpu")
    if rounds < 1 or any(n < 1 for n in rows):
        raise ConfigError("--rounds and --rows must be at least 1")
    chosen = [type_named(name) for name in types] or DEFAULT_TYPES
    return measure_gpu_kernels(chosen, rows or DEFAULT_ROWS, rounds, on_case)


@app.command()
def protocol(
    contributions: Annotated[int, typer.Option(help="Clients of a round.")] = 10_000,
    perturbations: Annotated[
        int, typer.Option("--perturbations", "-k", help="Scalars of each.")
    ] = 1,
    reports: Annotated[
        int | None,
        typer.Option(help="Instead: reports of a round along shared directions, by processes."),
    ] = None,
    processes: Annotated[int, typer.Option(help="That take --reports.")] = 1,
    rounds: Rounds = 3,
    json: Json = False,
    save: Save = None,
    compare: Compare = None,
) -> None:
    """A server's time for a round of a 7B adapter, beside generating its directions alone."""
    from fwdllm.bench.protocol import measure_protocol
    from fwdllm.bench.report import render_protocol, render_shards
    from fwdllm.bench.shards import measure_shards

    finish = _prepare("protocol", json, None, save, compare)
    if reports is not None:
        with _status():
            result = measure_shards(reports, processes, perturbations, rounds)
        finish(result, render_shards)
        return
    with _status():
        result = measure_protocol(contributions, perturbations, rounds)
    finish(result, render_protocol)


@app.command()
def serve(
    model: Annotated[
        Path | None, typer.Option("--model", help="GGUF file.", show_default="the bundled one")
    ] = None,
    clients: Annotated[int, typer.Option(help="At once.")] = 50,
    seconds: Annotated[float, typer.Option(help="Of each of the two parts of a round.")] = 60.0,
    rounds: Annotated[int, typer.Option(help="Times both parts are measured.")] = 1,
    json: Json = False,
    save: Save = None,
    compare: Compare = None,
) -> None:
    """Latencies of fwdllm serve under load, without and with a tuning job."""
    from fwdllm.bench.report import render_serve
    from fwdllm.bench.serve import measure_serve

    finish = _prepare("serve", json, None, save, compare)
    with _status():
        result = measure_serve(model, clients, seconds, rounds)
    finish(result, render_serve)


@app.command()
def attack(
    model: Annotated[
        Path | None, typer.Option("--model", help="GGUF file.", show_default="the bundled one")
    ] = None,
    clients: Annotated[int, typer.Option(help="Ordinary ones, at once.")] = 20,
    seconds: Annotated[float, typer.Option(help="Of each of the two parts of a round.")] = 15.0,
    rounds: Annotated[int, typer.Option(help="Times both parts are measured.")] = 4,
    json: Json = False,
    save: Save = None,
    compare: Compare = None,
) -> None:
    """Latencies of fwdllm serve for ordinary clients, without and with attackers."""
    from fwdllm.bench.attack import measure_attack
    from fwdllm.bench.report import render_attack

    finish = _prepare("attack", json, None, save, compare)
    with _status():
        result = measure_attack(model, clients, seconds, rounds)
    finish(result, render_attack)


def _status() -> Status:
    """What is shown on stderr while a measurement runs, if that is a terminal."""
    return Terminal(stderr=True).status("measuring")


Render = Callable[[Mapping[str, Any]], "RenderableType"]


def _prepare(
    command: str, json: bool, plot: Path | None, save: Path | None, compare: Path | None
) -> Callable[[dict[str, Any], Render], None]:
    """Check the files before the work; the returned function shows and keeps its result."""
    from fwdllm.bench import report
    from fwdllm.engine.files import check_destination

    old = report.load(compare, command) if compare else None
    for path in filter(None, (plot, save)):
        check_destination(path)

    def finish(result: dict[str, Any], render: Render) -> None:
        if save:
            report.save(result, save)
        if plot:
            from fwdllm.bench.pictures import draw

            draw(result, plot)
        if json:
            print_json({**result, "compare": report.compare(result, old)} if old else result)
            return
        report.show(render(result))
        if old and compare:
            report.show(report.render_comparison(result, old, compare))

    return finish
