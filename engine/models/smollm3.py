"""SmolLM3 (Hugging Face, 2025): the Llama graph, with every fourth layer without positions (NoPE,
arXiv 2501.18795).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from fwdllm.engine.models import llama
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.weights import Shapes
from fwdllm.kernels.api import Array

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

_STEP = 4  # llama.cpp's n_no_rope_layer_step: no file says another


def read_args(file: GGUFFile) -> llama.Args:
    """Args of a file; errors as ``llama.read_args``."""
    return llama.read_args(file, "smollm3")


def shapes(args: llama.Args) -> tuple[Shapes, Shapes]:
    """Those of Llama, but llama.cpp reads no factors of frequencies."""
    required, optional = llama.shapes(args)
    return required, {name: optional[name] for name in optional if name != "rope_freqs.weight"}


def layer(args: llama.Args, p: Pass, i: int, x: Array) -> Array:
    """Layer i, on the residual stream: float32 [rows, width] to [rows, width]."""
    x = x + llama.attention(args, p, f"blk.{i}", x, rotated=(i + 1) % _STEP != 0)
    return p.in_blocks(x, partial(llama.add_feed_forward, args, p, f"blk.{i}"))
