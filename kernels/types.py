"""Data that every kernel backend takes: quantized weights, LoRA factors and lanes.

Pure data; the operations live in ``kernels.reference`` (NumPy, the specification) and
``kernels.cpu`` (C++). Both modules offer the same functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as QuantType

SUPPORTED_TYPES: tuple[QuantType, ...] = (
    QuantType.F32,
    QuantType.F16,
    QuantType.BF16,
    QuantType.Q4_0,
    QuantType.Q4_1,
    QuantType.Q8_0,
    QuantType.Q4_K,
    QuantType.Q5_K,
    QuantType.Q6_K,
)

DISTRIBUTIONS = ("normal", "rademacher")


def row_bytes(type: QuantType, n_in: int) -> int:
    """Bytes of one row of ``n_in`` elements; ValueError if the row is not whole blocks."""
    block, size = GGML_QUANT_SIZES[type]
    if n_in % block:
        raise ValueError(f"a row of {n_in} elements is not whole {type.name} blocks of {block}")
    return n_in // block * size


@dataclass(frozen=True)
class Weight:
    """A matrix in its GGUF block format, usually a view of the mapped file.

    data: uint8 [n_out, row_bytes], C-contiguous.  type: the GGUF quantization type.
    n_out, n_in: the matrix is W [n_out, n_in]; a matmul computes x [rows, n_in] . W^T.
    """

    data: np.ndarray
    type: QuantType
    n_out: int
    n_in: int

    def __post_init__(self) -> None:
        if self.type not in SUPPORTED_TYPES:
            raise ValueError(f"unsupported tensor type {self.type.name}")
        want = (self.n_out, row_bytes(self.type, self.n_in))
        if self.data.dtype != np.uint8 or self.data.shape != want:
            raise ValueError(f"weight bytes are {self.data.dtype} {self.data.shape}, not {want}")
        if not self.data.flags.c_contiguous:
            raise ValueError("weight bytes are not contiguous")


@dataclass(frozen=True)
class LoRA:
    """Factors of one adapted linear layer: y += scale * (x A^T) B^T.

    a: float32 [rank, n_in].  b: float32 [n_out, rank].  offset: the position of A's first
    element in the flat parameter vector, which indexes the random stream; B's first element
    is at ``offset + rank * n_in`` (DESIGN section 3).
    """

    a: np.ndarray
    b: np.ndarray
    scale: float
    offset: int


@dataclass(frozen=True)
class Lanes:
    """Row groups of one batched forward; lane l perturbs theta by coefficients[l] * v(seeds[l]).

    Rows of lane l are the l-th of n_lanes equal slices. A coefficient of 0 is a plain lane.
    seeds: uint64 [n_lanes].  coefficients: float32 [n_lanes].
    """

    seeds: np.ndarray
    coefficients: np.ndarray
    distribution: str = "normal"

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def references(self) -> np.ndarray:
        """The lane whose activations each lane is quantized relative to: int32 [n_lanes].

        That is lane 0 if it is plain, else the first of the neighbours with the same seed; a
        lane that is its own reference is quantized directly. What lanes have in common is then
        rounded once and cancels in differences of losses, whatever other seeds are there.
        """
        own = np.arange(len(self), dtype=np.int32)
        if self.coefficients[0] == 0:
            return np.zeros_like(own)
        starts = np.concatenate([[True], self.seeds[1:] != self.seeds[:-1]])
        return np.maximum.accumulate(np.where(starts, own, 0)).astype(np.int32)

    @staticmethod
    def plain() -> Lanes:
        """The single unperturbed lane."""
        return Lanes(np.zeros(1, np.uint64), np.zeros(1, np.float32))
