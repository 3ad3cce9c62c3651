"""Models with an adapter merged into them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from changed_models import changed
from cli_runs import MODEL
from gguf import GGMLQuantizationType
from llama_models import TARGETS as ARCHITECTURE_TARGETS
from llama_models import make_model
from small_adapters import random_adapter

from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.adapters.adapter import Head
from fwdllm.engine.adapters.io import read_adapter, save_gguf, save_peft
from fwdllm.engine.adapters.merge import merge
from fwdllm.engine.adapters.stored import StoredAdapter
from fwdllm.engine.errors import AdapterError, ConfigError, NumericsError, UnsupportedError
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.gguf.header import metadata_bytes
from fwdllm.engine.llamacpp import generation
from fwdllm.kernels.types import QuantType, Weight

IDS = [5, 77, 1200, 9, 640, 31, 1999, 88]
TARGETS = ("attn_output", "attn_q", "ffn_down")


def tuned(folder: Path, model: Path = MODEL, **options: object) -> Path:
    """An adapter that changes much."""
    engine = Engine.load(model, LoRAConfig(4, 8.0, TARGETS, **options))  # type: ignore[arg-type]
    assert engine.adapter is not None
    theta = engine.adapter.theta
    theta[:] = np.random.default_rng(3).normal(0, 0.05, theta.size)
    save_gguf(engine.adapter, folder / "adapter.gguf")
    return folder / "adapter.gguf"


def merged(adapter: Path, path: Path, type: str = "f16", model: Path = MODEL) -> Path:
    args = Engine.load(model).args
    stored = read_adapter(adapter, "llama", args.n_heads, args.n_kv_heads)
    merge(GGUFFile.open(model), stored, path, type)
    return path


def logits(path: Path, adapter: Path | None = None) -> np.ndarray:
    return Engine.load(path, adapter=adapter, exact=True).logits(IDS)


def content(file: GGUFFile, name: str) -> bytes:
    tensor = file.tensors[name]
    return file.path.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]


@pytest.mark.parametrize(("type", "error"), [("f16", 2e-3), ("q8_0", 0.06)])
@pytest.mark.parametrize("rslora", [False, True])
def test_it_computes_what_model_and_adapter_do(
    tmp_path: Path, type: str, error: float, rslora: bool
) -> None:
    adapter = tuned(tmp_path, rslora=rslora)
    path = merged(adapter, tmp_path / "merged.gguf", type)
    want, base = logits(MODEL, adapter), logits(MODEL)
    assert np.abs(logits(path) - want).max() < error * np.abs(want - base).max()
    # llama.cpp rounds what it multiplies 4-bit weights with, and F16 weights not.
    theirs = generation.logits(path, IDS), generation.logits(MODEL, IDS, adapter)
    assert np.abs(theirs[0] - theirs[1]).mean() < 0.25 * np.abs(want - base).mean()


def test_all_else_is_the_models_byte_for_byte(tmp_path: Path) -> None:
    path = merged(tuned(tmp_path), tmp_path / "merged.gguf")
    before, after = GGUFFile.open(MODEL), GGUFFile.open(path)
    assert metadata_bytes(path) == metadata_bytes(MODEL)
    assert list(after.tensors) == list(before.tensors)
    for name, tensor in after.tensors.items():
        if name.removesuffix(".weight").endswith(TARGETS):
            assert tensor.type == GGMLQuantizationType.F16
        else:
            assert content(after, name) == content(before, name)


@pytest.mark.parametrize("type", ["F16", "Q8_0", "F32", "BF16"])
def test_types_that_can_be_rounded_again_may_stay(tmp_path: Path, type: str) -> None:
    model = make_model(tmp_path, "llama", type)
    adapter = tuned(tmp_path, model)
    path = merged(adapter, tmp_path / "merged.gguf", "own", model)
    file = GGUFFile.open(path)
    assert file.tensors["blk.0.attn_q.weight"].type.name == type
    want, base = logits(model, adapter), logits(model)
    error = {"F32": 1e-5, "F16": 2e-3, "BF16": 0.02, "Q8_0": 0.03}[type]
    assert np.abs(logits(path) - want).max() < error * np.abs(want - base).max()


def test_a_peft_folder_is_merged_too(tmp_path: Path) -> None:
    adapter = tuned(tmp_path)
    engine = Engine.load(MODEL, adapter=adapter)
    assert engine.adapter is not None
    args = engine.args
    save_peft(engine.adapter, tmp_path / "peft", args.n_heads, args.n_kv_heads, "a/model")
    found = [merged(a, tmp_path / f"{a.stem}-.gguf") for a in (adapter, tmp_path / "peft")]
    assert found[0].read_bytes() == found[1].read_bytes()


def weight(values: np.ndarray) -> Weight:
    data = values.astype(np.float32)
    return Weight(data.view(np.uint8), QuantType.F32, *data.shape)


def of_ends(name: str, left: np.ndarray, right: np.ndarray) -> StoredAdapter:
    """An adapter of rank 1 for the output, or for the embedding as llama.cpp has it."""
    pair = (
        (weight(left), weight(right.T)) if name == "token_embd" else (weight(right), weight(left))
    )
    return StoredAdapter(Path("adapter.gguf"), {name: pair}, alpha=2.0)


def test_a_tied_output_is_changed_without_the_embedding(tmp_path: Path) -> None:
    file = GGUFFile.open(MODEL)
    assert "output.weight" not in file.tensors
    n_vocab, width = file.tensors["token_embd.weight"].shape
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(n_vocab, 1)), rng.normal(size=(1, width))
    path = tmp_path / "merged.gguf"
    merge(file, of_ends("output", left, right), path, "f16")
    after = GGUFFile.open(path)
    assert content(after, "token_embd.weight") == content(file, "token_embd.weight")
    change = logits(path) - logits(MODEL)
    # 2 * left (right . h): of every token the same vector, as much as its features want.
    again = change @ left @ left.T / (left.T @ left)
    assert np.abs(change - again).max() < 1e-2 * np.abs(change).max()
    assert np.abs(change).max() > 1
    assert np.abs(generation.logits(path, IDS) - logits(path)).max() < 0.1 * np.abs(change).max()


def test_a_tied_embedding_is_changed_without_the_output(tmp_path: Path) -> None:
    file = GGUFFile.open(MODEL)
    n_vocab, width = file.tensors["token_embd.weight"].shape
    left = np.zeros((n_vocab, 1))
    left[IDS[3]] = 1  # this token's embedding only
    path = tmp_path / "merged.gguf"
    right = np.random.default_rng(0).normal(size=(1, width))
    merge(file, of_ends("token_embd", left, right), path, "f16")
    after = GGUFFile.open(path)
    assert content(after, "output.weight") == content(file, "token_embd.weight")
    change = np.abs(logits(path) - logits(MODEL)).max(axis=1)
    assert change[:3].max() < 1e-2 < 1 < change[3:].min()
    theirs = generation.logits(path, IDS) - generation.logits(MODEL, IDS)
    assert np.abs(theirs[:3]).max() < 0.2 < 1 < np.abs(theirs[3:]).max()


@pytest.mark.parametrize(
    ("change", "error", "what"),
    [
        (lambda a: replace(a, head=Head(("a", "b"), 16)), AdapterError, "classification head"),
        (lambda a: replace(a, pairs={"blk.9.x": a.pairs["output"]}), AdapterError, "another model"),
        (lambda a: replace(a, alpha=1e30), NumericsError, "values that F16 cannot hold"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    tmp_path: Path,
    change: Callable[[StoredAdapter], StoredAdapter],
    error: type[Exception],
    what: str,
) -> None:
    file = GGUFFile.open(MODEL)
    n_vocab, width = file.tensors["token_embd.weight"].shape
    adapter = of_ends("output", np.ones((n_vocab, 1)), np.ones((1, width)))
    with pytest.raises(error, match=what):
        merge(file, change(adapter), tmp_path / "merged.gguf", "f16")
    assert not list(tmp_path.iterdir())


def test_a_split_model_and_a_type_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    file = GGUFFile.open(MODEL)
    stored = read_adapter(tuned(tmp_path), "llama", 4, 4)
    path, name = tmp_path / "merged.gguf", "blk.0.attn_q.weight"
    split = {**file.metadata, "split.count": 2}
    with pytest.raises(ConfigError, match="is split: join its files first"):
        merge(replace(file, metadata=split), stored, path, "f16")
    unknown = replace(file.tensors[name], type=GGMLQuantizationType.I8)
    with pytest.raises(UnsupportedError, match="has the type I8, which is not read"):
        merge(replace(file, tensors={**file.tensors, name: unknown}), stored, path, "f16")
    assert not path.exists()


@pytest.mark.parametrize("name", ["olmo2", "mamba"])
def test_models_that_llama_cpp_alone_computes_are_merged_too(tmp_path: Path, name: str) -> None:
    model, adapter = make_model(tmp_path, name, "F16"), tmp_path / "adapter.gguf"
    engine = Engine.load(model, LoRAConfig(4, 8.0, targets=ARCHITECTURE_TARGETS[name]))
    assert engine.adapter is not None
    theta = engine.adapter.theta
    theta[:] = np.random.default_rng(0).normal(0, 0.05, theta.size)
    save_gguf(engine.adapter, adapter)
    args, path = engine.args, tmp_path / "merged.gguf"
    stored = read_adapter(adapter, engine.architecture, args.n_heads, args.n_kv_heads)
    merge(GGUFFile.open(model), stored, path, "own")
    base, want, got = (
        generation.logits(file, [5, 77, 300, 9], lora, n_threads=1)
        for file, lora in ((model, None), (model, adapter), (path, None))
    )
    assert np.abs(got - want).mean() < 0.01 * np.abs(want - base).mean()


def test_types_too_coarse_and_rows_too_short_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is Q4_0, which is too coarse to round it again"):
        merged(tuned(tmp_path), tmp_path / "merged.gguf", "own")
    with pytest.raises(ConfigError, match="type must be one of"):
        merged(tuned(tmp_path), tmp_path / "merged.gguf", "q4_0")


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_gguf(random_adapter(), tmp_path / "other.gguf")
    with pytest.raises(AdapterError, match="it was made for another model"):
        merged(tmp_path / "other.gguf", tmp_path / "merged.gguf")


def test_a_tensor_without_dimensions_is_left_as_it_is(tmp_path: Path) -> None:
    odd = {"scale.weight": np.array(2.0, np.float32)}
    model = changed(tmp_path / "odd.gguf", MODEL, tensors=odd)
    adapter = tuned(tmp_path)
    stored = read_adapter(adapter, "llama", 4, 2)
    merge(GGUFFile.open(model), stored, tmp_path / "merged.gguf", "f16")
    made = GGUFFile.open(tmp_path / "merged.gguf")
    assert content(made, "scale.weight") == odd["scale.weight"].tobytes()
