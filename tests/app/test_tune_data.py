"""What a run makes of its data: read once, and the same tokens when it goes on later."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cli_runs import MODEL, QUICK, Cli, pirate_rows, write_rows

from fwdllm import TrainConfig
from fwdllm.engine.errors import ConfigError
from fwdllm.tuning import run_directory
from fwdllm.tuning import tune as module
from fwdllm.tuning.tune import tune

TRAIN = TrainConfig(4, method="backprop", batch_size=2, checkpoint_every=2)


def stop_after(n_events: int) -> Callable[[], bool]:
    left = iter(range(n_events))
    return lambda: next(left, None) is None


def run(path: Path, data: Path, model: Path = MODEL, **options: Any) -> bytes:
    options = {"train": TRAIN, "held_out": 2, **options}
    return tune(model, data, path, **options).adapter.read_bytes()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "data.jsonl", pirate_rows(8))


def test_a_pipe_is_read_once(fwdllm: Cli, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    text = "".join(json.dumps(row) + "\n" for row in pirate_rows(12))
    threading.Thread(target=pipe.write_text, args=[text], daemon=True).start()
    done = fwdllm("tune", MODEL, pipe, "-o", tmp_path / "a.gguf", *QUICK)
    assert done.code == 0, done.err
    same = write_rows(tmp_path / "same.jsonl", pirate_rows(12))
    assert fwdllm("tune", MODEL, same, "-o", tmp_path / "b.gguf", *QUICK).code == 0
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_run_of_an_older_version_goes_on_as_it_was(
    data: Path, tmp_path: Path, no_plot: None
) -> None:
    """Names of special tokens in raw text were text: it says so, or is refused."""
    whole = run(
        tmp_path / "whole.gguf", data, train=TrainConfig(**TRAIN.__dict__ | {"literal": True})
    )
    literal = TrainConfig(**TRAIN.__dict__ | {"literal": True})
    run(tmp_path / "a.gguf", data, train=literal, should_stop=stop_after(4))
    config = tmp_path / "a.run" / "config.json"
    recorded = json.loads(config.read_text())
    assert "literal" not in recorded["train"]  # as older versions wrote it
    del recorded["started"]
    config.write_text(json.dumps(recorded))
    with pytest.raises(ConfigError, match=r"train.literal is False, but True in the run"):
        run(tmp_path / "a.gguf", data, resume=True)
    assert run(tmp_path / "a.gguf", data, train=literal, resume=True) == whole


def test_a_template_with_the_date_has_that_of_the_start(
    models: Path, shared: Path, tmp_path: Path, no_plot: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = models / "template-date.gguf", shared / "cases" / "15-chats.jsonl"

    def on(day: int) -> None:
        class Clock(datetime):
            @classmethod
            def now(cls, tz: Any = None) -> datetime:
                return datetime(2026, 1, day)

        monkeypatch.setattr(module, "datetime", Clock)

    on(1)
    first = run(tmp_path / "first.gguf", data, model)
    run(tmp_path / "a.gguf", data, model, should_stop=stop_after(4))
    on(2)
    assert run(tmp_path / "other.gguf", data, model) != first
    assert run(tmp_path / "a.gguf", data, model, resume=True) == first
    assert run_directory.recorded_start(tmp_path / "a.run") == datetime(2026, 1, 1)


def test_tokens_are_shown(fwdllm: Cli, tmp_path: Path) -> None:
    rows = [
        {"prompt": "One two", "completion": " three."},
        {"prompt": "Four", "completion": " five."},
    ]
    data = write_rows(tmp_path / "data.jsonl", rows)
    shown = fwdllm("tokens", MODEL, data)
    assert shown.code == 0
    assert "  learns   three.<|endoftext|>" in shown.out
    assert "line 2: " in shown.out
    found = fwdllm("tokens", MODEL, data, "--line", 2, "--json").json["sequences"]
    assert [each["line"] for each in found] == [2]
    [view] = found
    assert "".join(view["texts"]) == "<|endoftext|>Four five.<|endoftext|>"
    learned = [text for text, label in zip(view["texts"], view["learned"], strict=True) if label]
    assert "".join(learned) == " five.<|endoftext|>"
    refused = fwdllm("tokens", MODEL, data, "--line", 3)
    assert (refused.code, "has no example in line 3" in refused.err) == (2, True)
