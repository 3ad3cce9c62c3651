"""Llama (arXiv 2302.13971) and models of its architecture: Llama 1-3, Mistral, SmolLM, TinyLlama.

Qwen2, Qwen3, Granite and SmolLM3 use this graph too, and Phi-3 its parts; models/qwen.py,
granite.py, smollm3.py and phi3.py say what differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fwdllm.engine.errors import ModelError, UnsupportedError
from fwdllm.engine.models.dimensions import Dimensions
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.rotary import Rotary
from fwdllm.engine.models.weights import Shapes
from fwdllm.kernels.api import Array, Matrix

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile


@dataclass(frozen=True, kw_only=True)
class Args(Dimensions):
    """Shapes and constants, from the metadata of a GGUF file.

    interleaved: RoPE rotates pairs (2i, 2i+1), as llama files are laid out; else (i, i+d/2).
    qk_norm: an RMS norm on every query and key head.  attention_scale: the factor of q k^T; None is
    head_dim**-0.5.
    """

    norm_eps: float
    rotary: Rotary
    interleaved: bool = True
    qk_norm: bool = False
    attention_scale: float | None = None


def read_args(
    file: GGUFFile,
    arch: str = "llama",
    interleaved: bool = True,
    qk_norm: bool = False,
    factors_name: str = "rope_freqs",
) -> Args:
    """Args of a file; ModelError if metadata is missing or makes no sense.

    factors_name: see ``Rotary.from_gguf``.
    """
    if file.integer(f"{arch}.expert_count", 0):
        raise UnsupportedError(file.path, "a mixture of experts has no graph here")
    width = file.positive(f"{arch}.embedding_length")
    n_heads = file.positive_of_layers(f"{arch}.attention.head_count")
    n_kv_heads = file.positive_of_layers(f"{arch}.attention.head_count_kv", n_heads)
    head_dim = file.positive(f"{arch}.attention.key_length", width // n_heads)
    if n_heads % n_kv_heads:
        raise ModelError(f"{file.path}: {n_heads} heads over {n_kv_heads} do not fit")
    if file.integer(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise UnsupportedError(file.path, "its keys and values have different lengths")
    context = file.positive(f"{arch}.context_length")
    return Args(
        n_layers=file.integer(f"{arch}.block_count", maximum=len(file.tensors)),
        width=width,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden=file.positive_of_layers(f"{arch}.feed_forward_length"),
        n_vocab=file.matrix_rows("token_embd.weight"),
        context=context,
        norm_eps=file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rotary=Rotary.from_gguf(file, arch, head_dim, context, factors_name),
        interleaved=interleaved,
        qk_norm=qk_norm,
    )


def shapes(args: Args) -> tuple[Shapes, Shapes]:
    """Tensors the graph needs and those it uses if present, with their shapes."""
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    required: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (args.n_vocab, args.width),
        "output_norm.weight": (args.width,),
    }
    optional: dict[str, tuple[int, ...]] = {
        "output.weight": (args.n_vocab, args.width),
        "rope_freqs.weight": (args.rotary.dim // 2,),
    }
    for i in range(args.n_layers):
        linear = {
            "attn_q": (q, args.width),
            "attn_k": (kv, args.width),
            "attn_v": (kv, args.width),
            "attn_output": (args.width, q),
            "ffn_gate": (args.hidden, args.width),
            "ffn_up": (args.hidden, args.width),
            "ffn_down": (args.width, args.hidden),
        }
        for name, shape in linear.items():
            required[f"blk.{i}.{name}.weight"] = shape
            optional[f"blk.{i}.{name}.bias"] = shape[:1]
        norms = {"attn_norm": args.width, "ffn_norm": args.width}
        if args.qk_norm:
            norms |= {"attn_q_norm": args.head_dim, "attn_k_norm": args.head_dim}
        for name, size in norms.items():
            required[f"blk.{i}.{name}.weight"] = (size,)
    return required, optional


def embed(args: Args, p: Pass) -> Array:
    """The input of the first layer: float32 [rows, width]."""
    return p.embedding("token_embd", p.ids)


def layer(args: Args, p: Pass, i: int, x: Array) -> Array:
    """Layer i, on the residual stream: float32 [rows, width] to [rows, width]."""
    x = x + attention(args, p, f"blk.{i}", x)
    return p.in_blocks(x, partial(add_feed_forward, args, p, f"blk.{i}"))


def unembed(args: Args, p: Pass, x: Array) -> tuple[Array, Matrix]:
    """The input of the output matrix, from rows of the last layer, and that matrix."""
    tied = not p.weights.has("output")
    matrix = p.weights.matrix("token_embd" if tied else "output")
    return p.rms_norm(x, "output_norm", args.norm_eps), matrix


def attention(args: Args, p: Pass, block: str, x: Array, rotated: bool = True) -> Array:
    """What attention adds to the residual stream x.  rotated: whether queries and keys are."""
    h = p.rms_norm(x, f"{block}.attn_norm", args.norm_eps)
    q, k, v = (p.linear(h, f"{block}.attn_{name}") for name in "qkv")
    if args.qk_norm:
        q = _head_norm(args, p, q, f"{block}.attn_q_norm")
        k = _head_norm(args, p, k, f"{block}.attn_k_norm")
    if rotated:
        q = p.rope(q, args.rotary, args.head_dim, args.interleaved)
        k = p.rope(k, args.rotary, args.head_dim, args.interleaved)
    found = p.attention(q, k, v, args.head_dim, causal=True, scale=args.attention_scale)
    return p.linear(found, f"{block}.attn_output")


def _head_norm(args: Args, p: Pass, x: Array, name: str) -> Array:
    return p.rms_norm(x.reshape(-1, args.head_dim), name, args.norm_eps).reshape(x.shape)


def add_feed_forward(args: Args, p: Pass, block: str, x: Array) -> Array:
    """x and what the feed-forward network adds to it."""
    return x + feed_forward(args, p, block, x)


def feed_forward(args: Args, p: Pass, block: str, x: Array) -> Array:
    """What the feed-forward network adds to the residual stream x."""
    h = p.rms_norm(x, f"{block}.ffn_norm", args.norm_eps)
    gate, up = p.linear(h, f"{block}.ffn_gate"), p.linear(h, f"{block}.ffn_up")
    return p.linear(p.swiglu(gate, up), f"{block}.ffn_down")
