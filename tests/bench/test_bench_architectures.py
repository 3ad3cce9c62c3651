"""Small models of many architectures: llama.cpp runs them, and they make sense."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
from cli_runs import Cli

from fwdllm.bench import synthetic
from fwdllm.bench.architectures import ARCHITECTURES, VOCAB, make_small
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.llamacpp.losses import negative_log_likelihood
from fwdllm.kernels.types import SUPPORTED_TYPES, QuantType

pytestmark = pytest.mark.usefixtures("one_thread")
ENCODERS = ("modern-bert",)
DECODERS = [name for name in ARCHITECTURES if name not in ENCODERS]
TYPES = [QuantType.Q8_0, QuantType.Q4_0]


def make(folder: Path, name: str, type: QuantType, seed: int = 0) -> Path:
    path = folder / "model.gguf"
    make_small(path, name, type, seed)
    return path


def logits(path: Path, ids: list[int]) -> np.ndarray:
    return generation.logits(path, ids, n_threads=1)


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_run_in_llama_cpp(tmp_path: Path, name: str, type: QuantType) -> None:
    path = make(tmp_path, name, type)
    ids = np.random.default_rng(1).integers(VOCAB, size=48).tolist()
    found = logits(path, ids)
    assert found.shape == (48, VOCAB)
    assert np.isfinite(found).all()
    assert 0.3 < found.std() < 3
    nll = negative_log_likelihood(found[:-1].copy(), np.array(ids[1:]))
    assert abs(nll.mean() - np.log(VOCAB)) < 2.5

    # Every token matters to those behind it, and to no others.
    other = ids.copy()
    other[20] = (ids[20] + 1) % VOCAB
    difference = np.abs(logits(path, other) - found).max(axis=1)
    assert (difference[20:23] > 0.02 * found.std()).all()
    assert difference[:20].max() < 1e-3 * found.std()


@pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_run_in_llama_cpp(tmp_path: Path, name: str, type: QuantType) -> None:
    path = make(tmp_path, name, type)
    texts = ["the cat saw the dog", "the dog saw the cat", "the cat saw the dog " * 8, "one two"]
    found = generation.embed(path, texts, n_threads=1)
    assert np.isfinite(found).all()
    alike = found @ found.T
    assert alike[0, 1] < 0.999  # the same tokens in another order
    assert alike[0, 3] < 0.9


@pytest.mark.parametrize("type", SUPPORTED_TYPES, ids=lambda type: type.name)
@pytest.mark.parametrize("name", ["qwen2moe", "mamba"])
def test_every_type(tmp_path: Path, name: str, type: QuantType) -> None:
    path = make(tmp_path, name, type)
    assert GGUFFile.open(path).tensors["token_embd.weight"].type == type
    found = logits(path, list(range(16)))
    assert np.isfinite(found).all()
    assert 0.3 < found.std() < 3


def test_a_seed_makes_a_model(tmp_path: Path) -> None:
    first, second, again = (
        make(tmp_path, "olmo2", QuantType.Q8_0, seed).read_bytes() for seed in (0, 1, 0)
    )
    assert first == again != second


def test_an_unknown_architecture(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no architecture 'gpt-5'; these are: olmo2, phi3, "):
        make_small(tmp_path / "model.gguf", "gpt-5")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(synthetic, "_append", fail)
    with pytest.raises(OSError, match="No space left"):
        make_small(tmp_path / "model.gguf", "olmo2")
    assert not list(tmp_path.iterdir())


def test_the_command_knows_both_kinds_of_names(fwdllm: Cli, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    command = ("bench", "make-model", "--type", "Q8_0", "--seed", 3, path, "--shape")
    outcome = fwdllm(*command, "phi3")
    assert (outcome.code, outcome.out) == (0, f"{path}\n")
    written = path.read_bytes()
    assert written == make(tmp_path, "phi3", QuantType.Q8_0, seed=3).read_bytes()

    outcome = fwdllm(*command, "gpt-5")
    assert outcome.code == 2
    assert "these are: tiny, " in outcome.err
    assert ", olmo2, " in outcome.err
