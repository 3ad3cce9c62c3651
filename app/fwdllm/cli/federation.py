"""The commands of federations: ``simulate``, ``ledger`` and ``federate``."""

from __future__ import annotations

import dataclasses
import json as json_module
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
    print_json,
    say,
)
from fwdllm.cli.options import given, takes
from fwdllm.cli.settings_file import read_settings
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.presets import PRESETS

ledger = typer.Typer(help="Look at, check and replay the record of a run.", no_args_is_help=True)
federate = typer.Typer(help="Federations of many machines, with Flower.", no_args_is_help=True)

RunDir = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the run.")]
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
    from fwdllm.federation.fleet import Fleet
    from fwdllm.federation.simulation import Partition
    from fwdllm.federation.simulation import simulate as run_simulation
    from fwdllm.protocol.presets import preset as settings_of
    from fwdllm.resources import parse_bytes
    from fwdllm.tuning.recipes import recipe
    from fwdllm.tuning.run_directory import stop_on_interrupt

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


@ledger.command()
def show(run_dir: RunDir, json: Json = False) -> None:
    """Print a run round by round, and what each client sent and received."""
    from fwdllm.cli.federation_console import print_ledger
    from fwdllm.federation.summary import epsilons, summarize
    from fwdllm.protocol.ledger import NAME, Ledger
    from fwdllm.protocol.replay import verify

    with Ledger(run_dir / NAME) as record:
        verify(record)
        if not json:
            print_ledger(record)
            return
        names = ("client", "asked", "accepted", "bytes_down", "bytes_up")
        rejected = ("round", "part", "client", "reason")
        print_json(
            {
                "settings": record.meta.config.recorded(),
                "rounds": [
                    {**dataclasses.asdict(r), "epsilon": spent}
                    for r, spent in zip(summarize(record), epsilons(record), strict=True)
                ],
                "clients": [dict(zip(names, r, strict=True)) for r in record.traffic_by_client()],
                "rejections": [dict(zip(rejected, r, strict=True)) for r in record.rejections()],
            }
        )


@ledger.command("verify")
def verify_run(
    run_dir: RunDir,
    key: Annotated[
        str | None, typer.Option("--key", metavar="HEX", help="The server's public key.")
    ] = None,
    head: Annotated[
        str | None, typer.Option("--head", metavar="HEX", help="A head that was printed before.")
    ] = None,
    replay: Annotated[
        bool, typer.Option("--replay", help="Make adapter.gguf again and compare.")
    ] = False,
    json: Json = False,
) -> None:
    """Check that nothing in a ledger was changed, and print what that does not tell."""
    from fwdllm.cli.federation_console import not_covered_by, print_verified
    from fwdllm.federation.summary import check_adapter
    from fwdllm.protocol.ledger import NAME, Ledger
    from fwdllm.protocol.replay import verify

    pinned = {"--key": key, "--head": head}
    given_key, given_head = (_digest(name, text) for name, text in pinned.items())
    with Ledger(run_dir / NAME) as record:
        found = verify(record, given_key, given_head)
        if replay:
            check_adapter(record, run_dir / "adapter.gguf")
    told = not_covered_by(found, with_key=key is not None, with_adapter=replay)
    if not json:
        print_verified(found, told)
        return
    print_json(
        {
            "rounds": found.rounds,
            "hash": found.hash.hex() or None,
            "head": found.head.hash.hex() if found.head else None,
            "entries": found.head.entries if found.head else None,
            "key": found.key.hex() if found.key else None,
            "since_head": found.since,
            "not_covered": told,
        }
    )


@ledger.command()
def replay(
    run_dir: RunDir,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the adapter to this GGUF file."),
    ] = None,
    json: Json = False,
) -> None:
    """Make the adapter again from an empty one and the clients' contributions alone."""
    from fwdllm.engine.adapters.io import save_gguf
    from fwdllm.engine.files import check_destination
    from fwdllm.protocol import replay as replay_module
    from fwdllm.protocol.ledger import NAME, Ledger, theta_hash

    if output is not None:
        check_destination(output)
    with Ledger(run_dir / NAME) as record:
        replay_module.verify(record)
        replica = replay_module.replay(record)
    if output is not None:
        save_gguf(replica.space.adapter, output)
    digest = theta_hash(replica.theta).hex()
    if json:
        print_json({"rounds": replica.round, "theta_sha256": digest, "output": output})
    else:
        say(f"{replica.round} rounds replayed to the same adapter, SHA-256 {digest}")


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


def _digest(name: str, text: str | None) -> bytes | None:
    """32 bytes from hexadecimal digits; ConfigError for anything else."""
    try:
        found = None if text is None else bytes.fromhex(text)
    except ValueError:
        found = b""
    if found is not None and len(found) != 32:
        raise ConfigError(f"{name} takes 64 hexadecimal digits, not {text!r}")
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
        NodeConfig(str(data.absolute()), None if model is None else str(model), budget),
    )
