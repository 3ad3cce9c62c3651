"""Tuning from end to end: it learns, llama.cpp agrees, and no interruption costs anything."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import MODEL, TRAIN, pirate_rows, start_cli, write_rows
from cli_runs import QUICK as CLI_QUICK
from places import SHARED

from fwdllm import (
    ConfigError,
    DataError,
    DirectionsConfig,
    Engine,
    FwdllmError,
    LoRAConfig,
    NumericsError,
    TrainConfig,
    evaluate,
    read_jsonl,
    recipe,
    tune,
)
from fwdllm.engine.llamacpp import generation
from fwdllm.protocol.local import EvalResult, StepResult
from fwdllm.resources import peak_rss_bytes
from fwdllm.tuning.tune import Progress, Started, TuneResult, default_run_dir

pytestmark = pytest.mark.usefixtures("no_plot")
ENCODER = SHARED / "models" / "minilm-l6-v2.Q4_0.gguf"
QUICK = TrainConfig(steps=4, batch_size=4, perturbations=2, learning_rate=0.01)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pirate.jsonl", pirate_rows(24))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneResult, Path, list[Progress]]:
    """A run long enough to learn, the examples it was not shown, and its events."""
    folder = tmp_path_factory.mktemp("tuned")
    held_out = write_rows(folder / "held-out.jsonl", pirate_rows(8))
    train = write_rows(folder / "train.jsonl", pirate_rows(88)[8:])
    events: list[Progress] = []
    result = tune(
        MODEL,
        train,
        folder / "adapter.gguf",
        train=TrainConfig(steps=24, perturbations=4, learning_rate=0.02, method="forward-ad"),
        eval_data=held_out,
        on_event=events.append,
    )
    return result, held_out, events


def metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics without the times, which differ between runs."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in found:
        del record["time"]
        record.pop("resident_bytes", None)
    return found


# The result


def test_the_loss_falls(tuned: tuple[TuneResult, Path, list[Progress]]) -> None:
    result, held_out, events = tuned
    assert result.loss_after < 0.9 * result.loss_before
    assert result.loss_before == evaluate(MODEL, held_out).loss
    assert result.loss_after == evaluate(MODEL, held_out, adapter=result.adapter).loss
    assert (result.steps, result.stopped_early) == (24, False)
    assert result.n_trainable == 6 * 8 * (256 + 256 + 256 + 128)
    # 8 examples of some 30 tokens with 4 tangents, 24 times
    n_tokens = sum(event.n_tokens for event in events if isinstance(event, StepResult))
    assert 25 * 8 * 5 * 24 < n_tokens < 35 * 8 * 5 * 24
    # seconds are of the whole run, tokens_per_s of its updates alone
    assert 0 < n_tokens / result.seconds < result.tokens_per_s
    assert (result.accuracy_before, result.accuracy_after) == (None, None)


def test_llama_cpp_agrees_on_the_loss(tuned: tuple[TuneResult, Path, list[Progress]]) -> None:
    result, held_out, _ = tuned
    engine = Engine.load(MODEL)
    total, count = 0.0, 0
    for example in read_jsonl(held_out):
        batch = engine.encode([example])
        logits = generation.logits(MODEL, batch.ids.tolist(), result.adapter)[batch.label_rows]
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        chosen = shifted[np.arange(len(shifted)), batch.label_ids]
        total += float((np.log(np.exp(shifted).sum(axis=1)) - chosen).sum())
        count += len(chosen)
    assert abs(total / count - result.loss_after) < 0.005 * result.loss_after


def test_events_tell_the_whole_run(tuned: tuple[TuneResult, Path, list[Progress]]) -> None:
    result, _, events = tuned
    begun = events[0]
    assert isinstance(begun, Started)
    assert begun == Started(
        0, 24, "forward-ad", result.n_trainable, 80, 8, begun.step_tokens, (), begun.engine
    )
    forwarded = [event.n_tokens for event in events if isinstance(event, StepResult)]
    assert begun.step_tokens == pytest.approx(np.mean(forwarded), rel=0.1)
    evaluations = [event for event in events if isinstance(event, EvalResult)]
    assert [(e.step, e.loss) for e in evaluations] == [
        (0, result.loss_before),
        (24, result.loss_after),
    ]
    assert [e.step for e in events if isinstance(e, StepResult)] == list(range(1, 25))
    assert (result.run_dir / "checkpoints" / "step-24.npz").exists()


def test_peft_output(data: Path, tmp_path: Path) -> None:
    as_gguf = tune(MODEL, data, tmp_path / "a.gguf", train=QUICK, held_out=4)
    as_peft = tune(MODEL, data, f"{tmp_path}/a.peft/", train=QUICK, held_out=4)
    assert as_peft.adapter == tmp_path / "a.peft"
    assert as_peft.run_dir == tmp_path / "a.peft.run"
    config = json.loads((as_peft.adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert config["base_model_name_or_path"] == "fwdllm-tiny"
    losses = [evaluate(MODEL, data, adapter=run.adapter).loss for run in (as_gguf, as_peft)]
    assert losses[0] == losses[1] != evaluate(MODEL, data).loss


def test_settings_reach_the_trainer(data: Path, tmp_path: Path) -> None:
    lora = LoRAConfig(rank=2, alpha=4, targets=("ffn_down",), layers=(1, 5))
    train = TrainConfig(steps=3, batch_size=2, perturbations=1, method="forward-difference")
    result = tune(
        MODEL, data, tmp_path / "a.gguf", lora=lora, train=train, held_out=0.5, exact=True
    )
    engine = Engine.load(MODEL, adapter=result.adapter)
    assert engine.adapter is not None
    assert engine.adapter.config == lora
    rounded = tune(MODEL, data, tmp_path / "b.gguf", lora=lora, train=train, held_out=0.5)
    assert rounded.loss_before != result.loss_before
    assert result.n_trainable == 2 * 2 * (256 + 704)
    config = json.loads((result.run_dir / "config.json").read_text())
    assert (config["train"]["method"], config["exact"]) == ("forward-difference", True)


# What is held out


def started(*args: Any, **options: Any) -> Started:
    """The first event of a run that is abandoned there."""

    def leave(event: Progress) -> None:
        assert isinstance(event, Started)
        raise StopIteration(event)

    with pytest.raises(StopIteration) as left:
        tune(*args, on_event=leave, **options)
    found: Started = left.value.value
    return found


def test_what_is_held_out(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"

    def counts(data: Path, **options: Any) -> tuple[int, int]:
        event = started(MODEL, data, output, train=QUICK, **options)
        return event.n_examples, event.n_held_out

    assert counts(data) == (22, 2)
    assert counts(data, held_out=5) == (19, 5)
    assert counts(data, held_out=0.25) == (18, 6)
    assert counts(data, eval_data=TRAIN) == (24, 800)
    many = write_rows(tmp_path / "many.jsonl", pirate_rows(700) * 3)
    assert counts(many) == (1900, 200)
    assert not output.exists()
    assert not (tmp_path / "a.run").exists()


def test_everything_is_checked_before_the_first_step(data: Path, tmp_path: Path) -> None:
    late = [*pirate_rows(600), *pirate_rows(600), {"prompt": "word " * 600, "completion": " end"}]
    write_rows(data, late)
    with pytest.raises(DataError, match=r"pirate\.jsonl:1201: the example has 6"):
        tune(MODEL, data, tmp_path / "a.gguf", train=QUICK, held_out=1)
    assert [path.name for path in tmp_path.iterdir()] == ["pirate.jsonl"]


# Labels


@pytest.mark.skipif(not ENCODER.exists(), reason="the shared models are not here")
def test_an_encoder_learns_labels(tmp_path: Path) -> None:
    with open(SHARED / "data" / "sst2.train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
    data = write_rows(tmp_path / "sst2.jsonl", rows[20:])
    held_out = write_rows(tmp_path / "held-out.jsonl", rows[:20])
    train = TrainConfig(
        steps=6, batch_size=16, perturbations=1, head_learning_rate=0.03, max_tokens=32
    )
    result = tune(ENCODER, data, tmp_path / "a.gguf", train=train, eval_data=held_out)
    assert result.loss_before == pytest.approx(np.log(2))
    assert result.loss_after < result.loss_before
    assert result.accuracy_before is not None
    assert (
        result.accuracy_after
        == evaluate(ENCODER, held_out, adapter=result.adapter, max_tokens=32).accuracy
    )
    write_rows(held_out, [*rows[:3], {"text": "so so", "label": "neutral"}])
    with pytest.raises(DataError, match=r"held-out\.jsonl:4: the label 'neutral' is not one of"):
        tune(ENCODER, data, tmp_path / "b.gguf", train=train, eval_data=held_out)
    with pytest.raises(ConfigError, match="examples with two or more labels"):
        tune(ENCODER, write_rows(data, [{"text": "a"}] * 4), tmp_path / "b.gguf", train=train)


@pytest.mark.skipif(not ENCODER.exists(), reason="the shared models are not here")
def test_an_encoder_learns_by_activations(tmp_path: Path) -> None:
    with open(SHARED / "data" / "sst2.train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line, _ in zip(lines, range(60), strict=False)]
    data = write_rows(tmp_path / "sst2.jsonl", rows)
    assert recipe(ENCODER, data).train.method == "backprop"
    lora, train = recipe(ENCODER, data, "activation")
    assert (train.method, lora.rank) == ("activation", 1)
    short = dataclasses.replace(train, steps=6, perturbations=4, batch_size=8)
    result = tune(ENCODER, data, tmp_path / "a.gguf", lora=lora, train=short, held_out=20)
    assert result.loss_before == pytest.approx(np.log(2))
    assert result.loss_after < result.loss_before
    assert result.n_trainable == 6 * (3 * 384 + 1536) + 2 * 385  # every A, and the head
    # Stopped in each phase and resumed, to the same bytes.
    for stop in (1, 2, 4):
        seen = 0

        def count(event: Progress) -> None:
            nonlocal seen
            seen += isinstance(event, StepResult)

        options: dict[str, Any] = {"lora": lora, "train": short, "held_out": 20}
        output = tmp_path / f"b{stop}.gguf"
        tune(ENCODER, data, output, on_event=count, should_stop=lambda: seen == stop, **options)  # noqa: B023
        tune(ENCODER, data, output, resume=True, **options)
        assert output.read_bytes() == result.adapter.read_bytes()
    three = write_rows(data, [{"text": row["text"], "label": x} for row in rows for x in "abc"])
    assert recipe(ENCODER, three, "activation").lora.rank == 2
    assert recipe(ENCODER, three, "central") == (LoRAConfig(), TrainConfig(200, method="central"))
    sparse = DirectionsConfig("sparse")
    with pytest.raises(ConfigError, match="perturbs no weights, so sparse has no meaning"):
        tune(ENCODER, data, tmp_path / "c.gguf", lora=lora, train=train, directions=sparse)


def test_a_decoder_scores_labels(tmp_path: Path) -> None:
    rows = [{"text": f"The {x} is big.", "label": y} for x in "abcdef" for y in ("yes", "no")]
    data = write_rows(tmp_path / "labels.jsonl", rows)
    result = tune(MODEL, data, tmp_path / "a.gguf", train=QUICK, held_out=4)
    assert result.accuracy_before is not None
    assert result.accuracy_after is not None


def test_exact_gradients_learn_more_of_fewer_steps(
    tuned: tuple[TuneResult, Path, list[Progress]], tmp_path: Path
) -> None:
    forward, held_out, _ = tuned
    train = write_rows(tmp_path / "train.jsonl", pirate_rows(88)[8:])
    config = TrainConfig(steps=6, learning_rate=0.02, method="backprop")
    result = tune(MODEL, train, tmp_path / "a.gguf", train=config, eval_data=held_out)
    assert result.loss_after < forward.loss_after
    assert result.loss_after == evaluate(MODEL, held_out, adapter=result.adapter).loss


# Interruptions


def test_stopping_saves_the_adapter_so_far(data: Path, tmp_path: Path) -> None:
    steps = 0

    def count(event: Progress) -> None:
        nonlocal steps
        steps += isinstance(event, StepResult)

    options: dict[str, Any] = {"train": QUICK, "held_out": 4}
    whole = tune(MODEL, data, tmp_path / "whole.gguf", **options)
    stopped = tune(
        MODEL, data, tmp_path / "a.gguf", on_event=count, should_stop=lambda: steps == 2, **options
    )
    assert (stopped.steps, stopped.stopped_early) == (2, True)
    held_out_loss = stopped.loss_after
    assert held_out_loss != stopped.loss_before
    assert stopped.adapter.read_bytes() != whole.adapter.read_bytes()
    resumed = tune(MODEL, data, tmp_path / "a.gguf", resume=True, **options)
    assert (resumed.steps, resumed.stopped_early) == (4, False)
    assert resumed.loss_before == stopped.loss_before == whole.loss_before
    assert resumed.loss_after == whole.loss_after
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()


def test_a_lost_first_evaluation_is_made_again(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": QUICK, "held_out": 4}
    first = tune(MODEL, data, tmp_path / "a.gguf", **options)
    (first.run_dir / "metrics.jsonl").write_text("")
    again = tune(MODEL, data, tmp_path / "a.gguf", resume=True, **options)
    assert (again.loss_before, again.loss_after) == (first.loss_before, first.loss_after)


def test_stopping_before_the_first_step_leaves_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        tune(MODEL, data, tmp_path / "a.gguf", train=QUICK, should_stop=lambda: True)
    assert [path.name for path in tmp_path.iterdir()] == ["pirate.jsonl"]


def test_a_folder_deleted_before_the_first_step_is_left_to_others(
    data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a.run"

    def replace(event: Progress) -> None:
        if folder.exists() and (folder / "config.json").exists():
            shutil.rmtree(folder)
            folder.mkdir()
            (folder / "of another run").touch()

    with pytest.raises(ConfigError, match="was deleted or replaced"):
        tune(MODEL, data, tmp_path / "a.gguf", train=QUICK, on_event=replace)
    assert [path.name for path in folder.iterdir()] == ["of another run"]
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("output", ["a.gguf", "peft/"])
def test_an_output_that_is_read_only_is_noticed_before_the_work(
    tmp_path: Path, output: str
) -> None:
    kept = tmp_path / ("a.gguf" if output == "a.gguf" else "peft/adapter_config.json")
    kept.parent.mkdir(exist_ok=True)
    kept.touch(mode=0o444)
    with pytest.raises(ConfigError, match="it is read-only"):
        tune(MODEL, tmp_path / "not read.jsonl", f"{tmp_path}/{output}")


def test_a_failure_leaves_a_run_to_resume(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = TrainConfig(steps=4, batch_size=2, checkpoint_every=1)
    gradient = Engine.gradient
    calls = 0

    def fail_third(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise NumericsError("the loss is nan")
        return gradient(*args, **options)

    monkeypatch.setattr(Engine, "gradient", fail_third)
    with pytest.raises(NumericsError):
        tune(MODEL, data, tmp_path / "a.gguf", train=train)
    assert not (tmp_path / "a.gguf").exists()
    assert tune(MODEL, data, tmp_path / "a.gguf", train=train, resume=True).steps == 4
    assert calls == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": TrainConfig(steps=4, batch_size=4, perturbations=3)}, "train"),
        ({"lora": LoRAConfig(rank=4)}, "lora.rank is 4, but 8"),
        ({"held_out": 5}, "held_out is 5, but 4"),
        ({"exact": True}, "exact is True, but False"),
        ({"device": "reference"}, "device is 'reference', but 'cpu'"),
        ({"data": "other"}, "data is '"),
    ],
)
def test_a_run_is_resumed_as_it_was(
    data: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    arguments: dict[str, Any] = {"data": data, "output": tmp_path / "a.gguf", "held_out": 4}
    train = TrainConfig(steps=1, batch_size=4, perturbations=1)
    tune(MODEL, **arguments, train=train)
    if change.get("data"):
        change = {"data": write_rows(tmp_path / "other.jsonl", pirate_rows(20))}
    with pytest.raises(ConfigError, match=message):
        tune(MODEL, resume=True, **{"train": train, **arguments, **change})


def test_a_run_from_before_there_were_devices_was_on_the_cpu(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"train": QUICK, "held_out": 4}
    first = tune(MODEL, data, tmp_path / "a.gguf", **options)
    file = first.run_dir / "config.json"
    settings = json.loads(file.read_text())
    assert settings.pop("device") == "cpu"
    file.write_text(json.dumps(settings))
    again = tune(MODEL, data, tmp_path / "a.gguf", resume=True, **options)
    assert again.loss_after == first.loss_after
    with pytest.raises(ConfigError, match="device is 'reference', but 'cpu'"):
        tune(MODEL, data, tmp_path / "a.gguf", resume=True, device="reference", **options)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_steps(run: Path, count: int) -> bool:
    file = run / "metrics.jsonl"
    return file.exists() and file.read_text().count('"event": "step"') >= count


def test_ctrl_c_leaves_an_adapter(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    process = start_cli(
        ["tune", MODEL, data, "-o", output, "--steps", 5000, "--held-out", 4, "--json"]
    )
    wait_for(lambda: has_steps(tmp_path / "a.run", 2), process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    result = json.loads(out)
    assert result["stopped_early"]
    assert 2 <= result["steps"] < 5000
    assert (tmp_path / "a.run" / "checkpoints" / f"step-{result['steps']}.npz").exists()
    assert result["loss_after"] != result["loss_before"]
    engine = Engine.load(MODEL, adapter=output)
    expected = np.load(tmp_path / "a.run" / "checkpoints" / f"step-{result['steps']}.npz")["theta"]
    assert engine.adapter is not None
    np.testing.assert_array_equal(engine.adapter.theta, expected)


def test_a_memory_budget_changes_no_byte(data: Path, tmp_path: Path) -> None:
    outputs = []
    for name, options in (("free", ()), ("bounded", ("--memory-budget", "110MiB"))):
        output = tmp_path / f"{name}.gguf"
        arguments = ["tune", MODEL, data, "-o", output, *CLI_QUICK, *options, "--json"]
        out, err = start_cli(arguments).communicate(timeout=60)
        assert out, err
        outputs.append((output.read_bytes(), json.loads(out)["loss_after"]))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("method", ["forward-ad", "backprop", "readout"])
def test_kill_9_and_resume_give_the_same_bytes(data: Path, tmp_path: Path, method: str) -> None:
    train = TrainConfig(
        steps=40,
        method=method,
        batch_size=4,
        perturbations=2 if method == "forward-ad" else 8,
        learning_rate=0.01,
        checkpoint_every=3,
        eval_every=8,
    )
    whole = tune(MODEL, data, tmp_path / "whole.gguf", train=train, held_out=4)
    options = [
        *("--steps", 40, "--batch-size", 4, "--lr", 0.01, "--checkpoint-every", 3),
        *("--eval-every", 8, "--held-out", 4, "--method", method, "--json"),
        *(("-k", 2) if method == "forward-ad" else ()),
    ]
    command = ["tune", MODEL, data, "-o", tmp_path / "a.gguf", *options]
    rng = random.Random()
    for attempt, step in enumerate([rng.randint(1, 15), rng.randint(16, 30)]):
        process = start_cli([*command, "--resume"] if attempt else command)
        wait_for(lambda step=step: has_steps(tmp_path / "a.run", step), process)
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        assert not (tmp_path / "a.gguf").exists()
    resumed = tune(MODEL, data, tmp_path / "a.gguf", train=train, held_out=4, resume=True)
    assert resumed.adapter.read_bytes() == whole.adapter.read_bytes()
    assert metrics(resumed.run_dir) == metrics(whole.run_dir)
    assert (resumed.loss_before, resumed.loss_after) == (whole.loss_before, whole.loss_after)


# Odds and ends


def test_the_run_lies_beside_the_adapter(tmp_path: Path) -> None:
    assert default_run_dir("out/a.gguf") == Path("out/a.run")
    assert default_run_dir("out/a/") == Path("out/a.run")
    assert default_run_dir("a.v2/") == Path("a.v2.run")
    with pytest.raises(FwdllmError, match="format"):
        default_run_dir("a.bin")


def test_peak_memory_counts_what_was_used() -> None:
    before = peak_rss_bytes()
    block = np.ones(1_000_000 + before // 4, np.float32)
    n_bytes = block.nbytes
    del block
    assert peak_rss_bytes() > n_bytes
    assert 30e6 < before < 20e9
