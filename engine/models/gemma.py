"""Gemma (arXiv 2403.08295), Gemma 2 (2408.00118) and Gemma 3 (2503.19786), of the last the text.

All scale the embedding by the root of the width, gate with GELU, rotate halves of a head and share
the embedding with the output. Gemma 2 normalizes what a block gives, too, keeps scores and logits
below soft caps, and in every other layer looks back no further than a window. Gemma 3 has norms on
every query and key head for the soft caps, and five layers of windows, which have a RoPE base of
their own, to one that sees all. The weights of a file's RMS norms are what is multiplied: the
papers' 1 + w.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from fwdllm.engine.errors import ModelError, UnsupportedError
from fwdllm.engine.models.dimensions import Dimensions
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.rotary import Rotary
from fwdllm.engine.models.weights import Shapes
from fwdllm.engine.models.windows import local_base, local_layers
from fwdllm.kernels.api import Array, Matrix

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

# Of the 27B models the scores are scaled by the width of a head as it would be without key_length.
# llama.cpp knows them by their layers, too: no metadata says it.
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
# What llama.cpp takes where a file does not say it.
_GEMMA2_WINDOW, _GEMMA2_CAPS, _GEMMA3_LOCAL_BASE = 4096, (50.0, 30.0), 10000.0
_PERIODS = {"gemma2": 2, "gemma3": 6}  # the last layer of each sees all


@dataclass(frozen=True, kw_only=True)
class Args(Dimensions):
    """Shapes and constants, from the metadata of a GGUF file.

    scale: of scores.  softcap: of scores, 0 is none.  windows: of each layer the rows that a row
    sees, itself included; 0 is all before it.  local_rotary: of layers with a window.  post_norms:
    norms on what attention and feed-forward give.  qk_norm: on every query and key head.
    own_output: an output matrix that is not the embedding.
    """

    norm_eps: float
    scale: float
    softcap: float
    windows: tuple[int, ...]
    rotary: Rotary
    local_rotary: Rotary
    post_norms: bool
    qk_norm: bool
    own_output: bool


def read_gemma(file: GGUFFile) -> Args:
    """Args of a Gemma file; ModelError if metadata is missing or makes no sense."""
    return _read(file, "gemma")


def read_gemma2(file: GGUFFile) -> Args:
    """Args of a Gemma 2 file; errors as ``read_gemma``."""
    args = _read(file, "gemma2")
    scores, logits = (
        _softcap(file, f"gemma2.{key}_logit_softcapping", default)
        for key, default in zip(("attn", "final"), _GEMMA2_CAPS, strict=True)
    )
    if not scores or not logits:
        raise ModelError(f"{file.path}: a soft cap is 0, but gemma2 divides by it")
    base = local_base(file, "gemma2", args.rotary.base)
    return replace(
        args,
        softcap=scores,
        logit_softcap=logits,
        windows=_windows(file, "gemma2", args, _GEMMA2_WINDOW),
        local_rotary=replace(args.rotary, base=base),
        post_norms=True,
        further_values=2 * args.width,
    )


def read_gemma3(file: GGUFFile) -> Args:
    """Args of a Gemma 3 file; errors as ``read_gemma``."""
    args = _read(file, "gemma3")
    base = local_base(file, "gemma3", _GEMMA3_LOCAL_BASE)
    return replace(
        args,
        logit_softcap=_softcap(file, "gemma3.final_logit_softcapping", 0.0),
        windows=_windows(file, "gemma3", args, 0),
        local_rotary=replace(args.rotary, base=base, scaling="none", factor=1.0),
        post_norms=True,
        qk_norm=True,
        further_values=2 * args.width + (args.n_heads + args.n_kv_heads) * args.head_dim,
        own_output="output.weight" in file.tensors,
    )


def _read(file: GGUFFile, arch: str) -> Args:
    """What all have, and none of what differs."""
    n_layers = file.integer(f"{arch}.block_count", maximum=len(file.tensors))
    width = file.positive(f"{arch}.embedding_length")
    n_heads = file.positive_of_layers(f"{arch}.attention.head_count")
    n_kv_heads = file.positive_of_layers(f"{arch}.attention.head_count_kv", n_heads)
    head_dim = file.positive(f"{arch}.attention.key_length", width // n_heads)
    if n_heads % n_kv_heads:
        raise ModelError(f"{file.path}: {n_heads} heads over {n_kv_heads} do not fit")
    for key in ("value_length", "key_length_swa", "value_length_swa"):
        if file.integer(f"{arch}.attention.{key}", head_dim) != head_dim:
            raise UnsupportedError(file.path, f"its '{key}' is not its 'key_length'")
    context = file.positive(f"{arch}.context_length")
    rotary = Rotary.from_gguf(file, arch, head_dim, context)
    if rotary.scaling == "yarn" or rotary.factors:
        raise UnsupportedError(file.path, f"{arch} with such a RoPE scaling has no graph here")
    if file.integer(f"{arch}.rope.dimension_count_swa", rotary.dim) != rotary.dim:
        raise UnsupportedError(file.path, "its layers rotate different numbers of dimensions")
    of_head = width // n_heads if n_layers == _LAYERS_OF_27B.get(arch) else head_dim
    return Args(
        n_layers=n_layers,
        width=width,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden=file.positive_of_layers(f"{arch}.feed_forward_length"),
        n_vocab=file.matrix_rows("token_embd.weight"),
        context=context,
        norm_eps=file.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        scale=of_head**-0.5,
        softcap=0.0,
        windows=(0,) * n_layers,
        rotary=rotary,
        local_rotary=rotary,
        post_norms=False,
        qk_norm=False,
        own_output=False,
    )


def _windows(file: GGUFFile, arch: str, args: Args, default: int) -> tuple[int, ...]:
    """The window of each layer.

    default: the window of a file that does not say it; where it is 0, so may a file's be.
    """
    key = f"{arch}.attention.sliding_window"
    window = file.positive(key, default) if default else file.integer(key, default)
    if window == 0:
        return (0,) * args.n_layers
    local = local_layers(file, arch, args.n_layers, _PERIODS[arch])
    return tuple(min(window, args.context) if here else 0 for here in local)


def _softcap(file: GGUFFile, key: str, default: float) -> float:
    softcap = file.number(key, default)
    if softcap < 0:
        raise ModelError(f"{file.path}: metadata {key!r} is {softcap}, below 0")
    return softcap


def shapes(args: Args) -> tuple[Shapes, Shapes]:
    """Tensors the graph needs and those it uses if present, with their shapes."""
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    required: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (args.n_vocab, args.width),
        "output_norm.weight": (args.width,),
    }
    optional: dict[str, tuple[int, ...]] = {}
    if args.own_output:
        required["output.weight"] = (args.n_vocab, args.width)
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
        norms = {"attn_norm": args.width, "ffn_norm": args.width}
        if args.post_norms:
            norms |= {"post_attention_norm": args.width, "post_ffw_norm": args.width}
        if args.qk_norm:
            norms |= {"attn_q_norm": args.head_dim, "attn_k_norm": args.head_dim}
        required |= {f"blk.{i}.{name}.weight": shape for name, shape in linear.items()}
        required |= {f"blk.{i}.{name}.weight": (size,) for name, size in norms.items()}
        for name in ("attn_q", "attn_k", "attn_v"):
            optional[f"blk.{i}.{name}.bias"] = linear[name][:1]
    return required, optional


def embed(args: Args, p: Pass) -> Array:
    """The input of the first layer: float32 [rows, width]."""
    return p.embedding("token_embd", p.ids) * math.sqrt(args.width)


def layer(args: Args, p: Pass, i: int, x: Array) -> Array:
    """Layer i, on the residual stream: float32 [rows, width] to [rows, width]."""
    h = _attention(args, p, i, _norm(args, p, x, f"blk.{i}.attn_norm"))
    x = x + _post_norm(args, p, h, f"blk.{i}.post_attention_norm")
    return p.in_blocks(x, partial(_feed_forward, args, p, f"blk.{i}"))


def unembed(args: Args, p: Pass, x: Array) -> tuple[Array, Matrix]:
    """The input of the output matrix, from rows of the last layer, and that matrix."""
    matrix = p.weights.matrix("output" if args.own_output else "token_embd")
    return _norm(args, p, x, "output_norm"), matrix


def _norm(args: Args, p: Pass, x: Array, name: str) -> Array:
    return p.rms_norm(x, name, args.norm_eps)


def _post_norm(args: Args, p: Pass, x: Array, name: str) -> Array:
    return _norm(args, p, x, name) if args.post_norms else x


def _head_norm(args: Args, p: Pass, x: Array, name: str) -> Array:
    return _norm(args, p, x.reshape(-1, args.head_dim), name).reshape(x.shape)


def _attention(args: Args, p: Pass, i: int, x: Array) -> Array:
    q, k, v = (p.linear(x, f"blk.{i}.attn_{name}") for name in "qkv")
    if args.qk_norm:
        q = _head_norm(args, p, q, f"blk.{i}.attn_q_norm")
        k = _head_norm(args, p, k, f"blk.{i}.attn_k_norm")
    window = args.windows[i]
    rotary = args.local_rotary if window else args.rotary
    q, k = (p.rope(x, rotary, args.head_dim, interleaved=False) for x in (q, k))
    y = p.attention(
        q,
        k,
        v,
        args.head_dim,
        causal=True,
        scale=args.scale,
        window=window,
        softcap=args.softcap,
    )
    return p.linear(y, f"blk.{i}.attn_output")


def _feed_forward(args: Args, p: Pass, block: str, x: Array) -> Array:
    h = _norm(args, p, x, f"{block}.ffn_norm")
    h = p.geglu(p.linear(h, f"{block}.ffn_gate"), p.linear(h, f"{block}.ffn_up"))
    return x + _post_norm(args, p, p.linear(h, f"{block}.ffn_down"), f"{block}.post_ffw_norm")
