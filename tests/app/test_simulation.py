"""Federations in one process: partitions, devices, killing and resuming, and the commands."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from cli_runs import Cli, make_cli, start_cli

from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError, DataError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.app_directory import init
from fwdllm.federation.fleet import MIXED, Fleet
from fwdllm.federation.partition import by_user, dirichlet, iid
from fwdllm.federation.simulation import Partition, SimulationResult, simulate
from fwdllm.federation.summary import summarize
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.figures import traffic_by_client
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.presets import PRESETS, preset
from fwdllm.protocol.replay import replay, verify

LORA = LoRAConfig(2, 4)
SMALL = {"per_round": 4, "batch_size": 2, "max_tokens": 24, "eval_every": 0}


@pytest.fixture(scope="module")
def data(bundled: Path) -> Path:
    return bundled.parent / "pirate.train.jsonl"


@pytest.fixture(scope="module")
def few(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few held-out examples."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    lines = (bundled.parent / "pirate.valid.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:8]) + "\n", encoding="utf-8")
    return path


def theta_of(run_dir: Path) -> bytes:
    """The hash of the last adapter, of a ledger that verifies and replays."""
    with Ledger(run_dir / NAME) as ledger:
        verify(ledger)
        replay(ledger)
        return ledger.rounds()[-1].theta


def test_a_run_whose_folder_was_deleted_stops(bundled: Path, few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def replace(_: object) -> None:
        if folder.exists():
            shutil.rmtree(folder)

    config = preset("mezo", rounds=3, **SMALL)
    with pytest.raises(ConfigError, match="was deleted or replaced"):
        simulate(bundled, few, folder, config, lora=LORA, partition=Partition(2), on_event=replace)
    assert not folder.exists()


# Partitions


def labelled(n: int) -> list[Example]:
    return [Example(text=str(i), label="abcd"[i % 4], line=i + 1) for i in range(n)]


@pytest.mark.parametrize("n_clients", [1, 7, 40, 103])
def test_iid_shares_are_equal_and_hold_everything_once(n_clients: int) -> None:
    shares = iid(103, n_clients, seed=3)
    assert sorted(np.concatenate(shares).tolist()) == list(range(103))
    sizes = [len(share) for share in shares]
    assert len(sizes) == n_clients
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("alpha", [0.01, 0.5, 100.0])
def test_dirichlet_holds_everything_once_and_its_alpha_mixes(alpha: float) -> None:
    examples = labelled(1000)
    shares = dirichlet(examples, 20, alpha, seed=1)
    assert sorted(np.concatenate(shares).tolist()) == list(range(1000))
    assert {len(share) for share in shares} == {50}
    largest = [
        max(Counter(examples[i].label for i in share).values()) / len(share) for share in shares
    ]
    low, high = {0.01: (0.8, 1.0), 0.5: (0.4, 0.8), 100.0: (0.25, 0.4)}[alpha]
    assert low < float(np.mean(largest[:15])) <= high  # the last ones take what is left


def test_partitions_depend_on_the_seed_alone() -> None:
    examples = labelled(60)
    for make in (lambda s: iid(60, 6, s), lambda s: dirichlet(examples, 6, 0.5, s)):
        same = [np.array_equal(a, b) for a, b in zip(make(4), make(4), strict=True)]
        other = [np.array_equal(a, b) for a, b in zip(make(4), make(5), strict=True)]
        assert all(same)
        assert not all(other)


def test_users_are_clients(tmp_path: Path) -> None:
    path = tmp_path / "users.jsonl"
    rows = [{"text": "x", "user": user} for user in ("b", "a", "b", 7)]
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    examples = [Example(text="x", line=i + 1, path=str(path)) for i in range(4)]
    assert [share.tolist() for share in by_user(path, examples, "user")] == [[3], [1], [0, 2]]
    with pytest.raises(DataError, match=r"users\.jsonl:1: it has no field 'name'"):
        by_user(path, examples, "name")


def test_impossible_partitions_are_refused() -> None:
    for n_clients in (0, 11):
        with pytest.raises(ConfigError, match="cannot spread 10 examples"):
            iid(10, n_clients, 0)
    with pytest.raises(DataError, match="labels"):
        dirichlet([Example(text="x")] * 4, 2, 0.5, 0)
    with pytest.raises(ConfigError, match="alpha"):
        dirichlet(labelled(8), 2, 0.0, 0)


# Runs


def simulated(
    bundled: Path, data: Path, few: Path, folder: Path, config: FederationConfig, **options: object
) -> SimulationResult:
    options = {"lora": LORA, "partition": Partition(12), "eval_data": few, **options}
    return simulate(bundled, data, folder, config, **options)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_and_replays(
    name: str, bundled: Path, data: Path, few: Path, tmp_path: Path
) -> None:
    changes = {**SMALL, "rounds": 2}
    if PRESETS[name].get("local_steps", 1) > 1:
        changes["local_steps"] = 3
    if name == "fwdllm":
        changes["variance_threshold"] = 1e-3  # asks for all its parts
    lora = None if name == "readout" else LORA  # its own
    result = simulated(bundled, data, few, tmp_path / "run", preset(name, **changes), lora=lora)
    assert result.rounds == 2
    assert result.n_contributions > 0
    assert result.n_rejected == 0
    assert (result.epsilon is not None) == (name == "dpzero")
    theta_of(tmp_path / "run")
    engine = Engine.load(bundled, adapter=result.adapter)
    assert engine.adapter is not None
    moved = replayed(tmp_path / "run") != Engine.load(bundled, LORA).adapter.theta.tobytes()
    assert moved
    with Ledger(tmp_path / "run" / NAME) as ledger:
        rounds = summarize(ledger)
    assert [r.parts for r in rounds] == [5 if name == "fwdllm" else 1] * 2


def test_exact_slopes_are_recorded_and_replayed(
    bundled: Path, data: Path, few: Path, tmp_path: Path
) -> None:
    """Many of them for the price of one step; a client's seeds are those of the assignment."""
    config = preset("spry", **{**SMALL, "rounds": 2, "method": "backprop", "perturbations": 256})
    result = simulated(bundled, data, few, tmp_path / "run", config)
    assert (result.rounds, result.n_rejected) == (2, 0)
    theta_of(tmp_path / "run")


def replayed(run_dir: Path) -> bytes:
    with Ledger(run_dir / NAME) as ledger:
        return replay(ledger).theta.tobytes()


def test_training_learns(bundled: Path, data: Path, few: Path, tmp_path: Path) -> None:
    config = FederationConfig(
        rounds=20,
        per_round=4,
        perturbations=4,
        batch_size=2,
        optimizer="momentum",
        learning_rate=7e-3,
        max_tokens=24,
        eval_every=20,
    )
    result = simulated(bundled, data, few, tmp_path / "run", config)
    assert result.loss_after < result.loss_before - 0.7


def test_clients_share_passes_without_changing_a_bit(
    bundled: Path, data: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = FederationConfig(rounds=2, perturbations=3, **SMALL)
    simulated(bundled, data, few, tmp_path / "together", config)
    monkeypatch.setattr("fwdllm.protocol.client._LANE_ROWS", 1)
    simulated(bundled, data, few, tmp_path / "alone", config)
    assert theta_of(tmp_path / "together") == theta_of(tmp_path / "alone")


def test_bad_clients_are_rejected_with_reasons_and_training_goes_on(
    bundled: Path, data: Path, few: Path, tmp_path: Path
) -> None:
    changes = {"per_round": 12, "perturbations": 2, "deadline": 0.3}
    config = FederationConfig(rounds=5, **{**SMALL, **changes})
    fleet = Fleet(tokens_per_s=1000, dropout=0.2, stragglers=0.2, slowdown=100, hostile=0.5)
    result = simulated(bundled, data, few, tmp_path / "run", config, fleet=fleet)
    assert result.rounds == 5
    theta_of(tmp_path / "run")
    with Ledger(tmp_path / "run" / NAME) as ledger:
        reasons = " ".join(reason for _, _, _, reason in ledger.rejections())
        rounds = summarize(ledger)
    for word in ("late", "not finite", "1e+30", "malformed"):
        assert word in reasons
    assert all(r.n_accepted < r.n_asked for r in rounds)
    assert result.n_rejected == sum(r.n_rejected for r in rounds)


def test_robust_means_withstand_liars(bundled: Path, data: Path, few: Path, tmp_path: Path) -> None:
    """A tenth of the clients report -10 times their slopes, which passes all checks."""
    losses = {}
    for kind in ("mean", "median", "trimmed"):
        config = FederationConfig(
            rounds=10,
            per_round=12,
            perturbations=4,
            seeds="shared",
            aggregate=kind,
            trim=0.25,
            optimizer="momentum",
            learning_rate=5e-3,
            max_tokens=24,
            batch_size=1,
            eval_every=10,
        )
        fleet = _Flippers(hostile=0.17)
        result = simulated(bundled, data, few, tmp_path / kind, config, fleet=fleet)
        losses[kind] = result.loss_after
        before = result.loss_before
    for kind in ("median", "trimmed"):
        assert losses[kind] < before - 0.3
        assert losses["mean"] > losses[kind] + 0.3


@pytest.mark.parametrize("attack", ["flip", "scale", "constant", "collude"])
@pytest.mark.parametrize("upload", ["scalars", "weights"])
def test_lies_that_pass_all_checks_are_taken(
    attack: str, upload: str, bundled: Path, data: Path, few: Path, tmp_path: Path
) -> None:
    config = FederationConfig(rounds=2, upload=upload, perturbations=2, max_derivative=50, **SMALL)
    found = []
    for name, fleet in (("lies", Fleet(hostile=0.5, attack=attack)), ("truth", Fleet())):
        result = simulated(bundled, data, few, tmp_path / name, config, fleet=fleet)
        assert (result.n_contributions, result.n_rejected) == (8, 0)
        found.append(theta_of(tmp_path / name))
    assert found[0] != found[1]


def test_a_screened_run_with_liars_resumes_to_the_same_adapter(
    bundled: Path, data: Path, few: Path, tmp_path: Path
) -> None:
    config = FederationConfig(rounds=4, aggregate="screened", **{**SMALL, "snapshot_every": 3})
    options = {"fleet": Fleet(hostile=0.3, attack="flip")}
    simulated(bundled, data, few, tmp_path / "whole", config, **options)
    events: list[object] = []
    simulated(
        bundled, data, few, tmp_path / "run", config,
        on_event=events.append, should_stop=lambda: len(events) > 2, **options,
    )  # fmt: skip
    simulated(bundled, data, few, tmp_path / "run", config, resume=True, **options)
    assert theta_of(tmp_path / "run") == theta_of(tmp_path / "whole")


def test_attacks_are_drawn_or_named() -> None:
    drawn = [Fleet(hostile=0.5).attack_of(3, client) for client in range(200)]
    assert set(drawn) == {None, *MIXED}
    named = [Fleet(hostile=0.5, attack="flip").attack_of(3, client) for client in range(200)]
    assert [kind is None for kind in named] == [kind is None for kind in drawn]
    assert set(named) == {None, "flip"}
    # As older versions recorded fleets, whose runs can be gone on with.
    assert "attack" not in Fleet(hostile=0.5).recorded()
    assert Fleet(hostile=0.5, attack="flip").recorded()["attack"] == "flip"
    with pytest.raises(ConfigError, match=r"attacks are nan, .*collude, not 'lie'"):
        Fleet(attack="lie")


class _Flippers(Fleet):
    """Clients 0 and 1 turn their slopes round."""

    def attack_of(self, seed: int, client: int) -> str | None:
        return "reverse" if client < 2 else None


def test_events_and_stopping(bundled: Path, data: Path, few: Path, tmp_path: Path) -> None:
    config = FederationConfig(rounds=4, **{**SMALL, "eval_every": 2})
    seen: list[tuple[str, int]] = []
    options = {"on_event": lambda e: seen.append((type(e).__name__, e.round))}
    stopped = simulated(
        bundled, data, few, tmp_path / "run", config, should_stop=lambda: len(seen) > 2, **options
    )
    assert stopped.stopped_early
    assert stopped.rounds == 2
    whole = simulated(bundled, data, few, tmp_path / "run", config, resume=True, **options)
    assert not whole.stopped_early
    names = [("Evaluated", 0), ("Closed", 1), ("Closed", 2), ("Evaluated", 2)]
    assert seen == [*names, ("Closed", 3), ("Closed", 4), ("Evaluated", 4)]
    simulated(bundled, data, few, tmp_path / "other", config)
    assert theta_of(tmp_path / "run") == theta_of(tmp_path / "other")


def test_another_run_is_not_resumed(bundled: Path, data: Path, few: Path, tmp_path: Path) -> None:
    config = FederationConfig(rounds=1, **SMALL)
    with pytest.raises(ConfigError, match="no run"):
        simulated(bundled, data, few, tmp_path / "run", config, resume=True)
    simulated(bundled, data, few, tmp_path / "run", config)
    with pytest.raises(ConfigError, match="not empty"):
        simulated(bundled, data, few, tmp_path / "run", config)
    changed = FederationConfig(rounds=1, perturbations=5, **SMALL)
    with pytest.raises(ConfigError, match=r"config\.perturbations is 5, but 8"):
        simulated(bundled, data, few, tmp_path / "run", changed, resume=True)
    with pytest.raises(ConfigError, match=r"model\.device is 'reference', but 'cpu'"):
        simulated(bundled, data, few, tmp_path / "run", config, resume=True, device="reference")


# Killing

KILLS = 12


def start(
    bundled: Path, data: Path, few: Path, folder: Path, resume: bool
) -> subprocess.Popen[str]:
    options = ["--rounds", "6", "--clients", "12", "--per-round", "4", "--rank", "2"]
    options += ["--alpha", "4", "--eval", str(few), "--run-dir", str(folder)]
    for setting in ("batch_size=2", "max_tokens=24", "max_parts=3", "variance_threshold=0.001"):
        options += ["--set", setting]
    return start_cli(["simulate", bundled, data, *options, *(["--resume"] if resume else [])])


def n_written(folder: Path) -> int:
    """Contributions and rounds on disk."""
    if not (folder / NAME).exists():
        return 0
    with Ledger(folder / NAME) as ledger:
        return ledger.n_rounds + sum(row[2] for row in traffic_by_client(ledger))


def test_killed_at_any_moment_it_goes_on_to_the_same_adapter(
    bundled: Path, data: Path, few: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(bundled, data, few, whole, resume=False)
    assert process.wait() == 0, process.communicate()[1]
    total = n_written(whole)
    moments = sorted(random.Random(5).sample(range(total), KILLS))
    for moment in moments:
        process = start(bundled, data, few, killed, resume=(killed / NAME).exists())
        while n_written(killed) < moment and process.poll() is None:
            time.sleep(0.002)
        kept = n_written(killed)
        time.sleep(random.random() * 0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert n_written(killed) >= kept
        if (killed / NAME).exists():
            with Ledger(killed / NAME) as ledger:
                verify(ledger)
                replay(ledger)
    process = start(bundled, data, few, killed, resume=True)
    assert process.wait() == 0, process.communicate()[1]
    assert theta_of(killed) == theta_of(whole)
    assert n_written(killed) == total
    assert (killed / "adapter.gguf").read_bytes() == (whole / "adapter.gguf").read_bytes()


# Commands


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return make_cli(capfd)


def test_commands_of_a_run(cli: Cli, bundled: Path, data: Path, few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    options = ["--preset", "fwdllm", "--rounds", "2", "--clients", "12", "--per-round", "3"]
    options += ["--rank", "2", "--eval", few, "--run-dir", folder]
    options += ["--set", "max_tokens=24", "--set", "batch_size=2", "--json"]
    done = cli("simulate", bundled, data, *options)
    assert done.code == 0, done.err
    result = done.json
    assert result["rounds"] == 2
    assert result["adapter"] == str(folder / "adapter.gguf")
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")

    shown = cli("ledger", "show", folder, "--json").json
    assert [r["round"] for r in shown["rounds"]] == [1, 2]
    assert sum(c["bytes_up"] for c in shown["clients"]) == result["bytes_up"]
    assert sum(c["bytes_down"] for c in shown["clients"]) == result["bytes_down"]
    assert "2 of 2 rounds" in cli("ledger", "show", folder).out
    assert "2 rounds, nothing changed" in cli("ledger", "verify", folder).out
    again = tmp_path / "again.gguf"
    assert cli("ledger", "replay", folder, "-o", again).code == 0
    assert again.read_bytes() == (folder / "adapter.gguf").read_bytes()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--preset", "fwdlm"], "presets are fwdllm, spry"),
        (["--set", "perturbation=3"], "no setting 'perturbation'"),
        (["--set", "perturbations=0"], "perturbations must be a whole number from 1"),
        (["--set", "sigma=1"], "shared seeds"),
        (["--set", "method=readout", "--layers", "1"], "--targets ffn_down --layers 5"),
        (["--dropout", "2"], "dropout is a share"),
        (["--dirichlet", "0.5"], "labels"),
        (["--clients", "100000"], "cannot spread"),
        (["--user-field", "user"], "no field 'user'"),
        (["--resume"], "no run in"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_code_2(
    options: list[str], sentence: str, cli: Cli, bundled: Path, data: Path, tmp_path: Path
) -> None:
    done = cli("simulate", bundled, data, "--run-dir", tmp_path / "run", *options)
    assert done.code == 2
    assert sentence in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_ledger_commands_want_a_ledger(cli: Cli, tmp_path: Path) -> None:
    for command in ("show", "verify", "replay"):
        done = cli("ledger", command, tmp_path)
        assert (done.code, "there is no ledger at" in done.err) == (2, True)


def test_federate_node_refuses_files_that_are_no_keys(cli: Cli, few: Path, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    node = ["federate", "node", "--superlink", "127.0.0.1:9", "--data", few]
    for options, said in (
        (["--root-certificates", tmp_path / "none"], f"cannot read {tmp_path / 'none'}: No such"),
        (["--auth-supernode-private-key", tmp_path / "none"], "cannot read"),
        (["--auth-supernode-private-key", few], "is not a private key of ssh-keygen"),
        (["--memory-budget", "much"], "an amount of memory is like"),
    ):
        done = cli(*node, *options)
        assert (done.code, said in done.err) == (2, True), done.err


def test_federate_init_writes_an_app(cli: Cli, bundled: Path, few: Path, tmp_path: Path) -> None:
    folder = tmp_path / "app"
    options = ["--model", bundled, "--data", few, "--preset", "spry", "--rounds", "7"]
    done = cli("federate", "init", folder, *options, "--set", "perturbations=5")
    assert done.code == 0, done.err
    text = (folder / "pyproject.toml").read_text(encoding="utf-8")
    for line in ('preset = "spry"', "rounds = 7", "perturbations = 5", "split = true"):
        assert line in text
    package = sorted(p.name for p in (folder / "federation").iterdir())
    assert package == ["__init__.py", "client.py", "server.py"]
    again = cli("federate", "init", folder, *options)
    assert (again.code, "not an empty folder" in again.err) == (2, True)
    done = cli("federate", "init", tmp_path / "b", *options, "--set", "method=readout")
    assert done.code == 0, done.err
    init(tmp_path / "c", bundled, few, "readout")
    for app in "bc":
        text = (tmp_path / app / "pyproject.toml").read_text(encoding="utf-8")
        for line in ("rank = 32", 'targets = "[\\"ffn_down\\"]"', 'layers = "[5]"'):
            assert line in text
