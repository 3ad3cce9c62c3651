"""The commands of ledgers, ``fwdllm ledger``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from fwdllm.cli.console import Json, RunDir, print_json, say
from fwdllm.engine.errors import ConfigError

ledger = typer.Typer(
    help="Look at, check, copy and replay the record of a run.", no_args_is_help=True
)


@ledger.command()
def show(run_dir: RunDir, json: Json = False) -> None:
    """Print a run round by round, and what each client sent and received."""
    from fwdllm.cli.federation_console import print_ledger
    from fwdllm.federation.summary import epsilons, summarize
    from fwdllm.protocol.figures import traffic_by_client
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
                "clients": [dict(zip(names, r, strict=True)) for r in traffic_by_client(record)],
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
    from fwdllm.federation.shards import check_shards
    from fwdllm.federation.summary import check_adapter
    from fwdllm.protocol.ledger import NAME, Ledger
    from fwdllm.protocol.replay import verify

    pinned = {"--key": key, "--head": head}
    given_key, given_head = (_digest(name, text) for name, text in pinned.items())
    with Ledger(run_dir / NAME) as record:
        found = verify(record, given_key, given_head)
        n_shards, n_reports = record.meta.shards, check_shards(record, run_dir)
        if replay:
            check_adapter(record, run_dir / "adapter.gguf")
    told = not_covered_by(found, given_key, with_adapter=replay)
    if not json:
        print_verified(found, told)
        if n_shards:
            say(f"sums of {n_reports:,} reports: they are what the ledgers of shards add to")
        return
    print_json(
        {
            "rounds": found.rounds,
            "hash": found.hash.hex() or None,
            "head": found.head.hash.hex() if found.head else None,
            "entries": found.head.entries if found.head else None,
            "key": found.key.hex() if found.key else None,
            "earlier_keys": [rotation.old.hex() for rotation in found.rotations],
            "since_head": found.since,
            "reports_of_shards": n_reports if n_shards else None,
            "not_covered": told,
        }
    )


@ledger.command()
def backup(
    run_dir: RunDir,
    destination: Annotated[Path, typer.Argument(metavar="DEST", help="A new folder.")],
    with_key: Annotated[
        bool, typer.Option("--with-key", help="Copy the private key: the run can go on there.")
    ] = False,
    json: Json = False,
) -> None:
    """Copy a ledger to a new folder, also while its run goes on, and check the copy."""
    from fwdllm.federation.backup import back_up, missing_to_resume

    found = back_up(run_dir, destination, with_key=with_key)
    missing = missing_to_resume(found, with_key=with_key)
    head = found.head.hash.hex() if found.head else None
    if json:
        told = {"rounds": found.rounds, "head": head, "key": found.key.hex() if found.key else None}
        print_json({**told, "with_key": with_key, "missing_to_resume": missing})
        return
    say(f"{found.rounds} rounds, nothing changed; head {head or 'none, as it is not signed'}")
    for what in missing:
        say(f"to go on from it, there is missing: {what}")
    if with_key:
        say("let the run go on in one place only: two would sign two histories")


@ledger.command("rotate-key")
def rotate_key(run_dir: RunDir, json: Json = False) -> None:
    """Sign from now on with a new key, which the old one names in the ledger. Not while it runs."""
    from fwdllm.protocol import keys
    from fwdllm.protocol.ledger import NAME, Ledger
    from fwdllm.protocol.replay import verify

    with Ledger(run_dir / NAME, writable=True) as record:
        before = verify(record).key
        after = record.rotate_key()
        assert before is not None and record.journal is not None
        head = record.journal.head
    if json:
        told = {"key": after.hex(), "key_before": before.hex()}
        print_json({**told, "head": head.hash.hex(), "entries": head.entries})
        return
    say(f"signed from entry {head.entries} on by key {after.hex()}")
    say(f"before it, by key {before.hex()}, whose file is gone")
    say(f"head {head.hash.hex()}")
    say(f"the private half is in {keys.file_of(run_dir / NAME)}")


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


def _digest(name: str, text: str | None) -> bytes | None:
    """32 bytes from hexadecimal digits; ConfigError for anything else."""
    try:
        found = None if text is None else bytes.fromhex(text)
    except ValueError:
        found = b""
    if found is not None and len(found) != 32:
        raise ConfigError(f"{name} takes 64 hexadecimal digits, not {text!r}")
    return found
