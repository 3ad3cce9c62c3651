"""An adapter as read from a file (named pairs of factors), and its assembly into an ``Adapter``.

Both file formats are assembled here, so that one place decides whether an adapter fits a model.
What a file claims is not trusted: whatever does not fit is an AdapterError.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Head, by_layer, layout
from fwdllm.engine.errors import AdapterError, ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import reference
from fwdllm.kernels.api import Kernels
from fwdllm.kernels.types import Weight

# Matrices outside of layers that other tools adapt, too, and PEFT's names of their modules.
_OUTSIDE = {
    "output": ("the output matrix", ("lm_head", "embed_out")),
    "token_embd": ("the embedding", ("embed_tokens", "word_embeddings", "wte")),
}


def check_inside_layers(path: Path, names: Iterable[str]) -> None:
    """AdapterError for a file that adapts a matrix outside of layers: no command applies that.

    names: of its tensors, GGUF's or PEFT's. llama.cpp alone applies some of it and ends the process
    on others, such as the embedding of a model whose output matrix is the same.
    """
    for name in names:
        parts = name.split(".")
        for tensor, (what, modules) in _OUTSIDE.items():
            if parts[0] == tensor or not set(modules).isdisjoint(parts):
                raise AdapterError(
                    f"{path} adapts {what} ({modules[0]} in PEFT), but adapters are applied to "
                    "matrices of layers only: merge it into its model and quantize that, or train "
                    f"it without {modules[0]}"
                )


@dataclass(frozen=True, eq=False)
class StoredAdapter:
    """Factors by the GGUF name of the tensor they adapt, without ".weight".

    path: the file, for messages.  pairs: name -> (A [rank, n_in], B [n_out, rank]).  alpha:
    None if the file leaves the scale at 1.  head: or None.  head_values: the head's weight and
    then its bias, float32 [head.size].
    """

    path: Path
    pairs: Mapping[str, tuple[Weight, Weight]]
    alpha: float | None
    head: Head | None = None
    head_values: np.ndarray | None = None


def assemble(
    stored: StoredAdapter,
    architecture: str,
    shapes: Mapping[str, tuple[int, int]],
    ops: Kernels,
) -> Adapter:
    """Lay the factors out for the model with these ``shapes`` (see ``adapter.layout``).

    Errors: AdapterError if the adapter is for another model, or has a different rank in different
    tensors or different targets in different layers.
    """
    rank = _common_rank(stored)
    for name, (a, b) in stored.pairs.items():
        check_fit(stored.path, name, a, b, shapes)
    _check_head(stored, shapes)
    config = _config(stored, rank, shapes)
    targets = layout(shapes, config)
    missing = [target.name for target in targets if target.name not in stored.pairs]
    if missing:
        raise AdapterError(
            f"{stored.path} adapts {_suffix(missing[0])} in some layers but not in "
            f"{missing[0]}; only the same targets in every adapted layer are supported"
        )
    parts = [ops.dequantize(half).ravel() for t in targets for half in stored.pairs[t.name]]
    if stored.head_values is not None:
        parts.append(stored.head_values)
    theta = np.concatenate(parts).astype(np.float32, copy=False)
    return Adapter(architecture, config, targets, theta, ops, stored.head)


def _common_rank(stored: StoredAdapter) -> int:
    ranks = {a.n_out for a, _ in stored.pairs.values()}
    if len(ranks) > 1:
        found = ", ".join(str(rank) for rank in sorted(ranks))
        raise AdapterError(
            f"{stored.path} mixes ranks ({found}); only one rank per adapter is supported"
        )
    return ranks.pop()


def check_fit(
    path: Path, name: str, a: Weight, b: Weight, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """AdapterError if the factors of a tensor are not for the model of these shapes."""
    if name not in shapes:
        raise AdapterError(
            f"{path} adapts {name!r}, which is no matrix of this model that adapters are applied "
            "to; it was made for another model, or for a part that is not tuned here"
        )
    n_out, n_in = shapes[name]
    if b.n_in != a.n_out:
        raise AdapterError(f"{path}: the factors of {name!r} have ranks {a.n_out} and {b.n_in}")
    if (b.n_out, a.n_in) != (n_out, n_in):
        raise AdapterError(
            f"{path} adapts {name!r} as {b.n_out} x {a.n_in}, but it is {n_out} x {n_in} in "
            "this model; it was made for another model"
        )


def check_values(stored: StoredAdapter) -> None:
    """AdapterError for an adapter without factors, or with a value that is not finite."""
    if not stored.pairs:
        raise AdapterError(f"{stored.path} holds no LoRA tensors")
    finite = all(
        np.isfinite(reference.dequantize(half)).all()
        for factors in stored.pairs.values()
        for half in factors
    )
    if stored.head_values is not None:
        finite = finite and bool(np.isfinite(stored.head_values).all())
    if not finite:
        raise AdapterError(f"{stored.path} is damaged: it holds values that are not finite")


def _check_head(stored: StoredAdapter, shapes: Mapping[str, tuple[int, int]]) -> None:
    # A head reads features of the model's width, which is n_in of some layer in every block.
    if stored.head and all(stored.head.n_in != n_in for _, n_in in shapes.values()):
        raise AdapterError(
            f"{stored.path} has a classification head on {stored.head.n_in} features, which "
            "this model does not have; it was made for another model"
        )


def _config(stored: StoredAdapter, rank: int, shapes: Mapping[str, tuple[int, int]]) -> LoRAConfig:
    blocks = by_layer(dict.fromkeys(stored.pairs, (0, 0)))
    outside = len(stored.pairs) - sum(len(block) for block in blocks.values())
    if outside:
        raise AdapterError(f"{stored.path} adapts tensors outside the model's layers")
    targets = tuple({suffix for block in blocks.values() for suffix in block})
    layers = None if set(blocks) == set(by_layer(shapes)) else tuple(blocks)
    alpha = float(rank) if stored.alpha is None else stored.alpha
    try:
        return LoRAConfig(rank, alpha, targets, layers)
    except ConfigError as error:
        raise AdapterError(f"{stored.path} is not a usable adapter: {error}") from error


def _suffix(name: str) -> str:
    return name.split(".", 2)[2]
