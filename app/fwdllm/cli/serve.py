"""The command ``serve``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fwdllm.cli.console import Model


def serve(
    model: Model,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="GGUF LoRA or PEFT folder to serve too; repeatable, the first is the default.",
        ),
    ] = None,
    adapter_folder: Annotated[
        Path | None, typer.Option(help="Folder that requests may load adapters from.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to bind; any but a local one needs --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="FWDLLM_API_KEY", help="Needed for all requests.", show_default="none is needed"
        ),
    ] = None,
    state: Annotated[Path, typer.Option(help="Folder for files, jobs and adapters.")] = Path(
        "fwdllm-state"
    ),
    runs: Annotated[Path | None, typer.Option(help="Folder whose runs the page shows too.")] = None,
    memory_budget: Annotated[
        str | None,
        typer.Option(
            help='Memory of a tuning job, such as "4GiB".', show_default="half of the machine's"
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens of a conversation.", min=16, show_default="4096")
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ORIGIN",
            help='Site whose pages may send requests, such as "http://localhost:5173"; repeatable.',
        ),
    ] = None,
) -> None:
    """Serve a model on a local HTTP endpoint, with a page to watch and start tuning."""
    try:
        from fwdllm.http.serve import run
    except ImportError as error:
        raise typer.BadParameter(
            f'the server needs {error.name}; pip install "fwdllm[server]"'
        ) from error
    run(
        model,
        adapter or [],
        adapter_folder,
        host,
        port,
        api_key,
        state,
        runs,
        memory_budget,
        context,
        allow_origin or [],
    )
