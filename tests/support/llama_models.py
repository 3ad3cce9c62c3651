"""Small models for tests of the engine on llama.cpp, and what plain llama.cpp says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gemma_models import GEMMAS, make_gemma

from fwdllm.bench.architectures import ARCHITECTURES, VOCAB, make_small
from fwdllm.bench.inputs import half_trained
from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.llamacpp import generation
from fwdllm.kernels.types import QuantType

SEEDS = np.arange(32, dtype=np.uint64) + 1000
LABELS = ("negative", "positive")
ENCODER = "modern-bert"
DECODERS = [name for name in ARCHITECTURES if name != ENCODER]
OWN_FAMILIES = ["llama", "qwen2", "qwen3", *GEMMAS]
SHAPE = Shape(2, 256, 4, 2, 64, 512, 2048, context=1024)

# At least one matrix of each kind that a model multiplies with.
TARGETS = {
    "olmo2": ("attn_q", "attn_v", "ffn_down", "ffn_up"),
    "phi3": ("attn_qkv", "ffn_down", "ffn_up"),
    "gpt2": ("attn_output", "attn_qkv", "ffn_down"),
    "gptneox": ("attn_qkv", "ffn_down", "ffn_up"),
    "granite": ("attn_k", "attn_v", "ffn_down", "ffn_gate"),
    "stablelm": ("attn_output", "attn_q", "attn_v", "ffn_down"),
    "mixtral": ("attn_q", "attn_v", "ffn_gate_inp"),
    "qwen2moe": ("attn_q", "attn_v", "ffn_down_shexp", "ffn_gate_inp", "ffn_up_shexp"),
    "mamba": ("ssm_dt", "ssm_in", "ssm_out", "ssm_x"),
    ENCODER: ("attn_qkv", "ffn_down", "ffn_up"),
}

# How far apart losses of an example may be, in nats: llama.cpp rounds activations to int8 where
# weights are quantized, and the engine lets it keep keys and values in float16. Measured: at most
# 0.0015 (olmo2) and 0.014. Where a token goes to another expert for that, 0.0034 at once.
NOISE = {"F16": 3e-3, "Q8_0": 0.04}
EXPERT_NOISE = {"F16": 0.015, "Q8_0": 0.04}


def noise_of(name: str, type: str) -> float:
    return (EXPERT_NOISE if name in ("mixtral", "qwen2moe") else NOISE)[type]


Make = Callable[..., Path]


def make_model(folder: Path, name: str, type: str = "F16") -> Path:
    """A file of an architecture and a type in a folder, written if it is not there."""
    path = folder / f"{name}.{type}.gguf"
    if not path.exists():
        if name in GEMMAS:
            make_gemma(path, name, QuantType[type])
        elif name in OWN_FAMILIES:
            make_decoder(path, replace(SHAPE, architecture=name), QuantType[type], seed=1)
        else:
            make_small(path, name, QuantType[type])
    return path


def tuned(path: Path, name: str, rank: int = 2, **options: Any) -> Engine:
    """An engine on llama.cpp with a half trained adapter."""
    options.setdefault("backend", "llama.cpp")
    options.setdefault("labels", LABELS if name == ENCODER else ())
    return half_trained(Engine.load(path, LoRAConfig(rank, targets=TARGETS[name]), **options))


def random_batch(*lengths: int, labels: int | None = None, encoder: bool = False) -> Batch:
    """Sequences of random tokens. labels: how many last ones count, by default all."""
    rng = np.random.default_rng(len(lengths))
    return pack(
        [
            Tokens(
                rng.integers(3, VOCAB, n).tolist(),
                [not encoder and (labels is None or i >= n - labels) for i in range(n)],
                k % 2 if encoder else None,
            )
            for k, n in enumerate(lengths)
        ]
    )


def correlation(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.corrcoef(got, want)[0, 1])


def plain_losses(path: Path, batch: Batch, adapter: Path | None = None) -> np.ndarray:
    """Of each example, by llama.cpp alone: float64 [n_examples]."""
    losses = []
    for i in range(batch.n_sequences):
        one = batch.sequences(i, i + 1)
        logits = generation.logits(path, one.ids.tolist(), adapter, n_threads=1)
        rows = logits[one.label_rows].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
        losses.append(-rows[np.arange(one.n_labels), one.label_ids].mean())
    return np.array(losses)
