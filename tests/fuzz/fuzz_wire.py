"""Changed messages of a federation: read alone, and by a server and a client they are sent to."""

from __future__ import annotations

import shutil
import sys
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

from changes import change_bytes
from children import run
from target import Row, Target, refused_or_ok, without_warnings

_KINDS = ("report", "report", "sync", "state", "assignment")
_WORDS = [b"theta", b"round", b"gradient", b"optimizer.", b"step", b"mean"]


def _make(folder: Path) -> None:
    import ledger_runs  # noqa: F401

    import fwdllm.protocol.flower.node  # noqa: F401

    # In a child, as it computes.
    ended = run(lambda: _runs(folder), folder / "log", 120, 1 << 30)
    if ended.code != 0:
        sys.exit(f"no messages: {ended.output}")


def _runs(folder: Path) -> int:
    """For every kind of run, its ledger in the middle of a round, and messages of all kinds."""
    from ledger_runs import N_CLIENTS, RUNS, create, message, operations

    from fwdllm.protocol import wire
    from fwdllm.protocol.server import Server

    for name, settings in RUNS.items():
        run = folder / name
        run.mkdir()
        with create(run / "ledger.sqlite", **settings) as ledger:
            server = Server(ledger)
            work = operations(server)
            while server.round < 2:
                next(work)
            (run / "sync").write_bytes(server.synchronize(0))
            state = wire.encode_state(server.replica.to_arrays())
            (run / "state").write_bytes(wire.encode_many([state]))
            asked = server.open_part(range(N_CLIENTS), 0.0)[0]
            (run / "report").write_bytes(message(server, asked))
            (run / "client").write_text(str(asked.client))
            [(_, assignment), *_] = ledger.assignments(2, 0)
            (run / "assignment").write_bytes(assignment)
    return 0


def _write(random: Random, folder: Path, case: Path) -> str:
    runs = sorted(path for path in folder.iterdir() if path.is_dir())
    source, kind = random.choice(runs), random.choice(_KINDS)
    shutil.copytree(source, case, dirs_exist_ok=True)
    content = (case / kind).read_bytes()
    if random.random() < 0.1:
        content = (random.choice(runs) / random.choice(_KINDS)).read_bytes()
    if random.random() < 0.95:
        content = change_bytes(content, random, _WORDS)
    (case / kind).write_bytes(content)
    (case / "changed").write_text(kind)
    return kind


def _check(_: Any, case: Path) -> list[Row]:
    from ledger_runs import reopen

    from fwdllm.protocol import wire
    from fwdllm.protocol.flower.node import synchronize
    from fwdllm.protocol.replica import Replica
    from fwdllm.protocol.server import Server

    changed = (case / "changed").read_text()
    content = (case / changed).read_bytes()
    decoders = (
        wire.decode_assignment, wire.decode_report, wire.decode_update, wire.decode_state,
        wire.decode_many,
    )  # fmt: skip
    rows = [refused_or_ok("read", lambda d=d: d(content)) for d in decoders]  # type: ignore[misc]
    with closing(reopen(case / "ledger.sqlite")) as ledger:
        if changed == "report":
            server = Server(ledger)
            client = int((case / "client").read_text())
            rows.append(refused_or_ok("receive", lambda: server.receive(client, content, 1.0)))
            rows.append(refused_or_ok("close", lambda: server.close_part(1.0)))
        if changed in ("sync", "state"):
            replica = Replica(ledger.meta.config, ledger.meta.empty_adapter())
            rows.append(refused_or_ok("follow", lambda: synchronize(replica, None, content, 2)))
    return rows


WIRE = Target(_make, _write, _check, without_warnings)
