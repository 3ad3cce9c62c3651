"""The federated comparison: what it counts, what its tables say, and that every run starts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import federated
import federated_report
import numpy as np
import pytest
from federated import RUNS, Task
from federated_report import Row

from fwdllm.engine import Engine, LoRAConfig, read_jsonl
from fwdllm.engine.data.jsonl import labels_of
from fwdllm.federation.simulation import Partition
from fwdllm.protocol import wire
from fwdllm.protocol.client import answer
from fwdllm.protocol.plan import plan_part
from fwdllm.protocol.presets import preset
from fwdllm.protocol.space import Space


def row(run: str = "spry", seed: int = 0, round: int = 0, **changes: Any) -> Row:
    found = Row(
        run,
        "iid",
        seed,
        round,
        n_tokens=100_000 * round,
        n_answers=10 * round,
        client_seconds=150.0 * round,
        wall_seconds=60.0 * round,
        bytes_up=3000 * round,
        bytes_down=50_000 * round,
        n_perturbations=round,
        variance=None,
        epsilon=None,
        loss=1.4 - 0.2 * round,
        accuracy=0.25 + 0.1 * round,
        seconds=1.0,
    )
    return replace(found, **changes)


ROWS = [row(seed=s, round=r) for s in (0, 1) for r in (0, 1, 2 + s)] + [
    row("mezo", round=r, loss=1.4) for r in (0, 4)
]


@pytest.fixture
def task(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Task:
    """Ten clients with twenty examples each, for about a round; sparse runs choose after one."""
    partitions = {"iid": Partition(10), "dirichlet": Partition(10, alpha=0.5)}
    monkeypatch.setattr(federated, "PARTITIONS", partitions)
    data = tmp_path / "data.jsonl"
    lines = (shared / "data/agnews.train.jsonl").read_bytes().split(b"\n")[:240]
    data.write_bytes(b"\n".join(lines))
    changes = {"per_round": 2, "batch_size": 2, "max_tokens": 16, "reselect": 1}
    return Task(shared / "models/minilm-l6-v2.Q4_0.gguf", data, 100, 40, changes)


def test_ends_of_runs() -> None:
    lines = federated_report.report(ROWS).splitlines()
    assert lines[0] == "### iid"
    assert lines[4:] == [
        "| spry | 45.0% / 55.0% | 50.0% | 0.9000 | 2 | 250k | 375 | 300B / 5kB |",
        "| mezo | 65.0% | 65.0% | 1.4000 | 4 | 400k | 600 | 300B / 5kB |",
    ]


def test_what_a_target_took() -> None:
    rows = [*ROWS, row(seed=2, round=0), row(seed=2, round=3, n_tokens=800_000)]
    lines = federated_report.report(rows, target_loss=1.2).splitlines()
    assert lines[-2:] == [
        "| spry | 3 of 3 | 1 (1 to 3) | 60 (60 to 180) | 150 (150 to 450) | 100k (100k to 800k) |",
        "| mezo | 0 of 1 |  |  |  |  |",
    ]
    # Rows of an older version do not have it.
    older = [replace(row, wall_seconds=None) for row in rows]
    line = federated_report.report(older, target_loss=1.2).splitlines()[-2]
    assert line.startswith("| spry | 3 of 3 | 1 (1 to 3) |  | 150 (150 to 450) |")


def test_pictures_of_what_there_is(tmp_path: Path) -> None:
    federated_report.plot(ROWS, tmp_path / "plots")
    [picture] = (tmp_path / "plots").iterdir()
    assert picture.name == "federated-iid.png"
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_band_is_over_costs_that_all_seeds_met() -> None:
    curves = federated_report.by_run(ROWS)["spry"]
    x, low, middle, high = federated_report._band(curves, lambda row: row.round, False)
    assert x.tolist() == [0, 1, 2]
    assert np.allclose([low, middle, high], [0.25, 0.35, 0.45])


def test_lane_tokens_of_a_part() -> None:
    changes = {"rounds": 1, "per_round": 10, "batch_size": 8}
    for name, by_backprop, lanes in (("fwdllm", False, 3), ("spry", False, 2)):
        config = preset(name, **changes)
        assert federated.part_tokens(config, by_backprop, 5.0) == 10 * 8 * 5 * lanes
    for by_torch, method in ((True, "forward-ad"), (False, "backprop")):
        config = preset("fedavg", local_steps=4, method=method, **changes)
        assert federated.part_tokens(config, by_torch, 5.0) == 10 * 8 * 4 * 5 * 3


@pytest.mark.parametrize("name", [name for name in RUNS if name.startswith("decoder: ")])
def test_every_run_of_a_decoder_starts(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(federated, "PARTITIONS", {"4 clients": Partition(4)})
    task = Task(bundled, bundled.parent / "pirate.train.jsonl", 2000, 8, {"max_tokens": 16})
    rows: list[Row] = []
    federated.measure(task, name, "4 clients", 3, rows.append)
    first, last = rows[0], rows[-1]
    assert (first.n_tokens, first.accuracy) == (0, None)
    assert last.n_tokens >= task.budget
    assert np.isfinite(last.loss)
    assert last.loss != first.loss
    assert "| held-out loss, by seed |" in federated_report.report([first, last]).splitlines()[2]


@pytest.mark.parametrize("name", [name for name in RUNS if not name.startswith("decoder: ")])
def test_every_run_starts(task: Task, name: str) -> None:
    rows: list[Row] = []
    federated.measure(task, name, "dirichlet", 3, rows.append)
    first, last = rows[0], rows[-1]
    assert [first.round, first.n_tokens, first.bytes_up] == [0, 0, 0]
    assert np.isclose(first.loss, np.log(4))
    assert len({row.round for row in rows}) == len(rows)
    assert last.n_tokens >= task.budget
    assert last.client_seconds >= last.wall_seconds > 0
    assert last.bytes_up >= 34 * last.n_answers > 0
    assert np.isfinite(last.loss)
    assert last.loss != first.loss
    assert (last.n_perturbations == 0) == RUNS[name].backprop
    assert (last.epsilon is None) == (name != "dpzero, epsilon 8")


def test_clients_with_pytorch_go_where_the_engines_go(task: Task) -> None:
    torch = pytest.importorskip("torch")
    from torch_model import TorchModel

    examples = read_jsonl(task.data)[:6]
    engine = Engine.load(task.model, LoRAConfig(), labels=labels_of(examples), exact=True)
    assert engine.adapter is not None
    adapter = engine.adapter
    adapter.theta[:] += np.random.default_rng(0).normal(0, 0.05, adapter.theta.size)
    before = adapter.theta.copy()
    small = {"batch_size": 2, "max_tokens": 16, "client_learning_rate": 0.1}
    config = preset("fedavg", rounds=1, local_steps=3, method="backprop", **small)
    space = Space(adapter, config)
    [assignment] = plan_part(config, space, 0, 0, [0], None, {}, 0)
    model = TorchModel(engine, torch.float32)
    theirs = federated.backprop_answer(model, engine, space, assignment, examples)
    assert np.array_equal(adapter.theta, before)
    ours = answer(engine, space, assignment, examples)
    assert theirs.vector is not None and ours.vector is not None
    assert (theirs.n_examples, theirs.n_tokens) == (ours.n_examples, ours.n_tokens)
    assert theirs.loss == pytest.approx(ours.loss, rel=1e-4)
    assert np.abs(ours.vector).max() > 0.01
    assert np.linalg.norm(theirs.vector - ours.vector) < 1e-3 * np.linalg.norm(ours.vector)
    assert wire.decode_report(wire.encode_report(theirs)).vector is not None


def test_command_line(
    task: Task, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = task.data.with_name("out.jsonl")
    start = ["federated", str(task.model), str(task.data), str(out), "--runs", "spry;mezo"]
    limits = ["--seeds", "1", "--partitions", "iid", "--budget", "100", "--held-out", "40"]
    changes = ["--set", "per_round=2", "batch_size=2", "optimizer=sgd"]
    monkeypatch.setattr("sys.argv", [*start, *limits, *changes])
    federated.main()
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["run"], row["partition"], row["seed"]) for row in found} == {
        ("spry", "iid", 1),
        ("mezo", "iid", 1),
    }
    printed = capsys.readouterr().out
    plots = task.data.with_name("plots")
    monkeypatch.setattr("sys.argv", ["federated", "--report", str(out), "--plot", str(plots)])
    federated.main()
    assert capsys.readouterr().out == printed
    assert (plots / "federated-iid.png").exists()
