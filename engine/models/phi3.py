"""Phi-3 (arXiv 2404.14219), Phi-3.5, Phi-4 and Phi-4-mini: the Llama graph with fused matrices.

One matrix makes queries, keys and values, another gate and up. The files' sliding window is not
applied, as llama.cpp does not apply it either.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from fwdllm.engine.errors import UnsupportedError
from fwdllm.engine.models import llama
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.llama import Args
from fwdllm.engine.models.rotary import LONG_FACTORS, SHORT_FACTORS
from fwdllm.engine.models.weights import Shapes
from fwdllm.kernels.api import Array

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

# llama.cpp rounds the context of a sequence up to a multiple of these tokens.
_CONTEXT_STEP = 256


def read_args(file: GGUFFile) -> Args:
    """Args of a file; errors as ``llama.read_args``.

    A file with two sets of RoPE factors has a context of its original length, up to which the short
    ones count. llama.cpp takes the long ones where it was asked for a longer context, and so for
    short texts too.
    """
    args = llama.read_args(file, "phi3", interleaved=False, factors_name=SHORT_FACTORS)
    args = replace(args, hidden_arrays=4, fused_qkv=True)
    found = [f"{name}.weight" in file.tensors for name in (SHORT_FACTORS, LONG_FACTORS)]
    if not any(found):
        return args
    original = args.rotary.original_context
    if not all(found) or (original < args.context and original % _CONTEXT_STEP):
        raise UnsupportedError(
            file.path, "llama.cpp alone knows which of its RoPE factors are meant"
        )
    return replace(args, context=min(original, args.context))


def shapes(args: Args) -> tuple[Shapes, Shapes]:
    """Tensors the graph needs and those it uses if present, with their shapes."""
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    required: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (args.n_vocab, args.width),
        "output_norm.weight": (args.width,),
    }
    optional: dict[str, tuple[int, ...]] = {
        "output.weight": (args.n_vocab, args.width),
        f"{SHORT_FACTORS}.weight": (args.rotary.dim // 2,),
        f"{LONG_FACTORS}.weight": (args.rotary.dim // 2,),
    }
    for i in range(args.n_layers):
        required |= {
            f"blk.{i}.attn_norm.weight": (args.width,),
            f"blk.{i}.attn_qkv.weight": (q + 2 * kv, args.width),
            f"blk.{i}.attn_output.weight": (args.width, q),
            f"blk.{i}.ffn_norm.weight": (args.width,),
            f"blk.{i}.ffn_up.weight": (2 * args.hidden, args.width),
            f"blk.{i}.ffn_down.weight": (args.width, args.hidden),
        }
        optional[f"blk.{i}.attn_qkv.bias"] = (q + 2 * kv,)
    return required, optional


def layer(args: Args, p: Pass, i: int, x: Array) -> Array:
    """Layer i, on the residual stream: float32 [rows, width] to [rows, width]."""
    x = x + _attention(args, p, f"blk.{i}", p.rms_norm(x, f"blk.{i}.attn_norm", args.norm_eps))
    return p.in_blocks(x, partial(_feed_forward, args, p, f"blk.{i}"))


def _attention(args: Args, p: Pass, block: str, x: Array) -> Array:
    query, key_value = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    q, k, v = p.split(p.linear(x, f"{block}.attn_qkv"), query, key_value, key_value)
    q = p.rope(q, args.rotary, args.head_dim, args.interleaved)
    k = p.rope(k, args.rotary, args.head_dim, args.interleaved)
    return p.linear(p.attention(q, k, v, args.head_dim, causal=True), f"{block}.attn_output")


def _feed_forward(args: Args, p: Pass, block: str, x: Array) -> Array:
    h = p.rms_norm(x, f"{block}.ffn_norm", args.norm_eps)
    gate, up = p.split(p.linear(h, f"{block}.ffn_up"), args.hidden, args.hidden)
    return x + p.linear(p.swiglu(gate, up), f"{block}.ffn_down")
