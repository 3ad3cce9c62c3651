"""modern-bert (ModernBERT, arXiv 2412.13663): BERT with RoPE, gates, norms first, and windows.

Granite-embedding-r2 and gte-modernbert are such. Two layers of three see no further than a window,
before and behind, and have a RoPE base of their own. One matrix makes queries, keys and values,
another gate and up. Layer norms have no bias, and the first layer has none before its attention:
the embedding has just been normalized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from fwdllm.engine.errors import UnsupportedError
from fwdllm.engine.models import bert
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.rotary import Rotary
from fwdllm.engine.models.weights import Shapes
from fwdllm.engine.models.windows import local_base, local_layers
from fwdllm.kernels.api import Array

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

_ARCH = "modern-bert"
# What llama.cpp takes where a file does not say it.
_PERIOD, _LOCAL_BASE, _ACTIVATION = 3, 10000.0, "gelu"
# Whether a gate has GELU, else SiLU, by llama.cpp's names.
_GELU = {"gelu": True, "geglu": True, "silu": False, "swish": False, "swiglu": False}


@dataclass(frozen=True, kw_only=True)
class Args(bert.Args):
    """Those of BERT, and what it has not.

    windows: of each layer; a row sees those less than so many away, 0 is all.  local_rotary: of
    layers with a window.  gelu: whether gates have GELU, else SiLU.
    """

    windows: tuple[int, ...]
    rotary: Rotary
    local_rotary: Rotary
    gelu: bool


def read_args(file: GGUFFile) -> Args:
    """Args of a file; errors as ``bert.read_args``."""
    file.positive(f"{_ARCH}.block_count")  # the last layer has the norm of the output
    base = bert.read_args(file, _ARCH)
    if file.positive_of_layers(f"{_ARCH}.attention.head_count_kv", base.n_heads) != base.n_heads:
        raise UnsupportedError(file.path, "its heads share keys and values")
    for key in ("key_length", "value_length", "key_length_swa", "value_length_swa"):
        if file.integer(f"{_ARCH}.attention.{key}", base.head_dim) != base.head_dim:
            raise UnsupportedError(file.path, f"its '{key}' is not its width by its heads")
    rotary = Rotary.from_gguf(file, _ARCH, base.head_dim, base.context)
    if rotary.scaling == "yarn" or rotary.factors:
        raise UnsupportedError(file.path, f"{_ARCH} with such a RoPE scaling has no graph here")
    if file.integer(f"{_ARCH}.rope.dimension_count_swa", rotary.dim) != rotary.dim:
        raise UnsupportedError(file.path, "its layers rotate different numbers of dimensions")
    activation = file.string(f"{_ARCH}.hidden_activation", _ACTIVATION)
    if activation not in _GELU:
        raise UnsupportedError(file.path, f"the activation {activation!r} is not supported")
    of_bert = {**vars(base), "hidden_arrays": 4, "fused_qkv": True, "further_values": base.width}
    return Args(
        **of_bert,
        windows=_windows(file, base),
        rotary=rotary,
        local_rotary=replace(
            rotary, base=local_base(file, _ARCH, _LOCAL_BASE), scaling="none", factor=1.0
        ),
        gelu=_GELU[activation],
    )


def _windows(file: GGUFFile, args: bert.Args) -> tuple[int, ...]:
    """The window of each layer; a file says how many tokens it has, half of them on each side."""
    tokens = file.integer(f"{_ARCH}.attention.sliding_window", 0)
    if tokens == 0:
        return (0,) * args.n_layers
    window = min(tokens // 2 + 1, args.context)
    local = local_layers(file, _ARCH, args.n_layers, _PERIOD, wide_first=True)
    if all(local) or not any(local):  # llama.cpp aborts on such a model
        raise UnsupportedError(file.path, "all of its layers have a window, or none has")
    return tuple(window if here else 0 for here in local)


def shapes(args: Args) -> tuple[Shapes, Shapes]:
    """Tensors the graph needs and those it uses if present, with their shapes."""
    required: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (args.n_vocab, args.width),
        "token_embd_norm.weight": (args.width,),
        "output_norm.weight": (args.width,),
    }
    for i in range(args.n_layers):
        required |= {
            f"blk.{i}.attn_norm.weight": (args.width,),
            f"blk.{i}.attn_qkv.weight": (3 * args.width, args.width),
            f"blk.{i}.attn_output.weight": (args.width, args.width),
            f"blk.{i}.ffn_norm.weight": (args.width,),
            f"blk.{i}.ffn_up.weight": (2 * args.hidden, args.width),
            f"blk.{i}.ffn_down.weight": (args.width, args.hidden),
        }
    first = "blk.0.attn_norm.weight"
    return required, {first: required.pop(first)}


def embed(args: Args, p: Pass) -> Array:
    """The input of the first layer: float32 [rows, width]."""
    return p.layer_norm(p.embedding("token_embd", p.ids), "token_embd_norm", args.norm_eps)


def layer(args: Args, p: Pass, i: int, x: Array) -> Array:
    """Layer i, on the residual stream: float32 [rows, width] to [rows, width].

    The last one ends with the norm of the output, which is pooled.
    """
    x = x + _attention(args, p, i, x)
    return p.in_blocks(x, partial(_feed_forward, args, p, i))


def _attention(args: Args, p: Pass, i: int, x: Array) -> Array:
    block, window = f"blk.{i}", args.windows[i]
    if p.weights.vector_or_none(f"{block}.attn_norm.weight") is not None:
        x = p.layer_norm(x, f"{block}.attn_norm", args.norm_eps)
    q, k, v = p.split(p.linear(x, f"{block}.attn_qkv"), args.width, args.width, args.width)
    rotary = args.local_rotary if window else args.rotary
    q, k = (p.rope(x, rotary, args.head_dim, interleaved=False) for x in (q, k))
    y = p.attention(q, k, v, args.head_dim, causal=False, window=window)
    return p.linear(y, f"{block}.attn_output")


def _feed_forward(args: Args, p: Pass, i: int, x: Array) -> Array:
    block = f"blk.{i}"
    h = p.layer_norm(x, f"{block}.ffn_norm", args.norm_eps)
    gate, up = p.split(p.linear(h, f"{block}.ffn_up"), args.hidden, args.hidden)
    h = p.geglu(gate, up) if args.gelu else p.swiglu(gate, up)
    x = x + p.linear(h, f"{block}.ffn_down")
    return p.layer_norm(x, "output_norm", args.norm_eps) if i == args.n_layers - 1 else x
