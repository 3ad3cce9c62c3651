"""From files to an adapter with models that only llama.cpp has a graph for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import make_cli

import fwdllm
from fwdllm.bench.architectures import make_small
from fwdllm.engine import Engine, read_jsonl
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.llamacpp.losses import negative_log_likelihood
from fwdllm.kernels.types import QuantType
from fwdllm.protocol.config import TrainConfig

TEXTS = ["the cat sat on the mat", "a dog ran to the barn", "the sun is up", "we sail at dawn"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 2))
    return path


def plain_loss(model: Path, data: Path, adapter: Path) -> float:
    """The mean loss that llama.cpp has with the adapter as a file, without anything of ours."""
    engine = Engine.load(model)
    found = []
    for example in read_jsonl(data):
        batch = engine.encode([example])
        logits = generation.logits(model, batch.ids.tolist(), adapter)[batch.label_rows]
        found.append(negative_log_likelihood(logits, batch.label_ids))
    return float(np.concatenate(found).mean())


@pytest.mark.parametrize("method", ["auto", "central"])
@pytest.mark.parametrize("name", ["olmo2", "gpt2", "gptneox", "stablelm", "mamba"])
def test_tune(name: str, method: str, data: Path, tmp_path: Path) -> None:
    """The loss falls, and the adapter has the same loss in plain llama.cpp."""
    model, output = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    make_small(model, name, QuantType.F16)
    lora, train = fwdllm.recipe(model, data, method)
    if method == "auto":  # Mamba's layers have no ffn_down
        assert train.method == ("central" if name == "mamba" else "readout")
        for given in ("targets", "layers", "perturbations"):
            assert fwdllm.recipe(model, data, given=[given]).train.method == "central"
    train = dataclasses.replace(train, steps=12, learning_rate=3e-2)
    result = fwdllm.tune(model, data, output, lora=lora, train=train, eval_data=data)
    assert result.loss_after < result.loss_before - 0.25
    assert plain_loss(model, data, output) == pytest.approx(result.loss_after, abs=3e-3)
    evaluation = fwdllm.evaluate(model, data, adapter=output)
    assert evaluation.loss == pytest.approx(result.loss_after, abs=1e-6)


SLOPES = {"perturbations": 256, "split": False, "learning_rate": 3e-2}
WEIGHTS = {"local_steps": 2, "client_optimizer": "adam", "client_learning_rate": 3e-2}


@pytest.mark.parametrize(("preset", "changes"), [("spry", SLOPES), ("fedavg", WEIGHTS)])
def test_a_federation_by_readout(
    preset: str, changes: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    """Clients that only llama.cpp has a graph for have exact slopes, and gradients."""
    model = tmp_path / "model.gguf"
    make_small(model, "gptneox", QuantType.F16)
    config = fwdllm.preset(preset, rounds=12, method="readout", batch_size=2, **changes)
    result = fwdllm.simulate(
        model, data, tmp_path / "run", config, partition=fwdllm.Partition(4), eval_data=data
    )
    assert result.loss_after < result.loss_before - 0.25
    assert plain_loss(model, data, result.adapter) == pytest.approx(result.loss_after, abs=3e-3)


def test_a_resumed_run_gives_the_same_adapter(data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    make_small(model, "gptneox")
    train = TrainConfig(steps=6, method="central", perturbations=2, checkpoint_every=2)
    lora, _ = fwdllm.recipe(model, data, "central")
    whole, parts = tmp_path / "whole.gguf", tmp_path / "parts.gguf"
    options = {"lora": lora, "train": train, "eval_data": data}
    fwdllm.tune(model, data, whole, **options)
    seen = iter(range(7))
    fwdllm.tune(model, data, parts, should_stop=lambda: next(seen, 7) == 5, **options)
    assert parts.read_bytes() != whole.read_bytes()
    fwdllm.tune(model, data, parts, resume=True, **options)
    assert parts.read_bytes() == whole.read_bytes()


def test_the_command_line(data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_cli(capfd)
    model, output = tmp_path / "model.gguf", tmp_path / "adapter.gguf"
    assert run("bench", "make-model", model, "--shape", "gpt2", "--type", "Q8_0").code == 0
    report = run("inspect", model, "--json").json
    assert (report["backend"], report["step_memory"]) == ("llama.cpp", None)
    assert "'gpt2'" in report["reason"]
    assert report["step"]["lanes"] == 16
    assert "computed by      llama.cpp: architecture 'gpt2'" in run("inspect", model).out
    assert run("tune", model, data, "--steps", 2, "-k", 2, "-o", output).code == 0
    lora = json.loads((tmp_path / "adapter.run" / "config.json").read_text())["lora"]
    assert lora["targets"] == ["attn_qkv"]
    found = run("eval", model, data, "--adapter", output, "--json").json
    assert found["n_examples"] == len(TEXTS) * 2
    refused = run("tune", model, data, "--backend", "fwdllm", "-o", tmp_path / "b.gguf")
    assert refused.code == 2
    assert "architecture 'gpt2' is not one of llama" in refused.err
    assert not (tmp_path / "b.run").exists()
