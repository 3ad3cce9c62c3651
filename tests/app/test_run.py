"""Run directories: what is written, what resuming accepts, and survival of kill -9."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy_engine
from toy_engine import CONFIG, N_HEAD, ToyEngine, make_examples, train_toy

from fwdllm.engine.errors import ConfigError, NumericsError
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.contribution import Contribution, Rejection
from fwdllm.protocol.local import EvalResult, StepResult, TrainState
from fwdllm.tuning import checkpoints
from fwdllm.tuning.run_directory import RunDirectory, stop_on_interrupt, train_recorded

SHORT = replace(CONFIG, steps=6, eval_every=2, checkpoint_every=2, warmup=1)


def records(directory: Path) -> list[dict[str, Any]]:
    """The metrics without the times, which differ between runs."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    for record in found:
        del record["time"]
        record.pop("resident_bytes", None)
    return found


def final_arrays(directory: Path, step: int) -> dict[str, bytes]:
    with np.load(directory / "checkpoints" / f"step-{step}.npz") as file:
        return {name: file[name].tobytes() for name in file.files}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def start(directory: Path, config: dict[str, Any], resume: bool = False) -> None:
    RunDirectory(directory, config, resume=resume).close()


# What a run leaves


def test_a_run_leaves_its_files(tmp_path: Path) -> None:
    engine = train_toy(tmp_path / "run", SHORT)
    assert names(tmp_path / "run") == [
        "checkpoints",
        "config.json",
        "lock",
        "metrics.jsonl",
        "plot.png",
    ]
    assert names(tmp_path / "run" / "checkpoints") == ["step-4.npz", "step-6.npz"]
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == asdict(SHORT)
    assert final_arrays(tmp_path / "run", 6)["theta"] == engine.adapter.theta.tobytes()
    assert [(r["event"], r["step"]) for r in records(tmp_path / "run")] == [
        ("eval", 0),
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("step", 3),
        ("step", 4),
        ("eval", 4),
        ("step", 5),
        ("step", 6),
        ("eval", 6),
    ]


def test_the_plot_is_a_picture_of_the_losses(tmp_path: Path) -> None:
    from matplotlib.image import imread

    empty, drawn = tmp_path / "empty", tmp_path / "drawn"
    with RunDirectory(empty, {}, resume=False) as run:
        blank = imread(run.plot())
    train_toy(drawn, SHORT)
    picture = imread(drawn / "plot.png")
    assert picture.shape[0] > 400
    assert picture.shape[1] > 700

    def coloured(image: np.ndarray) -> int:
        return int((np.ptp(image[..., :3], axis=2) > 0.2).sum())

    assert coloured(blank) == 0
    assert coloured(picture) > 500


def test_metrics_are_on_disk_at_each_event(tmp_path: Path, no_plot: None) -> None:
    engine = ToyEngine(N_HEAD)
    with RunDirectory(tmp_path / "run", {}, resume=False) as run:
        events = train_recorded(run, engine, SHORT, make_examples(10), [])
        for event in events:
            if isinstance(event, StepResult):
                assert len(records(run.path)) == event.step


def test_metrics_lines_are_strict_json(tmp_path: Path) -> None:
    rejection = Rejection(Contribution(2**64 - 1, float("nan"), 4, 1.0), "derivative is nan")
    with RunDirectory(tmp_path / "run", {}, resume=False) as run:
        run.log(StepResult(1, 0.5, (0.25,), 0.1, 2.0, 12, (rejection,)))
        run.log(EvalResult(1, float("nan"), 3, 2, None))
        step, evaluation = run.metrics()
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert step["rejected"] == [{"seed": 2**64 - 1, "reason": "derivative is nan"}]
    assert (step["loss"], step["derivatives"], step["n_tokens"]) == (0.5, [0.25], 12)
    assert (evaluation["loss"], evaluation["n_tokens"]) == (None, 3)
    assert abs(step["time"] - time.time()) < 60


# Opening


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    train_toy(tmp_path / "run", replace(SHORT, steps=2))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        start(tmp_path / "run", {})
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ConfigError, match="not empty"):
        start(tmp_path, {})
    assert names(tmp_path) == ["thesis.tex"]


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="is a file"):
        start(tmp_path / "run", {})


def test_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no run"):
        start(tmp_path / "run", {}, resume=True)
    assert not (tmp_path / "run").exists()


def test_a_start_that_died_does_not_block_the_directory(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / ".config.json.tmp77-ab").write_text("{")
    start(tmp_path, {"a": 1})
    assert names(tmp_path) == ["checkpoints", "config.json", "lock", "metrics.jsonl"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": "m", "train": {"lr": 0.2, "betas": [1, 2]}}, r"train\.lr is 0\.2, but 0\.1"),
        ({"model": "m", "train": {"betas": [1, 2]}}, r"train\.lr is None, but 0\.1"),
        ({"model": "m", "train": {"lr": 0.1, "betas": [1, 3]}}, r"train\.betas is \[1, 3\]"),
        ({"model": "m", "train": 1}, "train is 1"),
        ({"model": "m", "train": {"lr": 0.1, "betas": [1, 2]}, "rank": 8}, "rank is 8, but None"),
    ],
)
def test_another_configuration_is_refused(tmp_path: Path, given: dict, message: str) -> None:
    config = {"model": "m", "train": {"lr": 0.1, "betas": (1, 2)}}
    start(tmp_path / "run", config)
    start(tmp_path / "run", config, resume=True)
    with pytest.raises(ConfigError, match=message):
        start(tmp_path / "run", given, resume=True)


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    start(tmp_path / "run", {})
    (tmp_path / "run" / "config.json").write_text('{"a": ')
    with pytest.raises(ConfigError, match="damaged"):
        start(tmp_path / "run", {}, resume=True)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path: Path) -> None:
    train_toy(tmp_path / "run", replace(SHORT, steps=2))
    with RunDirectory(tmp_path / "run", asdict(replace(SHORT, steps=2)), resume=True) as run:
        with pytest.raises(ConfigError, match="16 adapter weights, the adapter 13"):
            run.restore(ToyEngine(), SHORT)
        with pytest.raises(ConfigError, match="sgd has no state"):
            run.restore(ToyEngine(N_HEAD), replace(SHORT, optimizer="sgd"))


def test_one_process_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom fwdllm.tuning.run_directory import RunDirectory\n"
        "run = RunDirectory(sys.argv[1], {}, resume=False)\n"
        "print('ready', flush=True)\nsys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"ready\n"
        with pytest.raises(ConfigError, match="in use by another process"):
            start(tmp_path / "run", {}, resume=True)
        holder.kill()
    start(tmp_path / "run", {}, resume=True)


def test_one_holder_within_a_process(tmp_path: Path) -> None:
    with (
        RunDirectory(tmp_path / "run", {}, resume=False),
        pytest.raises(ConfigError, match="in use"),
    ):
        start(tmp_path / "run", {}, resume=True)
    start(tmp_path / "run", {}, resume=True)


# Damage


def test_a_run_whose_folder_was_deleted_leaves_the_next_one_alone(
    tmp_path: Path, no_plot: None
) -> None:
    first = ToyEngine(N_HEAD)
    with RunDirectory(tmp_path / "run", {}, resume=False) as run:
        events = train_recorded(run, first, SHORT, make_examples(10), [])
        next(events)
        shutil.rmtree(tmp_path / "run")
        with pytest.raises(ConfigError, match="was deleted or replaced"):
            next(events)
        with RunDirectory(tmp_path / "run", {"other": 1}, resume=False) as other:
            for write in (
                lambda: run.log(EvalResult(1, 1.0, 1, 1, None)),
                lambda: run.save(first.adapter.theta, TrainState.initial(SHORT, first)),
            ):
                with pytest.raises(ConfigError, match="was deleted or replaced"):
                    write()
            other.log(EvalResult(0, 1.0, 1, 1, None))
    assert names(tmp_path / "run") == ["checkpoints", "config.json", "lock", "metrics.jsonl"]
    assert [record["step"] for record in records(tmp_path / "run")] == [0]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, no_plot: None) -> None:
    train_toy(tmp_path / "whole", SHORT)
    train_toy(tmp_path / "run", SHORT)
    newest = tmp_path / "run" / "checkpoints" / "step-6.npz"
    newest.write_bytes(newest.read_bytes()[:-100])
    with RunDirectory(tmp_path / "run", asdict(SHORT), resume=True) as run:
        assert run.checkpoint is not None
        assert run.checkpoint.step == 4
        assert [path.name for path in run.damaged] == ["step-6.npz.damaged"]
    train_toy(tmp_path / "run", SHORT)
    assert final_arrays(tmp_path / "run", 6) == final_arrays(tmp_path / "whole", 6)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_without_an_intact_checkpoint_the_run_starts_again(tmp_path: Path, no_plot: None) -> None:
    train_toy(tmp_path / "whole", SHORT)
    train_toy(tmp_path / "run", SHORT)
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        path.write_bytes(b"")
    train_toy(tmp_path / "run", SHORT)
    assert final_arrays(tmp_path / "run", 6) == final_arrays(tmp_path / "whole", 6)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_no_damage_to_a_checkpoint_goes_unnoticed(tmp_path: Path) -> None:
    optimizer = {"step": np.array(2), "mean": np.arange(5, dtype=np.float32)}
    saved = checkpoints.Checkpoint(2, np.arange(5, dtype=np.float32), optimizer)
    path = checkpoints.save(tmp_path, saved)
    data = path.read_bytes()
    flips = [data[:i] + bytes([data[i] ^ 0x41]) + data[i + 1 :] for i in range(0, len(data), 3)]
    cuts = [data[:length] for length in range(0, len(data), 5)]
    passed_over = 0
    for damaged in flips + cuts:
        path.write_bytes(damaged)
        found, skipped = checkpoints.newest_intact(tmp_path)
        passed_over += len(skipped)
        # A flip in a date or another unused field of the container does no harm.
        assert (found is None) == (skipped == [path])
        if found is not None:
            assert found.theta.tobytes() == saved.theta.tobytes()
            assert found.step == 2
            for name, array in found.state.items():
                assert array.tobytes() == optimizer[name].tobytes()
    assert passed_over >= len(cuts) + len(flips) // 2


def test_a_damaged_shape_does_not_ask_for_memory(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, checkpoints.Checkpoint(2, np.zeros(5000, np.float32), {}))
    data, shape, huge = path.read_bytes(), b"(5000,), }" + b" " * 10, b"(50000000000000,), }"
    assert data.count(shape) == 1
    path.write_bytes(data.replace(shape, huge))
    assert checkpoints.newest_intact(tmp_path) == (None, [path])


def test_a_checkpoint_under_another_name_is_damage(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path, checkpoints.Checkpoint(2, np.zeros(3, np.float32), {}))
    path.rename(tmp_path / "step-9.npz")
    assert checkpoints.newest_intact(tmp_path) == (None, [tmp_path / "step-9.npz"])


def test_the_last_checkpoints_are_kept_by_step(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        checkpoints.save(tmp_path, checkpoints.Checkpoint(step, np.zeros(3, np.float32), {}))
    assert names(tmp_path) == ["step-10.npz", "step-100.npz"]
    found, _ = checkpoints.newest_intact(tmp_path)
    assert found is not None
    assert found.step == 100


def test_torn_metrics_are_cut_to_the_checkpoint(tmp_path: Path, no_plot: None) -> None:
    train_toy(tmp_path / "whole", SHORT)
    whole = (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    train_toy(tmp_path / "run", SHORT)
    for end in (lines[-1][:7], lines[-1][:-1], b"\x00\x00\xff", b"7\n"):
        (tmp_path / "run" / "checkpoints" / "step-6.npz").unlink()
        (tmp_path / "run" / "metrics.jsonl").write_bytes(b"".join(lines[:-1]) + end)
        with RunDirectory(tmp_path / "run", asdict(SHORT), resume=True) as run:
            assert [(r["event"], r["step"]) for r in run.metrics()][-2:] == [
                ("step", 3),
                ("step", 4),
            ]
        train_toy(tmp_path / "run", SHORT)
        assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_a_last_line_without_its_end_is_kept_if_whole(tmp_path: Path, no_plot: None) -> None:
    train_toy(tmp_path / "run", SHORT)
    metrics = tmp_path / "run" / "metrics.jsonl"
    before, lines = records(tmp_path / "run"), metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(lines[:-1])[:-1])  # the step of the checkpoint, no newline
    train_toy(tmp_path / "run", SHORT)
    assert records(tmp_path / "run") == before


# Interruption


def test_every_event_is_a_place_to_die(tmp_path: Path, no_plot: None) -> None:
    """A run abandoned after each of its events, in turn, resumes to the same state."""
    train_toy(tmp_path / "whole", SHORT)
    n_events = 6 + 4 + 3
    for last in range(n_events):
        run_path = tmp_path / f"run-{last}"
        with RunDirectory(run_path, asdict(SHORT), resume=False) as run:
            engine = ToyEngine(N_HEAD)
            events = train_recorded(run, engine, SHORT, make_examples(10), make_examples(5, 1))
            for _ in range(last + 1):
                next(events)
            events.close()
        train_toy(run_path, SHORT)
        assert final_arrays(run_path, 6) == final_arrays(tmp_path / "whole", 6)
        assert records(run_path) == records(tmp_path / "whole")


def test_stopping_saves_and_resumes(tmp_path: Path, no_plot: None) -> None:
    train_toy(tmp_path / "whole", SHORT)
    engine, asked = ToyEngine(N_HEAD), []
    with RunDirectory(tmp_path / "run", asdict(SHORT), resume=False) as run:
        events = train_recorded(
            run,
            engine,
            SHORT,
            make_examples(10),
            make_examples(5, 1),
            should_stop=lambda: asked.append(0) or len(asked) == 6,
        )
        assert [event.step for event in events] == [0, 1, 2, 2, 2, 3]
    assert names(tmp_path / "run" / "checkpoints") == ["step-2.npz", "step-3.npz"]
    train_toy(tmp_path / "run", SHORT)
    assert final_arrays(tmp_path / "run", 6) == final_arrays(tmp_path / "whole", 6)
    assert records(tmp_path / "run") == records(tmp_path / "whole")


def test_spoilt_weights_are_never_saved(tmp_path: Path, no_plot: None) -> None:
    config = replace(SHORT, optimizer="sgd", learning_rate=1e38, checkpoint_every=1)
    with (
        RunDirectory(tmp_path / "run", {}, resume=False) as run,
        pytest.raises(NumericsError),
        np.errstate(all="ignore"),
    ):
        list(train_recorded(run, ToyEngine(N_HEAD), config, make_examples(10), []))
    found, _ = checkpoints.newest_intact(tmp_path / "run" / "checkpoints")
    assert found is None or np.isfinite(found.theta).all()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler, also where the tests were started with interrupts ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_first_interrupt_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt() as should_stop:
        assert not should_stop()
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_initial_state_without_a_checkpoint(tmp_path: Path) -> None:
    engine = ToyEngine()
    before = engine.adapter.theta.copy()
    with RunDirectory(tmp_path / "run", {}, resume=False) as run:
        state = run.restore(engine, TrainConfig(steps=1))
    assert state.step == 0
    assert isinstance(state, TrainState)
    np.testing.assert_array_equal(engine.adapter.theta, before)


def run_and_kill(directory: Path, delay: float) -> int:
    """Train in another process, killed ``delay`` seconds after it began; gives its exit code."""
    command = [sys.executable, toy_engine.__file__, str(directory)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(delay)
        child.kill()
        error = child.stderr.read().decode()
    assert child.returncode in (0, -signal.SIGKILL), error
    return child.returncode


def test_kill_9_at_random_moments(tmp_path: Path, no_plot: None) -> None:
    train_toy(tmp_path / "whole")
    rng = random.Random(2)
    kills = 0
    for _ in range(4):
        kills += run_and_kill(tmp_path / "run", rng.uniform(0, 0.12)) != 0
    assert kills >= 2
    train_toy(tmp_path / "run")
    assert final_arrays(tmp_path / "run", 60) == final_arrays(tmp_path / "whole", 60)
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    assert names(tmp_path / "run" / "checkpoints") == ["step-57.npz", "step-60.npz"]
