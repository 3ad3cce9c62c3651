"""BERT (arXiv 1810.04805) encoders with pooling: MiniLM, BGE and other sentence encoders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from fwdllm.engine.errors import ModelError, UnsupportedError
from fwdllm.engine.models.dimensions import Dimensions
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.weights import Shapes
from fwdllm.kernels.api import Array

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

POOLINGS = {1: "mean", 2: "cls"}  # llama.cpp's enum llama_pooling_type
# Of every token: sentences are not compared in pairs. One array, so that a GPU copies it once.
FIRST_TYPE = np.zeros(1, np.int32)


@dataclass(frozen=True, kw_only=True)
class Args(Dimensions):
    """Shapes and constants, from the metadata of a GGUF file. pooling: "mean" or "cls"."""

    n_types: int
    norm_eps: float
    pooling: str


def read_args(file: GGUFFile, arch: str = "bert") -> Args:
    """Args of a file; ModelError if metadata is missing or makes no sense."""
    width = file.positive(f"{arch}.embedding_length")
    n_heads = file.positive(f"{arch}.attention.head_count")
    if width % n_heads:
        raise ModelError(f"{file.path}: width {width} is not whole heads of {n_heads}")
    pooling = file.integer(f"{arch}.pooling_type", 1)
    if pooling not in POOLINGS:
        raise UnsupportedError(file.path, f"pooling type {pooling} is not supported")
    return Args(
        n_layers=file.integer(f"{arch}.block_count", maximum=len(file.tensors)),
        width=width,
        n_heads=n_heads,
        n_kv_heads=n_heads,
        head_dim=width // n_heads,
        hidden=file.positive(f"{arch}.feed_forward_length"),
        n_vocab=file.matrix_rows("token_embd.weight"),
        n_types=file.matrix_rows(types) if (types := "token_types.weight") in file.tensors else 0,
        hidden_arrays=2,
        context=file.positive(f"{arch}.context_length"),
        norm_eps=file.number(f"{arch}.attention.layer_norm_epsilon"),
        pooling=POOLINGS[pooling],
    )


def shapes(args: Args) -> tuple[Shapes, Shapes]:
    """Tensors the graph needs and those it uses if present, with their shapes."""
    required: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (args.n_vocab, args.width),
        "token_types.weight": (args.n_types, args.width),
        "position_embd.weight": (args.context, args.width),
        "token_embd_norm.weight": (args.width,),
        "token_embd_norm.bias": (args.width,),
    }
    optional: dict[str, tuple[int, ...]] = {}
    for i in range(args.n_layers):
        linear = {
            "attn_q": (args.width, args.width),
            "attn_k": (args.width, args.width),
            "attn_v": (args.width, args.width),
            "attn_output": (args.width, args.width),
            "ffn_up": (args.hidden, args.width),
            "ffn_down": (args.width, args.hidden),
        }
        for name, shape in linear.items():
            required[f"blk.{i}.{name}.weight"] = shape
            optional[f"blk.{i}.{name}.bias"] = shape[:1]
        for name in ("attn_output_norm", "layer_output_norm"):
            required[f"blk.{i}.{name}.weight"] = (args.width,)
            required[f"blk.{i}.{name}.bias"] = (args.width,)
    return required, optional


def embed(args: Args, p: Pass) -> Array:
    """The input of the first layer: float32 [rows, width]."""
    x = p.embedding("token_embd", p.ids)
    x = x + p.embedding("position_embd", p.positions)
    x = x + p.embedding("token_types", FIRST_TYPE)
    return p.layer_norm(x, "token_embd_norm", args.norm_eps)


def layer(args: Args, p: Pass, i: int, x: Array) -> Array:
    """Layer i: float32 [rows, width] to [rows, width]."""
    x = x + _attention(args, p, f"blk.{i}", x)
    return p.in_blocks(x, partial(_feed_forward, args, p, f"blk.{i}"))


def _attention(args: Args, p: Pass, block: str, x: Array) -> Array:
    q, k, v = (p.linear(x, f"{block}.attn_{name}") for name in "qkv")
    return p.linear(p.attention(q, k, v, args.head_dim, causal=False), f"{block}.attn_output")


def _feed_forward(args: Args, p: Pass, block: str, x: Array) -> Array:
    x = p.layer_norm(x, f"{block}.attn_output_norm", args.norm_eps)
    hidden = p.gelu(p.linear(x, f"{block}.ffn_up"))
    x = x + p.linear(hidden, f"{block}.ffn_down")
    return p.layer_norm(x, f"{block}.layer_output_norm", args.norm_eps)


def pool(args: Args, x: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """One feature vector for each sequence: float32 [n_sequences, width]."""
    if args.pooling == "cls":
        return x[starts[:-1]]
    sums = np.add.reduceat(x, starts[:-1], axis=0, dtype=np.float64)
    return (sums / np.diff(starts)[:, None]).astype(np.float32)


def pool_vjp(args: Args, features: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """From cotangents of features [n_sequences, width] those of the rows: float32 [rows, width]."""
    lengths = np.diff(starts)
    if args.pooling == "cls":
        rows = np.zeros((starts[-1], features.shape[1]), np.float32)
        rows[starts[:-1]] = features
        return rows
    return np.repeat((features / lengths[:, None]).astype(np.float32), lengths, axis=0)
