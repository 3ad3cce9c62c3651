"""Models of true shape with random weights, for parity tests and benchmarks.

Weights are random blocks of the wanted type, scaled so that activations keep their size; the
tokenizer is the bundled model's, padded to the vocabulary. llama.cpp loads the files too.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import gguf
import numpy as np

from fwdllm.engine.files import atomic_write
from fwdllm.engine.gguf_file import GGUFFile
from fwdllm.kernels.types import QuantType, row_bytes


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder. tied: whether the embedding is the output matrix too."""

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    n_vocab: int
    context: int = 2048
    tied: bool = False


SHAPES = {
    "tinyllama-1.1b": Shape(22, 2048, 32, 4, 64, 5632, 32000),
    "llama-7b": Shape(32, 4096, 32, 32, 128, 11008, 32000),
}

# Bytes of a block, and where its fp16 scale (and the fp16 scale of its mins) lie.
_BLOCKS = {
    QuantType.Q4_0: (18, 0, None),
    QuantType.Q4_1: (20, 0, 2),
    QuantType.Q8_0: (34, 0, None),
    QuantType.Q4_K: (144, 0, 2),
    QuantType.Q5_K: (176, 0, 2),
    QuantType.Q6_K: (210, 208, None),
}

# For random bytes: standard deviation of a weight per unit of scale, and the ratio of the scale
# of the mins to it that makes the mean zero (6-bit scales and mins average 31.5).
_SPREAD = {
    QuantType.Q4_0: (4.6, 0.0),
    QuantType.Q4_1: (4.6, -7.5),
    QuantType.Q8_0: (73.9, 0.0),
    QuantType.Q4_K: (265.0, 7.5),
    QuantType.Q5_K: (520.0, 15.5),
    QuantType.Q6_K: (1370.0, 0.0),
}


def random_weights(
    rng: np.random.Generator, type: QuantType, n_out: int, n_in: int, std: float
) -> np.ndarray:
    """A random matrix in the block format of ``type``, of about ``std``: uint8 [n_out, bytes]."""
    if type not in _BLOCKS:
        values = rng.normal(scale=std, size=(n_out, n_in)).astype(np.float32)
        if type == QuantType.BF16:
            return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
        return values.astype(np.float16 if type == QuantType.F16 else np.float32).view(np.uint8)
    size, at, min_at = _BLOCKS[type]
    spread, min_ratio = _SPREAD[type]
    data = rng.integers(0, 256, (n_out, row_bytes(type, n_in)), np.uint8)
    blocks = data.reshape(n_out, -1, size)
    scale = (std / spread * rng.uniform(0.5, 1.5, blocks.shape[:2])).astype(np.float16)
    blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    if min_at is not None:
        blocks[..., min_at : min_at + 2] = (scale * np.float16(min_ratio))[..., None].view(np.uint8)
    return data


def make_decoder(
    path: str | os.PathLike[str],
    architecture: str,
    shape: Shape,
    type: QuantType,
    seed: int = 0,
    metadata: dict[str, float | int | str] | None = None,
    factors: np.ndarray | None = None,
) -> None:
    """Write a decoder of random weights: "llama", "qwen2" or "qwen3".

    metadata: further keys without the architecture's prefix, such as "rope.scaling.type".
    factors: float32 [head_dim / 2], Llama 3's rope frequency factors.
    """
    rng = np.random.default_rng(seed)
    with atomic_write(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        _add_metadata(writer, architecture, shape, metadata or {})
        _add_tokenizer(writer, shape.n_vocab)
        for name, n_out, n_in in _matrices(shape):
            # Halved where a block's output joins the residual stream, to keep that in range.
            gain = 0.5 if name.endswith(("attn_output", "ffn_down")) else 1.0
            std = 1.0 if name == "token_embd" else gain / math.sqrt(n_in)
            data = random_weights(rng, type, n_out, n_in, std)
            writer.add_tensor(f"{name}.weight", data, raw_dtype=type)
        for name, size in _vectors(architecture, shape):
            bias = name.endswith(".bias")
            values = rng.normal(0 if bias else 1, 0.1, size).astype(np.float32)
            writer.add_tensor(name, values)
        if factors is not None:
            writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _matrices(shape: Shape) -> list[tuple[str, int, int]]:
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    found = [("token_embd", shape.n_vocab, shape.width)]
    if not shape.tied:
        found.append(("output", shape.n_vocab, shape.width))
    for i in range(shape.n_layers):
        found += [
            (f"blk.{i}.attn_q", q, shape.width),
            (f"blk.{i}.attn_k", kv, shape.width),
            (f"blk.{i}.attn_v", kv, shape.width),
            (f"blk.{i}.attn_output", shape.width, q),
            (f"blk.{i}.ffn_gate", shape.hidden, shape.width),
            (f"blk.{i}.ffn_up", shape.hidden, shape.width),
            (f"blk.{i}.ffn_down", shape.width, shape.hidden),
        ]
    return found


def _vectors(architecture: str, shape: Shape) -> list[tuple[str, int]]:
    found = [("output_norm.weight", shape.width)]
    for i in range(shape.n_layers):
        found += [(f"blk.{i}.{n}.weight", shape.width) for n in ("attn_norm", "ffn_norm")]
        if architecture == "qwen2":
            found.append((f"blk.{i}.attn_q.bias", shape.n_heads * shape.head_dim))
            kv = shape.n_kv_heads * shape.head_dim
            found += [(f"blk.{i}.attn_{n}.bias", kv) for n in "kv"]
        if architecture == "qwen3":
            found += [(f"blk.{i}.attn_{n}_norm.weight", shape.head_dim) for n in "qk"]
    return found


def _add_metadata(
    writer: gguf.GGUFWriter,
    architecture: str,
    shape: Shape,
    metadata: dict[str, float | int | str],
) -> None:
    writer.add_name("synthetic")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(shape.n_vocab)
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[value.__class__](f"{architecture}.{key}", value)


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    with as_file(files("fwdllm") / "assets" / "fwdllm-tiny.gguf") as path:
        source = GGUFFile.open(path)
    tokens = list(source.strings("tokenizer.ggml.tokens"))[:n_vocab]
    kinds = source.numbers("tokenizer.ggml.token_type").tolist()[:n_vocab]
    padding = n_vocab - len(tokens)
    writer.add_tokenizer_model(source.string("tokenizer.ggml.model"))
    writer.add_tokenizer_pre(source.string("tokenizer.ggml.pre"))
    writer.add_token_list(tokens + [f"[unused {i}]" for i in range(padding)])
    writer.add_token_types(kinds + [int(gguf.TokenType.UNUSED)] * padding)
    writer.add_token_merges(source.strings("tokenizer.ggml.merges"))
    writer.add_bos_token_id(source.integer("tokenizer.ggml.bos_token_id"))
    writer.add_eos_token_id(source.integer("tokenizer.ggml.eos_token_id"))
    writer.add_add_bos_token(True)
