"""Ledgers of shards: what is changed in one, or does not add up, is seen."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from cli_runs import Cli
from ledger_runs import change
from shard_runs import (
    N_CLIENTS,
    Run,
    running,
)

from fwdllm.federation.shards import check_shards
from fwdllm.protocol import wire
from fwdllm.protocol.ledger import NAME, Ledger, LedgerError
from fwdllm.protocol.shards.check import check_shard, check_sums
from fwdllm.protocol.shards.messages import FIRST
from fwdllm.protocol.shards.shard import Shard

# A change of what a shard has


def one_round(folder: Path, noise: bytes | None = None) -> Run:
    run = Run(folder, 2, rounds=1)
    run.open()
    if noise is not None:
        assert 0 in run.shards[0].receive([0], [noise], 1.0)
    run.finish()
    for ledger in (run.ledger, *(shard.ledger for shard in run.shards)):
        ledger.close()
    return run


BATCH = f"client = {FIRST}"


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        (f"DELETE FROM contribution WHERE {BATCH}", "contribution 0 0 4194305 is missing"),
        ("DELETE FROM contribution WHERE client = 4194304", "another sum of round 1, part 1"),
        (
            "UPDATE assignment SET message = CAST(message || '0' AS BLOB)",
            "another order of round 1, part 1",
        ),
        (f"UPDATE contribution SET received = 3 WHERE {BATCH}", "contribution 0 0 4194305 has"),
        ("DELETE FROM entry WHERE name LIKE 'contribution%'", "has been changed"),
    ],
)
def test_a_change_of_a_shards_ledger_is_seen(tmp_path: Path, query: str, sentence: str) -> None:
    run = one_round(tmp_path / "run")
    change(run.paths[1], query)
    with Ledger(tmp_path / "run" / NAME) as root, pytest.raises(LedgerError, match=sentence):
        check_shards(root, tmp_path / "run")


@pytest.mark.parametrize("wrong", ["total", "n_clients", "twice", "a stranger's"])
def test_a_sum_that_its_reports_do_not_add_to_is_seen(tmp_path: Path, wrong: str) -> None:
    """All is signed, as a shard with a bug would."""
    with running(tmp_path / "run", 1, rounds=1) as run:
        run.open()
        shard = run.shards[0]
        clients = shard.outstanding()[:20].tolist()
        run.take(0, clients)
        part = shard._ordered()
        if wrong == "total":
            part.total = part.total + np.uint64(1)
        elif wrong == "n_clients":
            part.answered[-1] = True
        else:
            client = clients[0] if wrong == "twice" else N_CLIENTS
            batch = wire.encode_batch(np.array([client]), run.message(0, clients[0]))
            shard.ledger.accept(0, 0, FIRST + 1, 1.0, batch)
        run.server.receive_shard(0, shard.close(2.0), 2.0)
        assert run.server.close_part(2.0) is not None
        sentence = "add to another sum" if wrong in ("total", "n_clients") else "not of its order"
        with pytest.raises(LedgerError, match=sentence):
            check_sums(run.ledger, [shard.ledger])
        with pytest.raises(LedgerError, match=sentence):
            check_shard(shard.ledger)
        if wrong not in ("total", "n_clients"):
            with pytest.raises(LedgerError, match=sentence):
                Shard(shard.ledger)


def test_the_commands_of_ledgers_know_of_shards(tmp_path: Path, fwdllm: Cli) -> None:
    folder = tmp_path / "run"
    one_round(folder)
    assert "sums of 25 reports" in fwdllm("ledger", "verify", folder).out
    assert fwdllm("ledger", "verify", folder, "--json").json["reports_of_shards"] == 25
    of_one = fwdllm("ledger", "verify", folder / "shard-1", "--json").json
    assert 0 < of_one["reports_of_shards"] < 25
    shown = fwdllm("ledger", "show", folder).out
    assert "25 of 30" in shown
    assert "clients' reports are in the ledgers of 2 shards" in shown
    assert fwdllm("ledger", "show", folder, "--json").json["clients"] == []
    refused = fwdllm("ledger", "backup", folder, tmp_path / "copy")
    assert refused.code == 2
    assert "in the ledgers of 2 shards" in refused.err
    assert fwdllm("ledger", "backup", folder / "shard-1", tmp_path / "copy").code == 0
    (folder / "shard-1" / NAME).unlink()
    missing = fwdllm("ledger", "verify", folder)
    assert missing.code == 2
    assert "there is no ledger at" in missing.err


def test_other_shards_are_seen(tmp_path: Path) -> None:
    run = one_round(tmp_path / "run")
    other = one_round(tmp_path / "other", noise=b"nonsense")
    third = Run(tmp_path / "third", 1)
    third.ledger.close()
    third.shards[0].ledger.close()
    with contextlib.ExitStack() as stack:
        paths = [tmp_path / "run" / NAME, *run.paths, *other.paths, *third.paths]
        root, a, b, c, d, e = (stack.enter_context(Ledger(path)) for path in paths)
        assert check_sums(root, [a, b]) == 25
        with pytest.raises(LedgerError, match="a run with 2 shards"):
            check_sums(root, [a])
        with pytest.raises(LedgerError, match=r"another (order|sum)"):
            check_sums(root, [b, a])
        # The same reports, but not the ledger whose head the root has.
        with pytest.raises(LedgerError, match="another sum"):
            check_sums(root, [c, d])
        with pytest.raises(LedgerError, match=r"of another run: config\.rounds is 4, but 1"):
            check_sums(root, [a, e])
