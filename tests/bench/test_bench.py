"""``fwdllm bench``: real measurements of a tiny model, without a look at the times."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from cli_runs import MODEL, Cli

from fwdllm.bench import synthetic
from fwdllm.bench.inputs import open_decoder, random_ids
from fwdllm.bench.measure import StepConfig, measure_step
from fwdllm.bench.report import compare
from fwdllm.bench.shapes import SHAPES
from fwdllm.bench.synthetic import make_decoder
from fwdllm.bench.worker import Worker
from fwdllm.engine import Engine
from fwdllm.engine.errors import FwdllmError
from fwdllm.engine.llamacpp import generation
from fwdllm.kernels import cpu
from fwdllm.kernels.types import SUPPORTED_TYPES, QuantType

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL_STEP = ("--examples", 2, "--tokens", 16, "-k", 2, "--rounds", 1)
LORA = {"rank": 8, "targets": ["attn_q", "attn_v"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    make_decoder(path, SHAPES["tiny"], QuantType.Q4_0)
    return path


# Models of known shapes


@pytest.mark.parametrize("type", [type.name for type in SUPPORTED_TYPES])
def test_made_models_run_here_and_in_llama_cpp(fwdllm: Cli, tmp_path: Path, type: str) -> None:
    path = tmp_path / "model.gguf"
    outcome = fwdllm("bench", "make-model", "--shape", "tiny", "--type", type, path)
    assert (outcome.code, outcome.out) == (0, f"{path}\n")
    ids = list(range(20))
    ours, theirs = Engine.load(path).logits(ids), generation.logits(path, ids)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999
    assert 0.3 < theirs.std() < 3


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_each_architecture(tmp_path: Path, name: str) -> None:
    shape = replace(SHAPES[name], n_layers=1, n_vocab=2048, hidden=256)
    path = tmp_path / "model.gguf"
    make_decoder(path, shape, QuantType.Q8_0)
    engine = Engine.load(path)
    assert engine.architecture == shape.architecture
    assert (engine.args.n_heads, engine.args.head_dim) == (shape.n_heads, shape.head_dim)
    ids = list(range(8))
    ours, theirs = engine.logits(ids), generation.logits(path, ids)
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.999


def test_making_a_model_holds_a_tensor_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    tracemalloc.start()
    try:
        make_decoder(path, replace(SHAPES["tiny"], n_layers=24), QuantType.F32)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 4


def test_a_full_disk_leaves_no_model(
    fwdllm: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synthetic, "_append", fail)
    outcome = fwdllm("bench", "make-model", "--shape", "tiny", tmp_path / "model.gguf")
    assert outcome.code == 2
    assert outcome.err == "fwdllm: No space left on device\n"
    assert not list(tmp_path.iterdir())


# Prompts


def test_prompt_beside_llama_cpp(fwdllm: Cli, model: Path) -> None:
    arguments = ("--tokens", 32, "--peer", "llama.cpp", "--rounds", 2)
    result = fwdllm("bench", "prompt", model, *arguments, "--json").json
    peer = result["peer"]
    assert peer["name"] == "llama.cpp"
    assert result["loss"] == pytest.approx(peer["loss"], abs=0.05)
    assert min(result["peak_rss_bytes"], peer["peak_rss_bytes"]) > 1 << 20
    for side in (result, peer):
        low, high = side["tokens_per_s_range"]
        assert low <= side["tokens_per_s"] <= high
    assert result["ratio_range"][0] <= result["ratio"] <= result["ratio_range"][1]


def test_prompt_under_lanes(fwdllm: Cli, model: Path) -> None:
    arguments = ("--tokens", 16, "--lanes", 4, "--peer", "plain", "--rounds", 1)
    result = fwdllm("bench", "prompt", model, *arguments, "--json").json
    assert result["settings"]["lanes"] == 4
    assert result["tokens_per_s"] == pytest.approx(4 * 16 / result["seconds"])
    assert result["loss"] == result["peer"]["loss"]


# Steps


def test_step_and_its_breakdown(fwdllm: Cli, model: Path) -> None:
    arguments = (*SMALL_STEP, "--targets", "all", "--peer", "plain", "--memory-budget", "1GiB")
    result = fwdllm("bench", "step", model, *arguments, "--json").json
    assert result["peer"]["loss"] == pytest.approx(result["loss"], abs=0.1)  # without the adapter
    assert result["settings"]["memory_budget"] == 1 << 30
    assert len(result["settings"]["targets"]) == 7
    operations = {"attn_q", "ffn_down", "lora", "attention", "norms", "rope", "cross_entropy"}
    assert operations | {"embedding", "update", "other"} <= set(result["breakdown"])


def test_forward_ad_against_differences_and_all_layers(fwdllm: Cli, model: Path) -> None:
    result = fwdllm("bench", "step", model, *SMALL_STEP, "--peer", "central", "--json").json
    np.testing.assert_allclose(
        result["derivatives"], result["peer"]["derivatives"], rtol=0.1, atol=0.05
    )
    step = ("bench", "step", model, *SMALL_STEP, "--scope", "1", "--peer", "unscoped", "--json")
    result = fwdllm(*step).json
    assert result["settings"]["scope"] == [1]
    assert result["derivatives"] != result["peer"]["derivatives"]


@pytest.mark.parametrize(
    ("peer", "method"),
    [
        ("llama.cpp", "central"),
        ("llama-cpp-python", "central"),
        ("llama.cpp", "forward-difference"),
    ],
)
def test_llama_cpp_takes_the_same_step(tmp_path: Path, peer: str, method: str) -> None:
    """Without quantization the slopes agree too, so that both perturb along the same seeds."""
    model = tmp_path / "model.gguf"
    make_decoder(model, SHAPES["tiny"], QuantType.F32)
    config = StepConfig(2, 24, 8, method, targets=("attn_q", "ffn_up"))
    result = measure_step(model, config, peer, 1)
    assert result["peer"]["loss"] == pytest.approx(result["loss"], abs=1e-3)
    assert np.corrcoef(result["derivatives"], result["peer"]["derivatives"])[0, 1] > 0.98


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="peft is not installed")
def test_peft_computes_the_same_loss(model: Path, tmp_path: Path) -> None:
    ids = random_ids(open_decoder(model, 16, "fwdllm"), 2, 16)
    step = {"model": str(model), "ids": ids, "lora": LORA, "perturbations": 1, "method": "central"}
    peer = {**step, "threads": 2, "folder": str(tmp_path / "peft"), "dtype": "float32"}
    mine = {**step, "scope": None, "memory_budget": None, "backend": "fwdllm"}
    with (
        Worker("fwdllm.bench.ours:Step", mine) as ours,
        Worker("fwdllm.bench.peft_peer:Step", peer) as peft,
    ):
        assert peft.facts["loss"] == pytest.approx(ours.facts["loss"], abs=0.01)
        assert peft.run().peak_rss_bytes > ours.run().peak_rss_bytes


# Kernels


def test_kernels(fwdllm: Cli, tmp_path: Path) -> None:
    kept, picture = tmp_path / "kernels.json", tmp_path / "kernels.png"
    arguments = ("--type", "q4_0", "--rows", 8, "--rounds", 1)
    outcome = fwdllm("bench", "kernels", *arguments, "--save", kept, "--plot", picture)
    assert outcome.code == 0
    result = json.loads(kept.read_text())
    found = result["kernels"][cpu.isa]
    assert found["matmul Q4_0 2048x2048x8, 8 lanes"].keys() >= {"rate", "overhead", "fraction"}
    assert all(entry["rate"] > 0 for entry in found.values())
    assert all(name in outcome.out for name in found)
    matmul = found["matmul Q4_0 2048x2048x8"]
    numbers = 8 * 2 * 2048 * 4 + 2048 * 2048 * 18 / 32
    assert matmul["intensity"] == pytest.approx(2 * 8 * 2048 * 2048 / numbers)
    for path in (picture, tmp_path / "kernels-roofline.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


# Results in files


def test_protocol(fwdllm: Cli) -> None:
    arguments = ("--contributions", 6, "-k", 2, "--rounds", 1)
    result = fwdllm("bench", "protocol", *arguments, "--json").json
    assert result["settings"]["parameters"] == 32 * 2 * 8 * (4096 + 4096)
    assert result["report_bytes"] == 34 + 4 * 2
    assert result["update_bytes"] == 50 + 12 * 6 * 2
    assert result["ratio"] == result["close_seconds"] / result["normals_seconds"]
    shown = fwdllm("bench", "protocol", *arguments).out
    assert "generating its normal numbers alone" in shown


def test_reports_by_processes(fwdllm: Cli) -> None:
    arguments = ("--reports", 5000, "--processes", 2, "-k", 3, "--rounds", 1)
    result = fwdllm("bench", "protocol", *arguments, "--json").json
    assert result["settings"]["reports"] == 5000
    assert result["report_bytes"] == 34 + 4 * 3
    assert result["shards_bytes"] > 5000 * 46
    assert result["ledger_bytes"] > 5000 * 4
    parts = [result[f"{name}_seconds"] for name in ("plan", "take", "close")]
    assert result["round_seconds"] == sum(parts)
    assert result["reports_per_s"] == 5000 / result["take_seconds"]
    shown = fwdllm("bench", "protocol", *arguments).out
    assert "reports taken in a second" in shown


def test_serve(fwdllm: Cli) -> None:
    pytest.importorskip("fastapi")
    arguments = ("--clients", 3, "--seconds", 5)
    result = fwdllm("bench", "serve", *arguments, "--json").json
    assert set(result["statuses"]) == {"200"}
    assert result["jobs_lost"] == 0
    assert result["tuned_answer_s"] > 0
    assert result["steps_per_s"]["alone"] > 0
    for part in ("without", "with"):
        assert all(found["p50"] <= found["p95"] <= found["max"] for found in result[part].values())


def test_attack(fwdllm: Cli) -> None:
    pytest.importorskip("fastapi")
    # Seconds enough for an answer to an attacker when other tests are at work, too.
    arguments = ("--clients", 3, "--seconds", 8, "--rounds", 1)
    result = fwdllm("bench", "attack", *arguments, "--json").json
    assert set(result["statuses"]) == {"200"}
    assert result["errors"] == 0
    attacks = result["attacks"]
    refused = ("schema", "wide schema", "1 MB of faults", "long prompt", "many messages")
    assert all(set(attacks[kind]) <= {"400", "429"} for kind in refused), attacks
    assert set(attacks["abort"]) <= {"200"}
    assert any(attacks.values())
    assert len(result["resident_bytes"]["ends"]) == 2


def test_results_are_kept_compared_and_drawn(fwdllm: Cli, model: Path, tmp_path: Path) -> None:
    kept, picture = tmp_path / "kept.json", tmp_path / "plot.png"
    first = fwdllm("bench", "step", model, *SMALL_STEP, "--save", kept, "--plot", picture)
    assert first.code == 0
    assert "tokens/s" in first.out
    assert picture.read_bytes().startswith(b"\x89PNG")
    second = fwdllm("bench", "step", model, *SMALL_STEP, "--compare", kept)
    assert "now / then" in second.out
    assert "breakdown.attn_q" in second.out


def test_figures_are_compared_by_name() -> None:
    old = {
        "settings": {"tokens": 1},
        "seconds": 2.0,
        "peer": {"seconds": 4.0},
        "gone": 1,
        "zero": 0,
    }
    new = {"settings": {"tokens": 2}, "seconds": 1.0, "peer": {"seconds": 4.0}, "new": 1, "zero": 0}
    assert compare(new, old) == {"seconds": 0.5, "peer.seconds": 1.0}


# What cannot be measured


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["make-model", "--shape", "gpt-5", "x.gguf"], "these are: tiny, "),
        (["make-model", "--shape", "tiny", "--type", "Q9", "x.gguf"], "these are: F32, F16, "),
        (["make-model", "--shape", "qwen2.5-0.5b", "--type", "Q4_K", "x.gguf"], "whole Q4_K"),
        (["make-model", "--shape", "tiny", "nowhere/x.gguf"], "does not exist"),
        (["prompt", "nowhere.gguf"], "does not exist"),
        (["prompt", MODEL, "--tokens", "1"], "--tokens must be from 2"),
        (["prompt", MODEL, "--tokens", "999999"], "--tokens must be from 2"),
        (["prompt", MODEL, "--lanes", "3"], "--lanes must be"),
        (["prompt", MODEL, "--peer", "plain"], "takes --lanes"),
        (["prompt", MODEL, "--peer", "gpt"], "--peer must be one of"),
        (["prompt", MODEL, "--rounds", "0"], "--rounds must be"),
        (["prompt", MODEL, "--save", "nowhere/x.json"], "does not exist"),
        (["prompt", MODEL, "--compare", "nowhere.json"], "No such file"),
        (["prompt", MODEL, "--compare", __file__], "is not JSON"),
        (["step", MODEL, "--examples", "0"], "must be at least 1"),
        (["step", MODEL, "--method", "exact"], "method must be"),
        (["step", MODEL, "--peer", "llama.cpp"], "takes differences: choose --method central"),
        (["step", MODEL, "--scope", "99"], "nothing of the adapter is in the scope of layers 99"),
        (["step", MODEL, "--targets", "attn_x"], "No layer has a target 'attn_x'"),
        (["step", MODEL, "--memory-budget", "much"], "an amount of memory is like"),
        (["kernels", "--isa", "mmx"], "this machine has no 'mmx'"),
        (["protocol", "--contributions", "0"], "must be at least 1"),
        (["protocol", "--reports", "0"], "reports must be 1 to 4194304"),
        (["protocol", "--reports", "3", "--processes", "4"], "no more than reports"),
        (["protocol", "--reports", "4000000"], "lower max_derivative"),
        (["serve", "--clients", "0"], "must be above 0"),
        (["attack", "--clients", "0"], "must be above 0"),
        (["kernels", "--type", "Q9"], "these are: F32, F16, "),
        (["kernels", "--rows", "12"], "--rows a multiple of 8"),
    ],
)
def test_bad_input(fwdllm: Cli, arguments: list[str], sentence: str) -> None:
    outcome = fwdllm("bench", *arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert sentence in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_killed_side_is_told_of(model: Path) -> None:
    ids = random_ids(open_decoder(model, 16, "fwdllm"), 1, 17)[0]
    options = {"model": str(model), "ids": ids, "lanes": 1, "backend": "fwdllm"}
    with Worker("fwdllm.bench.ours:Prompt", options) as worker:
        os.kill(worker.pid, signal.SIGKILL)
        with pytest.raises(FwdllmError, match="too much memory"):
            worker.run()


def test_a_side_with_a_bug_is_told_of(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="ended with code 1"):
        Worker("fwdllm.bench.ours:Nothing", {})
    assert "has no attribute 'Nothing'" in capfd.readouterr().err
