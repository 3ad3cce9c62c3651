"""Copies of ledgers that a server is writing to, and runs that go on from them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ledger_runs
import pytest
from cli_runs import MODEL, Cli, pirate_rows, write_rows
from ledger_runs import create, eventful, final, finish, reopen

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.backup import back_up
from fwdllm.federation.simulation import Partition, simulate
from fwdllm.protocol import keys
from fwdllm.protocol.ledger import NAME, Ledger, LedgerError
from fwdllm.protocol.presets import preset
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.server import Server

ROUNDS = 150
WRITER = """
import sys
from pathlib import Path
from ledger_runs import finish, reopen
from fwdllm.protocol.server import Server

finish(Server(reopen(Path(sys.argv[1]))))
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    eventful(folder / NAME)
    return folder


@contextmanager
def writing(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server in a process of its own, in the middle of a run of ``ROUNDS``."""
    folder.mkdir()
    create(folder / NAME, rounds=ROUNDS, snapshot_every=7).close()
    command = [sys.executable, "-c", WRITER, folder / NAME]
    # Where it finds ledger_runs.
    with subprocess.Popen(command, cwd=Path(ledger_runs.__file__).parent) as writer:
        try:
            while n_rounds(folder) < 5:
                assert writer.poll() is None
                time.sleep(0.01)
            yield writer
        finally:
            writer.kill()


def n_rounds(folder: Path) -> int:
    with Ledger(folder / NAME) as ledger:
        return ledger.n_rounds


def test_copies_of_a_ledger_that_is_written_to_are_whole_and_go_on_to_the_same_bits(
    tmp_path: Path,
) -> None:
    want = final(tmp_path, rounds=ROUNDS, snapshot_every=7)
    rounds = []
    with writing(tmp_path / "run") as writer:
        for i in range(3):
            found = back_up(tmp_path / "run", tmp_path / f"copy {i}", with_key=True)
            rounds.append(found.rounds)
        assert writer.poll() is None
        back_up(tmp_path / "run", tmp_path / "last", with_key=True)
        writer.kill()
        writer.wait()
        assert n_rounds(tmp_path / "run") < ROUNDS  # it was not held up to its end, nor at its end
    assert rounds == sorted(rounds)
    assert len(set(rounds)) > 2
    for folder in (tmp_path / "copy 0", tmp_path / "last"):
        with reopen(folder / NAME) as ledger:
            assert finish(Server(ledger)) == want
            verify(ledger)
            assert replay(ledger).theta.tobytes() == want


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_leaves_no_ledger_or_a_whole_one(tmp_path: Path) -> None:
    chance = random.Random(1)
    outcomes: set[bool] = set()
    with writing(tmp_path / "run"):
        seconds = 0.0
        for i in range(20):
            began = time.monotonic()
            copy = tmp_path / f"copy {i % 7}"
            child = os.fork()
            if child == 0:
                with suppress(BaseException):
                    back_up(tmp_path / "run", copy, with_key=True)
                os._exit(0)
            if i % 5:
                time.sleep(chance.uniform(0, 1.2 * seconds))
                os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            seconds = seconds if i % 5 else time.monotonic() - began  # the ledger grows
            outcomes.add((copy / NAME).exists())
            if (copy / NAME).exists():
                with Ledger(copy / NAME) as ledger:
                    found = verify(ledger)
                    assert found.key is not None
                    keys.read(copy / NAME, found.key)
                shutil.rmtree(copy)
    assert outcomes == {False, True}
    time.sleep(1.1)  # what is younger may be of an attempt that goes on
    for i in range(7):  # what was left of an attempt is in the way of none
        if (tmp_path / f"copy {i}").exists():
            back_up(tmp_path / "run", tmp_path / f"copy {i}", with_key=True)
            names = {file.name for file in (tmp_path / f"copy {i}").iterdir()}
            assert names == {NAME, f"{NAME}.key"}


def test_a_copy_is_one_file_of_its_owners_and_the_key_only_if_it_is_asked_for(run: Path) -> None:
    bare, whole = run.parent / "bare", run.parent / "whole"
    found = back_up(run, bare)
    assert found == back_up(run, whole, with_key=True)
    assert [file.name for file in bare.iterdir()] == [NAME]
    assert sorted(file.name for file in whole.iterdir()) == [NAME, f"{NAME}.key"]
    for file in (*bare.iterdir(), *whole.iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    secret = keys.read(run / NAME).private_bytes_raw()
    assert secret not in (bare / NAME).read_bytes()
    assert keys.read(whole / NAME).private_bytes_raw() == secret
    with reopen(bare / NAME) as ledger, pytest.raises(LedgerError, match="key is missing"):
        ledger.client_of("west")
    with reopen(whole / NAME) as ledger:
        assert ledger.client_of("west") == 2


def test_what_a_killed_server_wrote_last_is_copied(run: Path) -> None:
    killed = run.parent / "killed"
    with reopen(run / NAME) as ledger:
        ledger.client_of("west")
        shutil.copytree(run, killed)
    assert (killed / f"{NAME}-wal").stat().st_size > 0
    back_up(killed, run.parent / "copy")
    with Ledger(run.parent / "copy" / NAME) as ledger:
        assert ledger.query("SELECT count(*) FROM node") == [(3,)]


def test_nothing_is_written_over(run: Path) -> None:
    copy = run.parent / "copy"
    copy.mkdir()
    back_up(run, copy)  # an empty one will do
    for wrong in (copy, run, run / NAME):
        with pytest.raises(ConfigError, match="is not an empty folder"):
            back_up(run, wrong)
    keyed = run.parent / "keyed"
    keyed.mkdir()
    (keyed / f"{NAME}.key").write_bytes(b"somebody's")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        back_up(run, keyed)
    with pytest.raises(LedgerError, match="there is no ledger"):
        back_up(run.parent / "nowhere", run.parent / "other")
    assert not (run.parent / "other").exists()


def test_a_changed_ledger_and_a_wrong_key_are_not_copied(run: Path) -> None:
    copy = run.parent / "copy"
    (run / f"{NAME}.key").write_bytes(keys.new_key())
    with pytest.raises(ConfigError, match=r"ledger.sqlite.key is not the key that has signed"):
        back_up(run, copy, with_key=True)
    with reopen(run / NAME) as ledger:
        ledger.query("UPDATE evaluation SET accuracy = 0.99 WHERE round = 3")
    with pytest.raises(LedgerError) as told:
        back_up(run, copy)
    assert str(told.value) == f"evaluation 3 has been changed in {run / NAME}"
    assert list(copy.iterdir()) == []


def test_a_run_moved_to_another_folder_gives_the_same_adapter(tmp_path: Path) -> None:
    """Stopped, backed up, and resumed from the copy alone."""
    data = write_rows(tmp_path / "data.jsonl", pirate_rows(40))
    config = preset("spry", rounds=4, per_round=2, batch_size=2, perturbations=2, max_tokens=32)
    rounds: list[object] = []

    def go_on(folder: Path, *, stop_after: int = 9, resume: bool = False) -> None:
        rounds.clear()
        simulate(
            MODEL,
            data,
            folder,
            config,
            lora=LoRAConfig(2, 4),
            partition=Partition(4),
            resume=resume,
            on_event=rounds.append,
            should_stop=lambda: len(rounds) > stop_after,
        )

    go_on(tmp_path / "whole")
    go_on(tmp_path / "run", stop_after=2)
    back_up(tmp_path / "run", tmp_path / "moved", with_key=True)
    shutil.rmtree(tmp_path / "run")
    with Ledger(tmp_path / "moved" / NAME) as ledger:
        assert 0 < ledger.n_rounds < 4
    go_on(tmp_path / "moved", resume=True)
    adapters = [(tmp_path / name / "adapter.gguf").read_bytes() for name in ("whole", "moved")]
    assert adapters[0] == adapters[1]


def test_the_command_says_what_is_missing(fwdllm: Cli, run: Path) -> None:
    done = fwdllm("ledger", "backup", run, run.parent / "a")
    assert done.code == 0
    assert "ledger.sqlite.key, the private key that signs (--with-key)" in done.out
    assert "one place only" not in done.out
    told = fwdllm("ledger", "backup", run, run.parent / "b", "--with-key", "--json").json
    assert (told["rounds"], told["with_key"]) == (3, True)
    assert not any("private key" in what for what in told["missing_to_resume"])
    assert told["head"] == fwdllm("ledger", "verify", run.parent / "b", "--json").json["head"]
    again = fwdllm("ledger", "backup", run, run.parent / "b")
    assert (again.code, again.out) == (2, "")
    assert "name a new one" in again.err
