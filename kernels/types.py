"""Data that all kernels take: quantized weights, LoRA factors and lanes.

Pure data; ``kernels.api`` says what the operations on it are and which modules have them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

if TYPE_CHECKING:
    import torch

# What operations take and return: arrays of NumPy, or on a GPU tensors of PyTorch. Code for all
# kernels uses only operations that both have.
Array: TypeAlias = "np.ndarray | torch.Tensor"


class QuantType(IntEnum):
    """Tensor types of GGUF files that the kernels support, with ggml's numbers."""

    F32 = 0
    F16 = 1
    BF16 = 30
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    IQ4_NL = 20
    IQ4_XS = 23
    MXFP4 = 39


SUPPORTED_TYPES = tuple(QuantType)

# Elements and bytes of a block.
BLOCKS = {
    QuantType.F32: (1, 4),
    QuantType.F16: (1, 2),
    QuantType.BF16: (1, 2),
    QuantType.Q4_0: (32, 18),
    QuantType.Q4_1: (32, 20),
    QuantType.Q5_0: (32, 22),
    QuantType.Q5_1: (32, 24),
    QuantType.Q8_0: (32, 34),
    QuantType.Q2_K: (256, 84),
    QuantType.Q3_K: (256, 110),
    QuantType.Q4_K: (256, 144),
    QuantType.Q5_K: (256, 176),
    QuantType.Q6_K: (256, 210),
    QuantType.IQ4_NL: (32, 18),
    QuantType.IQ4_XS: (256, 136),
    QuantType.MXFP4: (32, 17),
}

DISTRIBUTIONS = ("normal", "rademacher")


def row_bytes(type: QuantType, n_in: int) -> int:
    """Bytes of one row of ``n_in`` elements; ValueError if the row is not whole blocks."""
    block, size = BLOCKS[type]
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
    """Factors of one adapted linear layer: y += scale * (x A^T) B^T, and how seeds change them.

    a: float32 [rank, n_in].  b: float32 [n_out, rank].  offset: the position in the stream of a
    seed where the direction of A begins; that of B follows it. Both factors are row-major.
    Without a basis, each element of a factor's direction is one number of the stream.
    mask: float32 [rank * n_in + n_out * rank], A's elements first; multiplies these numbers.
    basis_a: float32 [q, n_in]; the direction of A is then Z basis_a, where Z [rank, q] are numbers
    of the stream.  basis_b: float32 [q, n_out]; the direction of B is then (Z basis_b)^T, also with
    a Z [rank, q]. An empty basis (q = 0) freezes its factor.
    """

    a: Array
    b: Array
    scale: float
    offset: int
    mask: np.ndarray | None = None
    basis_a: np.ndarray | None = None
    basis_b: np.ndarray | None = None

    @property
    def offset_b(self) -> int:
        """The position in the stream where the direction of B begins."""
        rank, n_in = self.a.shape
        return self.offset + rank * (n_in if self.basis_a is None else len(self.basis_a))


@dataclass(frozen=True, eq=False)
class Lanes:
    """Groups of rows in one forward pass; lane l perturbs theta by coefficients[l] * v(seeds[l]).

    The rows of lane l are the l-th of n_lanes equal slices. A lane with a coefficient of 0 is
    plain: unperturbed.
    seeds: uint64 [n_lanes], or [n_lanes, n_parts] if parts of a lane's rows, such as the
    examples of a batch, have directions of their own.  starts: int32 [n_parts + 1], the rows of
    each part.  coefficients: float32 [n_lanes].
    tangents: lane 0 is plain and the others are derivatives of it, along coefficients[l] *
    v(seeds[l]): rows of lane l hold d/dt of lane 0's rows at theta + t coefficients[l] v(seeds[l]).
    Lane 0 is then rounded more precisely, also while it is the only lane of the pass.
    """

    seeds: np.ndarray
    coefficients: np.ndarray
    distribution: str = "normal"
    tangents: bool = False
    starts: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    @property
    def n_tangents(self) -> int:
        """Number of lanes that are derivatives of lane 0."""
        return len(self) - 1 if self.tangents else 0

    @cached_property
    def references(self) -> np.ndarray:
        """The lane whose activations each lane is quantized relative to: int32 [n_lanes].

        That is lane 0 if it is plain, else the first of the adjacent lanes with the same seeds. A
        lane that is its own reference is quantized directly, as all tangents are. What lanes have
        in common is then rounded once and cancels in differences of losses, whatever other seeds
        are in the pass.
        """
        own = np.arange(len(self), dtype=np.int32)
        if self.tangents:
            return own
        if self.coefficients[0] == 0:
            return np.zeros_like(own)
        seeds = self.seeds.reshape(len(self), -1)
        starts = np.concatenate([[True], (seeds[1:] != seeds[:-1]).any(axis=1)])
        return np.maximum.accumulate(np.where(starts, own, 0)).astype(np.int32)

    def take(self, first: int, end: int) -> Lanes:
        """The lanes for a block of rows: first .. end of each lane."""
        if self.starts is None:
            return self
        begin = int(np.searchsorted(self.starts, first, side="right")) - 1
        stop = int(np.searchsorted(self.starts, end, side="left"))
        starts = np.clip(self.starts[begin : stop + 1], first, end) - np.int32(first)
        return replace(self, seeds=self.seeds[:, begin:stop], starts=starts)

    def unperturbed(self) -> Lanes:
        """The same number of lanes, all with coefficient 0."""
        n = len(self)
        return Lanes(
            np.zeros(n, np.uint64), np.zeros(n, np.float32), self.distribution, self.tangents
        )

    @staticmethod
    def plain() -> Lanes:
        """The single unperturbed lane."""
        return Lanes(np.zeros(1, np.uint64), np.zeros(1, np.float32))
