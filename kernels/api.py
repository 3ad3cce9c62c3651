"""The operations that kernels offer: the one interface between kernels and code that calls them.

``fwdllm.kernels.reference`` (NumPy, the specification), ``fwdllm.kernels.cpu`` (C++) and
``fwdllm.kernels.triton`` (GPUs) are modules with the functions of ``Kernels`` and of
``BackwardKernels``; the first two, whose arrays are the host's, also have those of ``HostKernels``.

Activations are [rows, width], float32, on a GPU also bfloat16. Rows of lanes are equal slices, one
lane after the other (see ``Lanes``). Operations that are not linear take a number ``tangents``:
rows are then 1 + tangents equal slices, a primal and directional derivatives of it, and so is the
result. ``exact`` asks for matmuls in float32; without it they may be in int8 or bfloat16. Attention
has at least 16 bits of its operands on AMX's tiles, elsewhere on CPUs all of them.

Shapes that do not fit raise ValueError, an index out of range ValueError or IndexError. Contents of
arrays that are on a GPU already are not checked.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from fwdllm.kernels.types import Array as Array
from fwdllm.kernels.types import Lanes, LoRA, QuantType, Weight


class Matrix(Protocol):
    """A quantized matrix W [n_out, n_in] where kernels keep it: a ``Weight``, or one on a GPU.

    data: uint8 [n_out, row_bytes].
    """

    @property
    def data(self) -> Array: ...

    @property
    def type(self) -> QuantType: ...

    @property
    def n_out(self) -> int: ...

    @property
    def n_in(self) -> int: ...


class Kernels(Protocol):
    """Operations that all kernels have."""

    # Moving arrays.

    def weight(self, weight: Weight) -> Matrix:
        """A weight as the kernels keep it: as it is, or copied to the GPU."""

    def array(self, x: np.ndarray) -> Array:
        """An array in the kernels' memory, for use during a pass."""

    def host(self, x: Array) -> np.ndarray:
        """An array of the kernels as a NumPy array; bfloat16, which NumPy lacks, as float32."""

    def free_bytes(self) -> int | None:
        """Free memory of the GPU; None if arrays are in host memory."""

    def repeated(
        self,
        key: Hashable | None,
        size: int,
        inputs: Sequence[np.ndarray],
        run: Callable[[], list[Array]],
    ) -> list[Array]:
        """What ``run`` returns; on a GPU its kernel launches may be recorded and replayed.

        key: equal for passes that differ only in the contents of ``inputs``; with None the pass is
        never recorded.  size: elements of a layer's activations, because recording is of no use for
        large passes.  inputs: all arrays that ``run`` reads and that differ between passes. The
        result is valid until the next call.
        """

    # The random stream, as NumPy arrays.

    def philox(self, seed: int, start: int, count: int) -> np.ndarray:
        """Words of Philox-4x32-10 at counters start .. start + count: uint32 [count, 4].

        seed: uint64, the key.
        """

    def normal(self, seed: int, start: int, count: int) -> np.ndarray:
        """Elements start .. start + count of v(seed), standard normals: float32 [count].

        Element i is component i % 4 of Box-Muller on the words of counter i // 4.
        """

    def rademacher(self, seed: int, start: int, count: int) -> np.ndarray:
        """Elements start .. start + count of the direction of signs: float32 [count], -1 or 1."""

    def seeded_axpy(
        self,
        theta: np.ndarray,
        seeds: np.ndarray,
        coefficients: np.ndarray,
        *,
        offset: int = 0,
        distribution: str = "normal",
    ) -> None:
        """theta += sum_k coefficients[k] v(seeds[k])[offset : offset + n], in place.

        theta: float32 [n].  seeds: uint64 [k].  coefficients: float32 [k].  distribution: "normal"
        or "rademacher".
        """

    def seeded_dot(
        self, g: np.ndarray, seeds: np.ndarray, *, offset: int = 0, distribution: str = "normal"
    ) -> np.ndarray:
        """g . v(seeds[k])[offset : offset + n] for each k: float64 [k]; g float32 [n]."""

    # Matmuls with quantized matrices.

    def dequantize(self, weight: Matrix) -> np.ndarray:
        """The whole matrix: float32 [n_out, n_in]."""

    def embedding(self, weight: Matrix, ids: np.ndarray) -> Array:
        """Rows ``ids`` (int32 [rows]) of a matrix: float32 [rows, n_in]."""

    def matmul(
        self,
        x: Array,
        weight: Matrix,
        *,
        bias: Array | None = None,
        lora: LoRA | None = None,
        lanes: Lanes | None = None,
        exact: bool = False,
    ) -> Array:
        """y_l = x_l W^T + bias + scale (x_l A_l^T) B_l^T for each lane l: [rows, n_out].

        A_l = A + c_l dA(seed_l), and B_l likewise, with the directions that ``LoRA`` describes.
        With tangents lane 0 is plain and the others have its derivative,
        dx W^T + scale ((dx A^T + c x dA^T) B^T + c x A^T dB^T), without bias.
        x: [rows, n_in].  bias: float32 [n_out].  lanes: None is one plain lane.
        """

    def cross_entropy(
        self,
        x: Array,
        weight: Matrix,
        labels: np.ndarray,
        *,
        lanes: Lanes | None = None,
        softcap: float = 0.0,
        exact: bool = False,
    ) -> Array:
        """-log softmax(x W^T)[label] of each row in nats: float64 [rows]; logits are not stored.

        x: [rows, n_in].  weight: [vocabulary, n_in].  labels: int32 [rows]. Rows of tangents have
        the derivatives of the losses of lane 0.  softcap: c > 0 makes c tanh(l / c) of a logit l.
        """

    # Operations between the matmuls.

    def rms_norm(self, x: Array, weight: np.ndarray, eps: float, tangents: int = 0) -> Array:
        """x / sqrt(mean(x^2) + eps) * weight along rows; weight float32 [width]."""

    def layer_norm(
        self, x: Array, weight: np.ndarray, bias: np.ndarray, eps: float, tangents: int = 0
    ) -> Array:
        """(x - mean) / sqrt(variance + eps) * weight + bias along rows; both float32 [width]."""

    def rope(
        self,
        x: Array,
        positions: np.ndarray,
        cos: np.ndarray,
        sin: np.ndarray,
        head_dim: int,
        interleaved: bool,
    ) -> Array:
        """Pair i of each head (a, b) becomes (a cos - b sin, a sin + b cos) at [position, i].

        x: [rows, n_heads * head_dim].  positions: int32 [rows].  cos, sin: float32 [n_positions,
        rotated / 2]; dimensions from ``rotated`` on are unchanged.  interleaved: a pair is
        dimensions (2i, 2i + 1), as in llama files, else (i, i + rotated / 2).
        """

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        starts: np.ndarray,
        *,
        head_dim: int,
        scale: float,
        causal: bool,
        window: int = 0,
        softcap: float = 0.0,
        tangents: int = 0,
    ) -> Array:
        """softmax(scale q k^T) v in each sequence and head: [rows, n_heads * head_dim].

        q: [rows, n_heads * head_dim].  k, v: [rows, n_kv_heads * head_dim]; query head h reads
        head h // (n_heads / n_kv_heads).  starts: int32 [n_sequences + 1], where sequences begin,
        from 0 to rows; with tangents first the primal's sequences, then those of each tangent.
        causal: a row sees itself and the rows before it, else also those behind it.  window: of
        these only rows less than ``window`` away; 0 is no bound.  softcap: c > 0 makes
        c tanh(s / c) of a score s = scale q . k.
        """

    def swiglu(self, gate: Array, up: Array, tangents: int = 0) -> Array:
        """silu(gate) * up, element by element; silu(g) = g / (1 + exp(-g))."""

    def geglu(self, gate: Array, up: Array, tangents: int = 0) -> Array:
        """gelu(gate) * up, element by element."""

    def gelu(self, x: Array, tangents: int = 0) -> Array:
        """0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), element by element."""

    # Rows.

    def spread(self, x: Array, lanes: Lanes, exact: bool = False) -> Array:
        """The rows of all lanes, from the plain rows x: copies of x, or zeros for tangents.

        exact: without it, and with tangents, a GPU keeps all rows in bfloat16 from here on.
        """

    def contiguous(self, x: Array) -> Array:
        """x as a contiguous array; x itself if it is one."""

    def take(self, x: Array, rows: np.ndarray) -> Array:
        """The rows of x with these numbers."""


@runtime_checkable
class HostKernels(Kernels, Protocol):
    """Operations that only kernels in host memory have, for use around matmuls of llama.cpp.

    GPU kernels lack them, because llama.cpp computes on the CPU here.
    """

    def add_lora(self, y: np.ndarray, x: np.ndarray, lora: LoRA, lanes: Lanes) -> None:
        """y += scale (x_l A_l^T) B_l^T for each lane l, in place: what ``matmul`` would add.

        y: float32 [rows, n_out].  x: float32 [rows, n_in].
        """

    def to_relative(self, x: np.ndarray, references: np.ndarray) -> np.ndarray:
        """x[r] = (x[r] - x[references[r]]) s[r] if the reference is another row; returns s.

        x: float32 [rows, width], changed in place.  references: int32 [rows]; a reference is an
        earlier row, or r itself, and must be its own reference.  s: float32 [rows], powers of two
        that bring a row's largest magnitude to 1 .. 2; 1 if it is almost 0 or almost infinite. What
        rows have in common is then rounded once by the matmul that reads them.
        """

    def from_relative(self, y: np.ndarray, references: np.ndarray, scales: np.ndarray) -> None:
        """The way back after a product: y[r] = y[r] / scales[r] + y[references[r]], in place."""


class BackwardKernels(Kernels, Protocol):
    """Vector-Jacobian products (VJPs): from dy, the gradient of a loss by what an operation gives,
    that by what it reads, called their cotangents. Each is of the operation of its name for one
    plain lane, without tangents.

    Rotary embedding needs none of its own: that of ``rope`` with sin is ``rope`` with -sin.
    """

    def zeros(self, *shape: int) -> Array:
        """Zeros, float32, in the kernels' memory: where cotangents are put or added up."""

    def matmul_vjp(
        self, dy: Array, weight: Matrix, *, lora: LoRA | None = None, exact: bool = False
    ) -> Array:
        """dx = dy W + scale (dy B) A: [rows, n_out] to float32 [rows, n_in].

        Without ``exact`` both factors of dy W may be rounded to int8 or bfloat16.
        """

    def lora_vjp(self, x: Array, dy: Array, lora: LoRA, da: Array, db: Array) -> None:
        """da += scale (dy B)^T x and db += scale dy^T (x A^T), in place.

        x: [rows, n_in].  dy: [rows, n_out].  da: float32 [rank, n_in].  db: float32 [n_out, rank].
        Rows are added one after the other, so that rows in several calls give the bits of one.
        """

    def cross_entropy_vjp(
        self,
        x: Array,
        weight: Matrix,
        labels: np.ndarray,
        *,
        softcap: float = 0.0,
        exact: bool = False,
    ) -> tuple[Array, Array]:
        """``cross_entropy`` [rows], and dx by each row's own loss: float32 [rows, n_in].

        dx[r] = sum_j p[r, j] W[j] - W[labels[r]], p the softmax of the row's logits, of which those
        of a block of the vocabulary exist at a time; with a soft cap each term times its slope.
        """

    def rms_norm_vjp(self, x: Array, weight: np.ndarray, eps: float, dy: Array) -> Array:
        """dx of ``rms_norm``: float32 [rows, width]."""

    def layer_norm_vjp(self, x: Array, weight: np.ndarray, eps: float, dy: Array) -> Array:
        """dx of ``layer_norm``, whose bias does not matter: float32 [rows, width]."""

    def swiglu_vjp(self, gate: Array, up: Array, dy: Array) -> tuple[Array, Array]:
        """The cotangents of gate and up: float32, element by element."""

    def geglu_vjp(self, gate: Array, up: Array, dy: Array) -> tuple[Array, Array]:
        """The cotangents of gate and up: float32, element by element."""

    def gelu_vjp(self, x: Array, dy: Array) -> Array:
        """dx of ``gelu``: float32, element by element."""

    def attention_vjp(
        self,
        q: Array,
        k: Array,
        v: Array,
        starts: np.ndarray,
        dy: Array,
        *,
        head_dim: int,
        scale: float,
        causal: bool,
        window: int = 0,
        softcap: float = 0.0,
    ) -> tuple[Array, Array, Array]:
        """The cotangents of q, k and v; probabilities are computed again and never stored whole."""
