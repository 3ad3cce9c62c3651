"""Where these kernels keep arrays, and how arrays get there.

Arrays are PyTorch tensors on the GPU. Under TRITON_INTERPRET=1 they are on the CPU, and Triton runs
the kernels in NumPy: slow, and the same arithmetic.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array, Matrix
from fwdllm.kernels.triton.layout import aligned, has_blocks, in_planes
from fwdllm.kernels.types import DISTRIBUTIONS, QuantType

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# The same for kernels, which see no other globals.
IN_NUMPY = tl.constexpr(INTERPRETED)
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")


@dataclass(frozen=True, eq=False)
class DeviceWeight:
    """A ``Weight`` on the device.

    data: uint8 [n_out, row_bytes], rows as in the file, or of blocks in planes (``layout``).
    fields: the same bytes viewed as float16, or for BF16 and F32 weights as these types, to read
    the elements of such types or the scales of blocks.
    """

    data: torch.Tensor
    fields: torch.Tensor
    type: QuantType
    n_out: int
    n_in: int

    def rows(self, first: int, end: int) -> DeviceWeight:
        """Rows first .. end of the matrix."""
        n = min(end, self.n_out) - first
        at = slice(first, first + n)
        return DeviceWeight(self.data[at], self.fields[at], self.type, n, self.n_in)


_FIELDS = {QuantType.F32: torch.float32, QuantType.BF16: torch.bfloat16}


def weight(weight: Matrix) -> DeviceWeight:
    """A weight on the device; one that is there already is returned as it is."""
    if isinstance(weight, DeviceWeight):
        return weight
    data = _planes(weight) if has_blocks(weight.type) else _copy(weight.data)
    fields = data.view(_FIELDS.get(weight.type, torch.float16))
    return DeviceWeight(data, fields, weight.type, weight.n_out, weight.n_in)


# Bytes of a file's blocks that are put in planes at a time: several times as many are needed to.
_UPLOAD_BYTES = 32 * 2**20


def _planes(weight: Matrix) -> torch.Tensor:
    n_out, row_bytes = weight.data.shape
    step = max(1, _UPLOAD_BYTES // max(1, row_bytes))
    out = torch.empty(n_out, aligned(row_bytes), dtype=torch.uint8, device=DEVICE)
    for first in range(0, n_out, step):
        at = slice(first, first + step)
        out[at] = in_planes(_copy(weight.data[at]), weight.type)
    return out


def usable() -> bool:
    """Whether there is a GPU, or the interpreter instead."""
    return INTERPRETED or DEVICE.type == "cuda"


def free_bytes() -> int | None:
    """Memory of the GPU that is free; None for the interpreter."""
    if DEVICE.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    return int(free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated())


def array(x: np.ndarray) -> torch.Tensor:
    """x on the device: copied, unless ``place`` or ``constant`` has a tensor for it."""
    found = _constants.get(id(x))
    return _copy(x) if found is None or found[0]() is not x else _seen(found[1])


def zeros(*shape: int) -> torch.Tensor:
    """Zeros on the device, float32 [*shape]."""
    return torch.zeros(shape, dtype=torch.float32, device=DEVICE)


def tensor(x: Array) -> torch.Tensor:
    """x on the device, contiguous; a NumPy array is copied each time."""
    return x.contiguous() if isinstance(x, torch.Tensor) else _copy(x)


# Tensors that a recording uses, while one is made.
_recorded: list[torch.Tensor] | None = None

# Copies of arrays that ``constant`` has seen, by identity while the array lives.
_constants: dict[int, tuple[weakref.ref[np.ndarray], torch.Tensor]] = {}


def constant(x: Array) -> torch.Tensor:
    """As ``tensor``, for an array that never changes: copied once."""
    if isinstance(x, torch.Tensor):
        return x
    key = id(x)
    found = _constants.get(key)
    if found is not None and found[0]() is x:
        return _seen(found[1])
    copy = _copy(x)
    place(x, copy)
    return copy


def small(x: np.ndarray) -> torch.Tensor:
    """As ``constant``, for a few numbers: arrays of equal contents are copied once."""
    return _seen(_small(x.tobytes(), x.dtype.str, x.shape))


@lru_cache(maxsize=1024)
def _small(data: bytes, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    return _copy(np.frombuffer(data, dtype).reshape(shape))


def place(x: np.ndarray, at: torch.Tensor) -> None:
    """Let ``constant`` and ``array`` return ``at``, a tensor of the same contents, for x."""
    key = id(x)
    _constants[key] = (weakref.ref(x, lambda _: _constants.pop(key, None)), at)


def displace(x: np.ndarray) -> None:
    """Forget the tensor that ``place`` or ``constant`` has for x."""
    _constants.pop(id(x), None)


def host(x: Array) -> np.ndarray:
    """x as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    if isinstance(x, np.ndarray):
        return x
    if x.dtype == torch.bfloat16:
        x = x.float()
    if x.is_cuda:
        # To pinned memory, which PyTorch keeps: 33 MB to new pages took 8 ms on an H200.
        x = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x)
    found: np.ndarray = x.numpy()
    return found


@contextmanager
def recorded() -> Iterator[list[torch.Tensor]]:
    """All tensors that ``constant``, ``small`` and ``array`` return inside, in a list.

    A recording keeps using their addresses, so they must live as long as it does. RuntimeError if
    an array is not on the device yet.
    """
    global _recorded
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def _seen(x: torch.Tensor) -> torch.Tensor:
    if _recorded is not None:
        _recorded.append(x)
    return x


def _copy(x: np.ndarray) -> torch.Tensor:
    if _recorded is not None:
        raise RuntimeError(f"{x.dtype} {x.shape} is not among the inputs of the recording")
    x = np.ascontiguousarray(x)
    if x.dtype == np.uint64:  # PyTorch and Triton take the bits as signed ones
        x = x.view(np.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of mapped files, which nothing writes to
        return torch.from_numpy(x).to(DEVICE, copy=True)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def pow2(n: int, least: int = 1) -> int:
    """The first power of two that is at least n and ``least``, as Triton's blocks must be."""
    return max(least, 1 << max(0, n - 1).bit_length())


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b in float32. PRECISION: for float32 operands; without effect on bfloat16."""
    if IN_NUMPY:  # the interpreter would multiply the bits of bfloat16 operands
        acc += tl.dot(a.to(tl.float32), b.to(tl.float32))
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def cast(x, to: tl.constexpr):
    """float32 x as float32 or bfloat16, rounded to nearest even."""
    if IN_NUMPY and to == tl.bfloat16:  # the interpreter's own conversion truncates
        bits = x.to(tl.int32, bitcast=True)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        x = tl.where(x == x, rounded, bits).to(tl.float32, bitcast=True)
    return x.to(to)


@triton.jit
def tanh(x):
    """tanh to 4e-7 of it, NaN if x is infinite, so that overflow is seen."""
    z = x * x
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    # Near 0, where that cancels, its series.
    near = x * (1.0 + z * (-1.0 / 3.0 + z * (2.0 / 15.0 + z * (-17.0 / 315.0 + z * 62.0 / 2835.0))))
    return tl.where(z < 0.09, near, tl.where(x < 0.0, -far, far)) + 0.0 * x


def require_softcap(softcap: float) -> None:
    """ValueError for a soft cap below 0, or NaN."""
    require(softcap >= 0, f"a soft cap of {softcap}")


def require(fits: bool, what: str) -> None:
    """ValueError unless it fits: otherwise a kernel would access memory out of bounds."""
    if not fits:
        raise ValueError(f"what does not fit: {what}")


def check_distribution(distribution: str) -> None:
    """ValueError for a distribution that does not exist."""
    require(distribution in DISTRIBUTIONS, f"distribution {distribution!r}")


def check_rows(rows: int, slices: int, what: str) -> int:
    """Rows of each of ``slices`` equal slices; ValueError if they are not whole."""
    if slices < 1 or rows % slices:
        raise ValueError(f"{rows} rows are not {what}")
    return rows // slices


def check_indices(indices: Array, size: int, what: str) -> None:
    """IndexError unless all of a NumPy array are in 0 .. size - 1; tensors are taken as checked."""
    if isinstance(indices, np.ndarray) and indices.size:
        low, high = indices.min(), indices.max()
        if not 0 <= low <= high < size:
            raise IndexError(f"{what} {low} .. {high} are not all within 0 .. {size - 1}")
