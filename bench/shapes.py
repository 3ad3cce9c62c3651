"""Shapes of well-known decoders, and random weights for them.

Needs only NumPy, for machines where nothing else is installed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.kernels.types import SUPPORTED_TYPES, QuantType, row_bytes


@dataclass(frozen=True)
class Shape:
    """Dimensions of a decoder. tied: whether the embedding is also the output matrix.

    architecture: "llama", "qwen2" or "qwen3".
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    n_vocab: int
    context: int = 2048
    tied: bool = False
    architecture: str = "llama"
    rope_base: float = 10000.0


SHAPES = {
    "tiny": Shape(2, 256, 4, 2, 64, 768, 2048),
    "smollm2-135m": Shape(30, 576, 9, 3, 64, 1536, 49152, 8192, True, rope_base=1e5),
    "qwen2.5-0.5b": Shape(24, 896, 14, 2, 64, 4864, 151936, 32768, True, "qwen2", 1e6),
    "qwen3-0.6b": Shape(28, 1024, 16, 8, 128, 3072, 151936, 40960, True, "qwen3", 1e6),
    "tinyllama-1.1b": Shape(22, 2048, 32, 4, 64, 5632, 32000),
    "llama3-1b": Shape(16, 2048, 32, 8, 64, 8192, 128256, 131072, True, rope_base=5e5),
    "llama3-3b": Shape(28, 3072, 24, 8, 128, 8192, 128256, 131072, True, rope_base=5e5),
    "llama-7b": Shape(32, 4096, 32, 32, 128, 11008, 32000),
    "mistral-7b": Shape(32, 4096, 32, 8, 128, 14336, 32000, 32768),
    "llama3-8b": Shape(32, 4096, 32, 8, 128, 14336, 128256, 8192, rope_base=5e5),
}


def type_named(name: str) -> QuantType:
    """The tensor type of a name; ConfigError, listing the supported types, for other names."""
    types = {type.name: type for type in SUPPORTED_TYPES}
    if name.upper() not in types:
        raise ConfigError(f"there is no tensor type {name!r}; these are: {', '.join(types)}")
    return types[name.upper()]


# Bytes of a block, and the offsets of its fp16 scale and of the fp16 scale of its mins; but the
# scale of MXFP4 is a byte.
_BLOCKS = {
    QuantType.Q4_0: (18, 0, None),
    QuantType.Q4_1: (20, 0, 2),
    QuantType.Q5_0: (22, 0, None),
    QuantType.Q5_1: (24, 0, 2),
    QuantType.Q8_0: (34, 0, None),
    QuantType.Q2_K: (84, 80, 82),
    QuantType.Q3_K: (110, 108, None),
    QuantType.Q4_K: (144, 0, 2),
    QuantType.Q5_K: (176, 0, 2),
    QuantType.Q6_K: (210, 208, None),
    QuantType.IQ4_NL: (18, 0, None),
    QuantType.IQ4_XS: (136, 0, None),
    QuantType.MXFP4: (17, 0, None),
}

# For blocks of random bytes: the standard deviation of a weight for a scale of 1, and the ratio of
# the mins' scale to the scale with which the mean is zero (6-bit scales and mins average 31.5).
_SPREAD = {
    QuantType.Q4_0: (4.6, 0.0),
    QuantType.Q4_1: (4.6, -7.5),
    QuantType.Q5_0: (9.2, 0.0),
    QuantType.Q5_1: (9.2, -15.5),
    QuantType.Q8_0: (73.9, 0.0),
    QuantType.Q2_K: (13.9, 1.5),
    QuantType.Q3_K: (43.3, 0.0),
    QuantType.Q4_K: (265.0, 7.5),
    QuantType.Q5_K: (520.0, 15.5),
    QuantType.Q6_K: (1370.0, 0.0),
    QuantType.IQ4_NL: (67.2, 0.0),
    QuantType.IQ4_XS: (1250.0, 0.0),
    QuantType.MXFP4: (5.9, 0.0),
}


def random_weights(
    rng: np.random.Generator, type: QuantType, n_out: int, n_in: int, std: float
) -> np.ndarray:
    """A random matrix in the format of ``type``, uint8 [n_out, bytes]. std: approximate."""
    if type not in _BLOCKS:
        values = rng.standard_normal((n_out, n_in), np.float32)
        values *= np.float32(std)
        if type == QuantType.BF16:
            return np.ascontiguousarray(values.view(np.uint16)[:, 1::2]).view(np.uint8)
        return values.astype(np.float16 if type == QuantType.F16 else np.float32).view(np.uint8)
    size, at, min_at = _BLOCKS[type]
    spread, min_ratio = _SPREAD[type]
    data = rng.integers(0, 256, (n_out, row_bytes(type, n_in)), np.uint8)
    blocks = data.reshape(n_out, -1, size)
    scales = std / spread * rng.uniform(0.5, 1.5, blocks.shape[:2])
    if type == QuantType.MXFP4:
        blocks[..., at] = np.rint(np.log2(scales)) + 128  # of 2^(e - 128), as values are doubled
        return data
    scale = scales.astype(np.float16)
    blocks[..., at : at + 2] = scale[..., None].view(np.uint8)
    if min_at is not None:
        blocks[..., min_at : min_at + 2] = (scale * np.float16(min_ratio))[..., None].view(np.uint8)
    return data


def std_of(shape: Shape, name: str, n_in: int) -> float:
    """Standard deviation of a matrix's weights with which activations and logits stay in range."""
    if name == "token_embd.weight" and not shape.tied:
        return 1.0
    # Halved where a block's output joins the residual stream, so that the sum stays in range.
    gain = 0.5 if name.endswith(("attn_output.weight", "ffn_down.weight")) else 1.0
    return gain / math.sqrt(n_in)


def matrices(shape: Shape) -> list[tuple[str, int, int]]:
    """Tensor name, n_out and n_in of every matrix."""
    q, kv = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    found = [("token_embd.weight", shape.n_vocab, shape.width)]
    if not shape.tied:
        found.append(("output.weight", shape.n_vocab, shape.width))
    for i in range(shape.n_layers):
        found += [
            (f"blk.{i}.attn_q.weight", q, shape.width),
            (f"blk.{i}.attn_k.weight", kv, shape.width),
            (f"blk.{i}.attn_v.weight", kv, shape.width),
            (f"blk.{i}.attn_output.weight", shape.width, q),
            (f"blk.{i}.ffn_gate.weight", shape.hidden, shape.width),
            (f"blk.{i}.ffn_up.weight", shape.hidden, shape.width),
            (f"blk.{i}.ffn_down.weight", shape.width, shape.hidden),
        ]
    return found


def vectors(rng: np.random.Generator, shape: Shape) -> dict[str, np.ndarray]:
    """Norms of about 1 and biases of about 0, by tensor name."""
    kv = shape.n_kv_heads * shape.head_dim
    sizes = {"output_norm.weight": shape.width}
    for i in range(shape.n_layers):
        sizes |= {f"blk.{i}.{n}.weight": shape.width for n in ("attn_norm", "ffn_norm")}
        if shape.architecture == "qwen2":
            sizes[f"blk.{i}.attn_q.bias"] = shape.n_heads * shape.head_dim
            sizes |= {f"blk.{i}.attn_{n}.bias": kv for n in "kv"}
        if shape.architecture == "qwen3":
            sizes |= {f"blk.{i}.attn_{n}_norm.weight": shape.head_dim for n in "qk"}
    return {
        name: rng.normal(0 if name.endswith(".bias") else 1, 0.1, size).astype(np.float32)
        for name, size in sizes.items()
    }
