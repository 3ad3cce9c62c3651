"""Granite (IBM, arXiv 2405.04324 and later): the Llama graph with four scales.

The embedding, what each half of a layer adds, and q k^T are multiplied, and the logits are divided,
by constants of the file. llama.cpp takes 0 for none, of the first three.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from fwdllm.engine.errors import ModelError, UnsupportedError
from fwdllm.engine.models import llama
from fwdllm.engine.models.forward import Pass
from fwdllm.kernels.api import Array, Matrix

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile


@dataclass(frozen=True, kw_only=True)
class Args(llama.Args):
    """Those of Llama, and the scales.  rotated: whether the model has positions at all."""

    embedding_scale: float
    residual_scale: float
    logit_scale: float
    rotated: bool


def read_args(file: GGUFFile) -> Args:
    """Args of a file; errors as ``llama.read_args``, ModelError too for a scale below 0."""
    if "granite.deepstack_mapping" in file.metadata:
        raise UnsupportedError(file.path, "it is the decoder of a model of images")
    base = llama.read_args(file, "granite")
    attention_scale = _scale(file, "attention.scale", 0.0)
    logit_scale = _scale(file, "logit_scale", None)
    if logit_scale == 0:
        raise ModelError(f"{file.path}: metadata 'granite.logit_scale', a divisor, is 0")
    return Args(
        **{**vars(base), "attention_scale": attention_scale or None},
        embedding_scale=_scale(file, "embedding_scale", 0.0) or 1.0,
        residual_scale=_scale(file, "residual_scale", 0.0) or 1.0,
        logit_scale=logit_scale,
        rotated=file.boolean("granite.rope.scaling.finetuned", True),
    )


def _scale(file: GGUFFile, key: str, default: float | None) -> float:
    value = file.number(f"granite.{key}", default)
    if value < 0:
        raise ModelError(f"{file.path}: metadata 'granite.{key}' is {value}, below 0")
    return value


def embed(args: Args, p: Pass) -> Array:
    """The input of the first layer: float32 [rows, width]."""
    return llama.embed(args, p) * args.embedding_scale


def layer(args: Args, p: Pass, i: int, x: Array) -> Array:
    """Layer i, on the residual stream: float32 [rows, width] to [rows, width]."""
    x = x + llama.attention(args, p, f"blk.{i}", x, args.rotated) * args.residual_scale
    return p.in_blocks(x, partial(_add_feed_forward, args, p, f"blk.{i}"))


def unembed(args: Args, p: Pass, x: Array) -> tuple[Array, Matrix]:
    """The input of the output matrix, from rows of the last layer, and that matrix."""
    x, matrix = llama.unembed(args, p, x)
    return x * (1 / args.logit_scale), matrix


def _add_feed_forward(args: Args, p: Pass, block: str, x: Array) -> Array:
    return x + llama.feed_forward(args, p, block, x) * args.residual_scale
