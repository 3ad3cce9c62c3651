"""Small Gemma models with random weights, and every feature of theirs at sizes that matter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.bench.synthetic import Matrix, write_model
from fwdllm.kernels.types import QuantType

GEMMAS = ("gemma", "gemma2", "gemma3")
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
LAYERS, VOCAB = 4, 512
WINDOW = 9  # shorter than the tests' sequences
_DIMENSIONS = {
    "context_length": 256,
    "embedding_length": 256,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 1,
    "attention.key_length": 128,  # wider than the width has heads
    "attention.layer_norm_rms_epsilon": 1e-6,
    "vocab_size": VOCAB,
}
# Those of 27B, whose scores have a scale of their own.
TINY = {"embedding_length": 64, "feed_forward_length": 64, "attention.key_length": 32}
# Soft caps that bend scores and logits of about 1.
OPTIONS: dict[str, dict[str, Any]] = {
    "gemma": {},
    "gemma2": {
        "attention.sliding_window": WINDOW,
        "attn_logit_softcapping": 1.5,
        "final_logit_softcapping": 2.0,
    },
    "gemma3": {
        "attention.sliding_window": WINDOW,
        "attention.sliding_window_pattern": 2,
        "rope.freq_base": 1e6,
        "rope.scaling.type": "linear",
        "rope.scaling.factor": 8.0,
        "rope.freq_base_swa": 5000.0,
    },
}


def make_gemma(
    path: Path,
    architecture: str,
    type: QuantType = QuantType.F32,
    metadata: Mapping[str, Any] | None = None,
    n_layers: int = LAYERS,
    seed: int = 0,
) -> Path:
    """Write a model; returns its path. metadata: in place of ``OPTIONS``, None leaves one out."""
    rng = np.random.default_rng(seed)
    keys = {
        **_DIMENSIONS,
        **OPTIONS[architecture],
        **(metadata or {}),
        "block_count": n_layers,
    }
    keys["attention.value_length"] = head_dim = keys["attention.key_length"]
    width, hidden = keys["embedding_length"], keys["feed_forward_length"]
    q, kv = (keys[f"attention.head_count{of}"] * head_dim for of in ("", "_kv"))
    linear = dict(zip(LINEAR, [(q, width), (kv, width), (kv, width), (width, q),
        (hidden, width), (hidden, width), (width, hidden)], strict=True))  # fmt: skip
    vectors = {"attn_norm": width, "ffn_norm": width}
    if architecture != "gemma":
        vectors |= {"post_attention_norm": width, "post_ffw_norm": width}
    if architecture == "gemma3":
        vectors |= {"attn_q_norm": head_dim, "attn_k_norm": head_dim}
    matrices = [Matrix("token_embd.weight", (VOCAB, width), 1 / math.sqrt(width))]
    norms = {"output_norm.weight": width}
    for i in range(n_layers):
        matrices += [
            Matrix(f"blk.{i}.{name}.weight", shape, 1 / math.sqrt(shape[1]))
            for name, shape in linear.items()
        ]
        norms |= {f"blk.{i}.{name}.weight": n for name, n in vectors.items()}
    small = {name: rng.normal(1, 0.2, n).astype(np.float32) for name, n in norms.items()}
    given = {key: value for key, value in keys.items() if value is not None}
    write_model(path, architecture, given, VOCAB, matrices, small, type, rng)
    return path
