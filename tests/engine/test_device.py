"""The device of commands and functions: which are refused, and what a GPU's kernels come to."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from cli_runs import MODEL, Cli, pirate_rows, start_cli, write_rows

from fwdllm import Engine, LoRAConfig, Partition, evaluate, simulate
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.kernels.types import QuantType
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.replay import replay

NO_GPU = "fwdllm: device cuda needs an NVIDIA GPU that PyTorch can use: there is none\n"
COMMANDS: dict[str, tuple[str, ...]] = {
    "tune": ("-o", "OUT/a.gguf"),
    "eval": (),
    "simulate": ("--run-dir", "OUT/run", "--clients", "2"),
}
commands = pytest.mark.parametrize("command", COMMANDS)
INSTALLED = all(find_spec(name) for name in ("torch", "triton"))
if INSTALLED:
    import_module("interpreter")
needs_triton = pytest.mark.skipif(not INSTALLED, reason="no torch and triton")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "pirate.jsonl", pirate_rows(8))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One so small that Triton's interpreter takes a step in seconds."""
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    make_decoder(path, Shape(1, 64, 2, 1, 32, 64, 300), QuantType.Q4_0)
    return path


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"text": text} for text in ("a cat", "the dog", "wet sand")]
    return write_rows(tmp_path_factory.mktemp("words") / "words.jsonl", rows)


def arguments(command: str, data: Path, folder: Path) -> list[object]:
    options = [option.replace("OUT", str(folder)) for option in COMMANDS[command]]
    return [command, MODEL, data, *options]


# What is refused


@needs_triton
@commands
def test_cuda_needs_a_gpu(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    process = start_cli([*arguments(command, data, tmp_path), "--device", "cuda"])
    assert process.communicate() == ("", NO_GPU)
    assert process.returncode == 2
    assert list(tmp_path.iterdir()) == []


@commands
def test_an_unknown_device_is_refused(
    fwdllm: Cli, data: Path, tmp_path: Path, command: str
) -> None:
    outcome = fwdllm(*arguments(command, data, tmp_path), "--device", "quantum")
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("fwdllm: device must be cpu or cuda")
    assert outcome.err.endswith(", not 'quantum'\n")
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["tune", "simulate"])
def test_a_memory_budget_is_for_the_cpu(
    fwdllm: Cli, data: Path, tmp_path: Path, command: str
) -> None:
    options = ("--device", "cuda", "--memory-budget", "1G")
    outcome = fwdllm(*arguments(command, data, tmp_path), *options)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.startswith("fwdllm: a memory budget is for device cpu")
    assert outcome.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# What comes out


def theta(model: Path, adapter: Path) -> np.ndarray:
    engine = Engine.load(model, adapter=adapter)
    assert engine.adapter is not None
    return engine.adapter.theta


def assert_moved_alike(
    start: np.ndarray, got: np.ndarray, want: np.ndarray, tolerance: float
) -> None:
    moved = np.linalg.norm(want - start)
    assert moved > 1e-3
    assert 0 < np.linalg.norm(got - want) < tolerance * moved


@needs_triton
@pytest.mark.parametrize("method", [("--method", "forward-ad", "-k", 2), ()], ids=str)
def test_the_kernels_of_a_gpu_tune_as_those_of_the_cpu(
    model: Path,
    words: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: tuple[object, ...],
) -> None:
    """By tangents, and by what is the default: one pass forward and one back."""
    # With Adam, the sign of a gradient near zero would move a weight as far as any other.
    options: list[object] = ["--steps", 2, "--batch-size", 1, "--optimizer", "sgd", "--lr", 0.1]
    options += ["--rank", 4, "--held-out", 1, "--eval-every", 0, "--exact", *method]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    found = []
    for device in ("cpu", "cuda"):
        output = tmp_path / f"{device}.gguf"
        process = start_cli(["tune", model, words, "-o", output, *options, "--device", device])
        _, err = process.communicate()
        assert process.returncode == 0, err
        assert ("exact gradients, forward and back" in err) == (not method)
        found.append(theta(model, output))
    empty = Engine.load(model, LoRAConfig(rank=4)).adapter
    assert empty is not None
    assert_moved_alike(empty.theta, found[1], found[0], 1e-4)


def test_the_device_computes_an_evaluation(model: Path, words: Path) -> None:
    cpu, reference = (
        evaluate(model, words, exact=True, device=device).loss for device in ("cpu", "reference")
    )
    assert reference == pytest.approx(cpu, rel=1e-5)
    assert reference != cpu


def test_the_device_computes_for_clients_and_the_cpu_for_the_server(
    model: Path, words: Path, tmp_path: Path
) -> None:
    config = FederationConfig(rounds=2, per_round=2, batch_size=1)
    found = []
    for device in ("cpu", "reference"):
        run, partition = tmp_path / device, Partition(2)
        result = simulate(model, words, run, config, partition=partition, device=device)
        with Ledger(run / NAME) as ledger:
            replayed = replay(ledger).theta
            start = ledger.meta.empty_adapter().theta
        found.append(theta(model, result.adapter))
        np.testing.assert_array_equal(found[-1], replayed)
    assert_moved_alike(start, found[1], found[0], 0.1)  # the CPU rounds activations to 8 bits
