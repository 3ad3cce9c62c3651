"""Small models with random weights of the families whose graphs differ from Llama's and BERT's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from changed_models import changed

from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import Matrix, make_decoder, write_model
from fwdllm.kernels.types import QuantType

# Five layers, so that SmolLM3's fourth has none of the positions that those around it have.
SHAPE = Shape(5, 256, 4, 2, 64, 512, 1024, context=1024, tied=True)
WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 256, 4, 2, 64, 512, 512
KV, ROTATED = KV_HEADS * HEAD_DIM, 48
DENSE = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")

GRANITE: Mapping[str, Any] = {
    "embedding_scale": 6.0,
    "residual_scale": 0.4,
    "attention.scale": 1 / 40,
    "logit_scale": 3.0,
}
PHI3: Mapping[str, Any] = {
    "context_length": 1024,
    "attention.head_count_kv": KV_HEADS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "attention.sliding_window": 16,  # which nobody applies
    "rope.dimension_count": ROTATED,
    "rope.scaling.original_context_length": 256,
    "rope.scaling.attn_factor": 1.2,
}
NOMIC: Mapping[str, Any] = {
    "context_length": 256,
    "attention.layer_norm_epsilon": 1e-5,
    "attention.causal": False,
    "pooling_type": 1,
    "rope.freq_base": 1000.0,
}
MODERN: Mapping[str, Any] = {
    "context_length": 256,
    "block_count": 5,  # of which the first and the fourth see all
    "attention.layer_norm_epsilon": 1e-5,
    "attention.causal": False,
    "attention.sliding_window": 16,  # shorter than the tests' sequences
    "pooling_type": 1,
    "rope.freq_base": 16000.0,
    "rope.freq_base_swa": 500.0,
}

# Of each family: the matrices that an adapter can be for.
TARGETS = {
    "granite": DENSE,
    "smollm3": DENSE,
    "phi3": ("attn_output", "attn_qkv", "ffn_down", "ffn_up"),
    "nomic-bert": ("attn_output", "attn_qkv", "ffn_down", "ffn_gate", "ffn_up"),
    "modern-bert": ("attn_output", "attn_qkv", "ffn_down", "ffn_up"),
}
ENCODERS = ("nomic-bert", "modern-bert")


def make_family(path: Path, name: str, type: str = "F32", **metadata: Any) -> Path:
    """Write a model of a family of ``TARGETS``. metadata: added to its own, or replacing it."""
    if name == "phi3":
        _make(path, name, PHI3 | metadata, *_phi3(), QuantType[type])
    elif name == "modern-bert":
        found = MODERN | metadata
        _make(path, name, found, *_modern(found["block_count"]), QuantType[type])
    elif name == "nomic-bert":
        plain = path.with_suffix(".plain")
        _make(plain, name, NOMIC | metadata, *_nomic(), QuantType[type])
        types = {"general.architecture": name, "tokenizer.ggml.token_type_count": 2}
        changed(path, plain, types)
    else:
        keys = metadata if name == "smollm3" else GRANITE | metadata
        make_decoder(path, replace(SHAPE, architecture=name), QuantType[type], 1, keys)
    return path


def _make(
    path: Path,
    name: str,
    metadata: Mapping[str, Any],
    matrices: Mapping[str, tuple[int, int]],
    vectors: Mapping[str, np.ndarray],
    type: QuantType,
) -> None:
    rng = np.random.default_rng(2)
    dimensions = {
        "embedding_length": WIDTH,
        "block_count": 2,
        "feed_forward_length": HIDDEN,
        "attention.head_count": HEADS,
        "vocab_size": VOCAB,
    }
    large = [
        Matrix(f"{tensor}.weight", shape, (0.5 if "down" in tensor else 1) / math.sqrt(shape[1]))
        for tensor, shape in matrices.items()
    ]
    write_model(path, name, {**dimensions, **metadata}, VOCAB, large, vectors, type, rng)


def _phi3() -> tuple[dict[str, tuple[int, int]], dict[str, np.ndarray]]:
    matrices = {"token_embd": (VOCAB, WIDTH), "output": (VOCAB, WIDTH)}
    vectors = {
        "output_norm.weight": _norm(WIDTH),
        "rope_factors_short.weight": np.geomspace(1, 2, ROTATED // 2, dtype=np.float32),
        "rope_factors_long.weight": np.geomspace(1, 50, ROTATED // 2, dtype=np.float32),
    }
    for i in range(2):
        matrices |= {
            f"blk.{i}.attn_qkv": (WIDTH + 2 * KV, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_up": (2 * HIDDEN, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, HIDDEN),
        }
        vectors |= {f"blk.{i}.{n}_norm.weight": _norm(WIDTH, i) for n in ("attn", "ffn")}
    return matrices, vectors


def _nomic() -> tuple[dict[str, tuple[int, int]], dict[str, np.ndarray]]:
    matrices = {"token_embd": (VOCAB, WIDTH)}
    vectors = _with_bias("token_embd_norm", 3)
    vectors["token_types.weight"] = np.stack([_norm(WIDTH, 6, 0.0), _norm(WIDTH, 7, 0.0)])
    for i in range(2):
        matrices |= {
            f"blk.{i}.attn_qkv": (3 * WIDTH, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_gate": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_up": (HIDDEN, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, HIDDEN),
        }
        for n, norm in enumerate(("attn_output_norm", "layer_output_norm")):
            vectors |= _with_bias(f"blk.{i}.{norm}", 2 * i + n)
    return matrices, vectors


def _modern(n_layers: int) -> tuple[dict[str, tuple[int, int]], dict[str, np.ndarray]]:
    matrices = {"token_embd": (VOCAB, WIDTH)}
    vectors = {f"{name}_norm.weight": _norm(WIDTH, 3) for name in ("token_embd", "output")}
    for i in range(n_layers):
        matrices |= {
            f"blk.{i}.attn_qkv": (3 * WIDTH, WIDTH),
            f"blk.{i}.attn_output": (WIDTH, WIDTH),
            f"blk.{i}.ffn_up": (2 * HIDDEN, WIDTH),
            f"blk.{i}.ffn_down": (WIDTH, HIDDEN),
        }
        norms = ("attn", "ffn") if i else ("ffn",)
        vectors |= {f"blk.{i}.{n}_norm.weight": _norm(WIDTH, i + 5) for n in norms}
    return matrices, vectors


def _norm(n: int, seed: int = 5, mean: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 0.1, n).astype(np.float32)


def _with_bias(name: str, seed: int) -> dict[str, np.ndarray]:
    weight, bias = _norm(WIDTH, seed), _norm(WIDTH, seed + 20, 0.0)
    return {f"{name}.weight": weight, f"{name}.bias": bias}
