"""nomic-bert (nomic-embed-text, arXiv 2402.01613): BERT with RoPE, SwiGLU and a fused matrix.

One matrix makes queries, keys and values; positions are not embedded.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fwdllm.engine.models import bert
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.rotary import Rotary
from fwdllm.engine.models.weights import Shapes
from fwdllm.kernels.api import Array

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile


@dataclass(frozen=True, kw_only=True)
class Args(bert.Args):
    """Those of BERT, and the rotary embedding."""

    rotary: Rotary


def read_args(file: GGUFFile) -> Args:
    """Args of a file; errors as ``bert.read_args``."""
    base = bert.read_args(file, "nomic-bert")
    rotary = Rotary.from_gguf(file, "nomic-bert", base.head_dim, base.context)
    return Args(**{**vars(base), "hidden_arrays": 3, "fused_qkv": True}, rotary=rotary)


def shapes(args: Args) -> tuple[Shapes, Shapes]:
    """Tensors the graph needs and those it uses if present, with their shapes."""
    required: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (args.n_vocab, args.width),
        "token_embd_norm.weight": (args.width,),
        "token_embd_norm.bias": (args.width,),
    }
    optional: dict[str, tuple[int, ...]] = {"token_types.weight": (args.n_types, args.width)}
    for i in range(args.n_layers):
        required |= {
            f"blk.{i}.attn_qkv.weight": (3 * args.width, args.width),
            f"blk.{i}.attn_output.weight": (args.width, args.width),
            f"blk.{i}.ffn_gate.weight": (args.hidden, args.width),
            f"blk.{i}.ffn_up.weight": (args.hidden, args.width),
            f"blk.{i}.ffn_down.weight": (args.width, args.hidden),
        }
        for name in ("attn_output_norm", "layer_output_norm"):
            required[f"blk.{i}.{name}.weight"] = (args.width,)
            required[f"blk.{i}.{name}.bias"] = (args.width,)
        optional[f"blk.{i}.attn_qkv.bias"] = (3 * args.width,)
        optional[f"blk.{i}.attn_output.bias"] = (args.width,)
    return required, optional


def embed(args: Args, p: Pass) -> Array:
    """The input of the first layer: float32 [rows, width]."""
    x = p.embedding("token_embd", p.ids)
    if p.weights.has("token_types"):
        x = x + p.embedding("token_types", bert.FIRST_TYPE)
    return p.layer_norm(x, "token_embd_norm", args.norm_eps)


def layer(args: Args, p: Pass, i: int, x: Array) -> Array:
    """Layer i: float32 [rows, width] to [rows, width]."""
    x = x + _attention(args, p, f"blk.{i}", x)
    return p.in_blocks(x, partial(_feed_forward, args, p, f"blk.{i}"))


def _attention(args: Args, p: Pass, block: str, x: Array) -> Array:
    q, k, v = p.split(p.linear(x, f"{block}.attn_qkv"), args.width, args.width, args.width)
    q = p.rope(q, args.rotary, args.head_dim, interleaved=False)
    k = p.rope(k, args.rotary, args.head_dim, interleaved=False)
    return p.linear(p.attention(q, k, v, args.head_dim, causal=False), f"{block}.attn_output")


def _feed_forward(args: Args, p: Pass, block: str, x: Array) -> Array:
    x = p.layer_norm(x, f"{block}.attn_output_norm", args.norm_eps)
    gate, up = p.linear(x, f"{block}.ffn_gate"), p.linear(x, f"{block}.ffn_up")
    x = x + p.linear(p.swiglu(gate, up), f"{block}.ffn_down")
    return p.layer_norm(x, f"{block}.layer_output_norm", args.norm_eps)
