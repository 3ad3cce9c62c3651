"""The commands of federations: ``simulate`` and ``federate``."""

from __future__ import annotations

import dataclasses
import json as json_module
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from fwdllm.cli.console import (
    Config,
    Device,
    Json,
    MemoryBudget,
    Model,
    Resume,
    RunDir,
    print_json,
    say,
)
from fwdllm.cli.options import given, takes
from fwdllm.cli.settings_file import read_settings
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.presets import PRESETS

federate = typer.Typer(help="Federations of many machines, with Flower.", no_args_is_help=True)

Preset = Annotated[str, typer.Option(help=f"{', '.join(PRESETS)}.")]
PerRound = Annotated[
    int | None, typer.Option(help="Clients asked at a time.", show_default="the preset's")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Any setting; docs/federated.md lists them."),
]


@takes(LoRAConfig)
def simulate(
    model: Model,
    data: Annotated[Path, typer.Argument(metavar="DATA", help="JSONL file of examples.")],
    *,
    run_dir: Annotated[Path, typer.Option("--run-dir", help="Folder for ledger and adapter.")],
    preset: Preset = "fwdllm",
    rounds: Annotated[int | None, typer.Option(help="Updates in all.", show_default="50")] = None,
    clients: Annotated[int, typer.Option(help="Clients the data is spread over.")] = 100,
    per_round: PerRound = None,
    dirichlet: Annotated[
        float | None,
        typer.Option(help="Spread labels by Dirichlet of this alpha.", show_default="iid"),
    ] = None,
    user_field: Annotated[
        str | None, typer.Option(help="A client for each value of this field instead.")
    ] = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval", help="JSONL file to evaluate on.")
    ] = None,
    dropout: Annotated[float, typer.Option(help="Share of requests never answered.")] = 0.0,
    stragglers: Annotated[float, typer.Option(help="Share of clients 20 times as slow.")] = 0.0,
    hostile: Annotated[float, typer.Option(help="Share of clients that attack.")] = 0.0,
    channel: Annotated[
        str | None, typer.Option(help="awgn: scalars add up over the air, with noise.")
    ] = None,
    snr_db: Annotated[
        float | None, typer.Option(help="A client's power over the channel's noise, in decibels.")
    ] = None,
    attack: Annotated[
        str | None,
        typer.Option(
            help="How: flip, scale, constant, collude, or what docs/federated.md lists.",
            show_default="a mixture",
        ),
    ] = None,
    client_speed: Annotated[
        float, typer.Option(help="Lane-tokens a second of the median client.")
    ] = 1000.0,
    seed: Annotated[
        int | None, typer.Option(help="Fixes clients, batches and directions.", show_default="0")
    ] = None,
    setting: Set = None,
    config: Config = None,
    device: Device = "cpu",
    memory_budget: MemoryBudget = None,
    resume: Resume = False,
    json: Json = False,
    **settings: Any,
) -> None:
    """Simulate a federation in this process. Ctrl-C stops it after the round."""
    from fwdllm.cli.federation_console import print_simulation, simulation_progress
    from fwdllm.federation.channel import Channel
    from fwdllm.federation.fleet import Fleet
    from fwdllm.federation.simulation import Partition
    from fwdllm.federation.simulation import simulate as run_simulation
    from fwdllm.protocol.presets import preset as settings_of
    from fwdllm.resources import parse_bytes
    from fwdllm.tuning.recipes import recipe
    from fwdllm.tuning.run_directory import stop_on_interrupt

    if (channel is None) != (snr_db is None):
        raise ConfigError("--channel and --snr-db are given together")
    saved = read_settings(config, federation=FederationConfig, lora=LoRAConfig)
    options = {"rounds": rounds, "per_round": per_round, "seed": seed}
    changes = {name: value for name, value in options.items() if value is not None}
    federation = settings_of(
        preset, **{"rounds": 50, **saved["federation"], **changes, **parse_settings(setting)}
    )
    shape = {**saved["lora"], **given(LoRAConfig, settings)}
    lora = dataclasses.replace(recipe(model, data, federation.method).lora, **shape)
    with stop_on_interrupt() as should_stop, simulation_progress(federation.rounds) as on_event:
        result = run_simulation(
            model,
            data,
            run_dir,
            federation,
            lora=lora,
            partition=Partition(clients, dirichlet, user_field),
            fleet=Fleet(
                tokens_per_s=client_speed,
                dropout=dropout,
                stragglers=stragglers,
                hostile=hostile,
                attack=attack,
            ),
            channel=None if channel is None or snr_db is None else Channel(channel, snr_db),
            eval_data=eval_data,
            resume=resume,
            device=device,
            memory_budget=parse_bytes(memory_budget) if memory_budget else None,
            on_event=on_event,
            should_stop=should_stop,
        )
    if json:
        print_json(dataclasses.asdict(result))
    else:
        print_simulation(result)


@federate.command()
@takes(LoRAConfig)
def init(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    *,
    model: Annotated[str, typer.Option("--model", help="GGUF file.")],
    data: Annotated[Path, typer.Option("--data", help="JSONL like the nodes', for its labels.")],
    preset: Preset = "spry",
    rounds: Annotated[int, typer.Option(help="Updates in all.")] = 100,
    per_round: PerRound = None,
    eval_data: Annotated[
        Path | None, typer.Option("--eval", help="JSONL file the server evaluates on.")
    ] = None,
    min_nodes: Annotated[int, typer.Option(help="Nodes the server waits for.")] = 2,
    setting: Set = None,
    **settings: Any,
) -> None:
    """Write a Flower app directory that tunes a model on the nodes' data."""
    from fwdllm.federation.app_directory import init as write_app
    from fwdllm.protocol.presets import preset as settings_of
    from fwdllm.tuning.recipes import recipe

    changes = {} if per_round is None else {"per_round": per_round}
    changes |= parse_settings(setting)
    method = settings_of(preset, **{"rounds": rounds, **changes}).method
    path = write_app(
        folder,
        model,
        data,
        preset,
        rounds=rounds,
        lora=dataclasses.replace(recipe(model, data, method).lora, **given(LoRAConfig, settings)),
        eval_data=eval_data,
        min_nodes=min_nodes,
        changes=changes,
    )
    say(f"wrote {path}; start it with: flwr run {path} YOUR-SUPERLINK")


@federate.command()
def status(
    run_dir: RunDir,
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every five seconds, until Ctrl-C.")
    ] = False,
    json: Json = False,
) -> None:
    """Say how a run stands, also while it goes on; nothing is verified, and nothing written."""
    from fwdllm.cli.console import Terminal
    from fwdllm.cli.federation_console import status_table
    from fwdllm.cli.federation_console import watch as show
    from fwdllm.federation.status import Status, status_of
    from fwdllm.protocol.ledger import NAME, Ledger

    def look() -> Status:
        with Ledger(run_dir / NAME) as record:  # anew each time: it stays as it was when opened
            return status_of(record)

    if json and watch:
        raise ConfigError("--json is printed once; --watch is for a terminal")
    if json:
        print_json(dataclasses.asdict(look()))
    elif watch:
        show(lambda: status_table(look(), time.time()))
    else:
        Terminal().print(status_table(look(), time.time()), soft_wrap=True)


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """Settings from NAME=VALUE texts; a value is parsed as JSON if it is JSON, else a string."""
    found: dict[str, Any] = {}
    for text in settings or []:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--set wants NAME=VALUE, not {text!r}")
        try:
            found[name] = json_module.loads(value)
        except ValueError:
            found[name] = value
    return found


@federate.command()
def node(
    *,
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="SuperLink's address.")],
    data: Annotated[Path, typer.Option("--data", help="JSONL file of the node's examples.")],
    model: Annotated[
        Path | None, typer.Option("--model", help="GGUF file.", show_default="the app's")
    ] = None,
    root_certificates: Annotated[
        Path | None,
        typer.Option(help="PEM file of SuperLink's authority.", show_default="the system's"),
    ] = None,
    auth_supernode_private_key: Annotated[
        Path | None, typer.Option(help="The node's key, if SuperLink asks for one.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Without TLS.")] = False,
    secure: Annotated[
        bool, typer.Option("--secure", help="Only in runs whose server sees sums alone.")
    ] = False,
    memory_budget: MemoryBudget = None,
) -> None:
    """Take part as a node that keeps model and data between messages. Ctrl-C ends it."""
    try:
        from fwdllm.protocol.flower.node import NodeConfig
        from fwdllm.protocol.flower.supernode import Link, run
    except ImportError as error:  # another version of Flower may have it elsewhere
        raise ConfigError(
            f"a node needs Flower 1.42 ({error}): pip install 'fwdllm[federation]', or use "
            "flower-supernode"
        ) from error
    from fwdllm.resources import parse_bytes

    budget = parse_bytes(memory_budget) if memory_budget else None
    run(
        Link(superlink, root_certificates, auth_supernode_private_key, insecure),
        NodeConfig(str(data.absolute()), None if model is None else str(model), budget, secure),
    )
