"""Which layers of a model look no further than a window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fwdllm.engine.errors import ModelError

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile


def local_layers(
    file: GGUFFile, arch: str, n_layers: int, period: int, wide_first: bool = False
) -> list[bool]:
    """Whether each layer has the window: by a pattern of all layers, or by its period.

    period: of a file that does not say it; 0 is a window everywhere.  wide_first: whether the first
    layer of each period sees all, not the last.  ModelError for a pattern of other layers.
    """
    key = f"{arch}.attention.sliding_window_pattern"
    if isinstance(file.metadata.get(key), np.ndarray):
        pattern = file.numbers(key)
        wrong = pattern.dtype.kind not in "bui" or len(pattern) != n_layers
        if wrong or np.any((pattern & ~1) != 0):
            raise ModelError(
                f"{file.path}: metadata {key!r} is not a bool for each of {n_layers} layers"
            )
        return [bool(local) for local in pattern]
    period = file.integer(key, period)
    wide = 0 if wide_first else period - 1
    return [period == 0 or i % period != wide for i in range(n_layers)]


def local_base(file: GGUFFile, arch: str, default: float) -> float:
    """The RoPE base of layers with a window; ModelError if it makes no sense."""
    base = file.number(f"{arch}.rope.freq_base_swa", default)
    if base <= 1:
        raise ModelError(f"{file.path}: RoPE base {base} of layers with a window is invalid")
    return base
