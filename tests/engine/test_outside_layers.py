"""Adapters of the output matrix and the embedding, as Unsloth and axolotl write them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter

from fwdllm.adapters import export
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.adapters import safetensors
from fwdllm.engine.adapters.io import save_gguf, save_peft
from fwdllm.engine.errors import AdapterError
from fwdllm.inference import generate

OUTPUT = "adapts the output matrix (lm_head in PEFT), but adapters are applied to matrices of"
EMBEDDING = "adapts the embedding (embed_tokens in PEFT), but adapters are applied to matrices of"
RANK, WIDTH, VOCAB = 4, 256, 2048


def factor(*shape: int) -> np.ndarray:
    return np.full(shape, 0.01, np.float32)


PAIRS = {
    "output": ({"output": (factor(RANK, WIDTH), factor(VOCAB, RANK))}, OUTPUT),
    # PEFT's orientation, and that of llama.cpp's converter.
    "embedding": ({"token_embd": (factor(RANK, VOCAB), factor(WIDTH, RANK))}, EMBEDDING),
    "transposed": ({"token_embd": (factor(VOCAB, RANK), factor(WIDTH, RANK))}, EMBEDDING),
}


def said(adapter: Path, model: Path, folder: Path) -> set[str]:
    """What evaluating, generating and exporting say of an adapter."""
    found = set()
    for attempt in (
        lambda: Engine.load(model, adapter=adapter),
        lambda: Engine.load(model, adapter=adapter, backend="llama.cpp"),
        lambda: generate(model, "Hello", adapter=adapter, max_tokens=1),
        lambda: export(adapter, folder / "out.gguf", model),
        lambda: export(adapter, folder / "out", model),
    ):
        with pytest.raises(AdapterError) as raised:
            attempt()
        found.add(str(raised.value))
    return found


@pytest.mark.parametrize("kind", PAIRS)
def test_every_command_names_the_matrix(bundled: Path, tmp_path: Path, kind: str) -> None:
    """The output of this model is its embedding: llama.cpp ended the process on "transposed"."""
    pairs, what = PAIRS[kind]
    path = tmp_path / "adapter.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    layer = {"blk.0.attn_v": (factor(RANK, WIDTH), factor(WIDTH // 2, RANK))}
    for name, (a, b) in (layer | pairs).items():
        writer.add_tensor(f"{name}.weight.lora_a", a)
        writer.add_tensor(f"{name}.weight.lora_b", b)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    [sentence] = said(path, bundled, tmp_path)
    assert what in sentence
    assert "another model" not in sentence


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("base_model.model.lm_head.lora_A.weight", OUTPUT),
        ("base_model.model.lm_head.weight", OUTPUT),  # modules_to_save
        ("base_model.model.model.embed_tokens.lora_embedding_A", EMBEDDING),
        ("base_model.model.model.embed_tokens.weight", EMBEDDING),
    ],
)
def test_in_peft_too(bundled: Path, tmp_path: Path, key: str, what: str) -> None:
    engine = Engine.load(bundled, LoRAConfig(rank=RANK))
    assert engine.adapter is not None
    folder = tmp_path / "peft"
    save_peft(engine.adapter, folder, engine.args.n_heads, engine.args.n_kv_heads, "base")
    path = folder / "adapter_model.safetensors"
    tensors = {
        name: tensor.data.view(np.float32).reshape(tensor.shape)
        for name, tensor in safetensors.read(path).tensors.items()
    }
    safetensors.write(path, tensors | {key: factor(RANK, WIDTH)}, {})
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == RANK
    [sentence] = said(folder, bundled, tmp_path)
    assert what in sentence


def test_an_adapter_of_layers_alone_still_works(bundled: Path, tmp_path: Path) -> None:
    engine = Engine.load(bundled, LoRAConfig(rank=RANK))
    assert engine.adapter is not None
    save_gguf(engine.adapter, tmp_path / "a.gguf")
    assert list(generate(bundled, "Hello", adapter=tmp_path / "a.gguf", max_tokens=2))
