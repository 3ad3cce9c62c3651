"""Rotary position embedding: angles per position, with the scalings GGUF files name.

linear and YaRN (arXiv 2309.00071) as llama.cpp's ``rope_yarn`` computes them; Llama 3's
per-frequency factors come as the tensor ``rope_freqs.weight``, Phi-3's (LongRoPE, arXiv 2402.13753)
as two others, of which the short ones are read here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from fwdllm.engine.errors import ModelError, UnsupportedError

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

SHORT_FACTORS, LONG_FACTORS = "rope_factors_short", "rope_factors_long"
BETA_FAST, BETA_SLOW = 32.0, 1.0  # YaRN's rotations at the ends of its ramp


@dataclass(frozen=True)
class Rotary:
    """dim: rotated dimensions of a head.  scaling: "none", "linear" or "yarn".

    factor: context extension, at least 1.  factors: divisors of the frequencies [dim / 2], or ().
    """

    dim: int
    base: float
    scaling: str = "none"
    factor: float = 1.0
    original_context: int = 0
    attention_factor: float = 1.0
    factors: tuple[float, ...] = ()

    @staticmethod
    def from_gguf(
        file: GGUFFile, arch: str, head_dim: int, context: int, factors_name: str = "rope_freqs"
    ) -> Rotary:
        """Read the rope metadata of ``arch`` as llama.cpp does; ModelError if it makes no sense.

        factors_name: of the tensor of ``factors``, which need not exist.
        A factor without a type is of linear scaling, and in old files it has another name.
        """
        scaling = file.string(f"{arch}.rope.scaling.type", "linear")
        if scaling == "longrope" and factors_name == SHORT_FACTORS:
            scaling = "linear"  # what else it means is in the factors
        if scaling not in ("none", "linear", "yarn"):
            raise UnsupportedError(file.path, f"RoPE scaling {scaling!r} is not supported")
        dim = file.integer(f"{arch}.rope.dimension_count", head_dim)
        if dim % 2 or not 0 < dim <= head_dim:
            raise ModelError(f"{file.path}: rope dimension {dim} does not fit heads of {head_dim}")
        base = file.number(f"{arch}.rope.freq_base", 10000.0)
        factor = file.number(
            f"{arch}.rope.scaling.factor", file.number(f"{arch}.rope.scale_linear", 0.0)
        )
        factor = factor or 1.0  # 0 is what converters write for none
        if scaling == "linear" and factor == 1:
            scaling = "none"
        if base <= 1 or factor < 0:
            raise ModelError(f"{file.path}: RoPE base {base} or scaling factor {factor} is invalid")
        attention_factor = file.number(f"{arch}.rope.scaling.attn_factor", 1.0)
        if attention_factor <= 0:
            raise ModelError(f"{file.path}: RoPE attention factor {attention_factor} is invalid")
        factors: tuple[float, ...] = ()
        tensor = f"{factors_name}.weight"
        if tensor in file.tensors:
            factors = tuple(file.vector(tensor).tolist())
            if len(factors) != dim // 2 or not all(f > 0 for f in factors):
                raise ModelError(f"{file.path}: tensor {tensor!r} does not fit {dim=}")
        return Rotary(
            dim,
            base,
            scaling,
            factor if scaling != "none" else 1.0,
            file.integer(f"{arch}.rope.scaling.original_context_length", context),
            attention_factor,
            factors,
        )

    def tables(self, n_positions: int, back: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin for positions 0 .. n_positions: float32 [at least n_positions, dim / 2].

        back: to turn the other way round.
        """
        return _tables(self, 1 << max(6, (n_positions - 1).bit_length()), back)


# Arrays that come again are copied to a GPU once.
@lru_cache(maxsize=8)
def _tables(r: Rotary, n_positions: int, back: bool) -> tuple[np.ndarray, np.ndarray]:
    pair = np.arange(r.dim // 2)
    frequency = r.base ** (-2.0 * pair / r.dim)
    if r.factors:
        frequency = frequency / np.array(r.factors)
    magnitude = r.attention_factor
    if r.scaling == "linear":
        frequency = frequency / r.factor
    elif r.scaling == "yarn":
        low, high = _yarn_ends(r)
        ramp = 1 - np.clip((pair - low) / max(0.001, high - low), 0, 1)
        frequency = frequency / r.factor * (1 - ramp) + frequency * ramp
        magnitude *= 1 + 0.1 * math.log(r.factor)
    angle = np.arange(n_positions)[:, None] * frequency
    return (
        (np.cos(angle) * magnitude).astype(np.float32),
        (np.sin(-angle if back else angle) * magnitude).astype(np.float32),
    )


def _yarn_ends(r: Rotary) -> tuple[int, int]:
    def pair_that_turns(rotations: float) -> float:
        per_turn = r.original_context / (rotations * 2 * math.pi)
        return r.dim * math.log(per_turn) / (2 * math.log(r.base))

    low = math.floor(pair_that_turns(BETA_FAST))
    high = math.ceil(pair_that_turns(BETA_SLOW))
    return max(0, low), min(r.dim - 1, high)
