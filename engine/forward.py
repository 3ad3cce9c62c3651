"""A forward pass: the rows of all lanes, and the operations graphs are written in.

A graph reads like the model's paper: it names tensors and calls a Pass, which knows the
backend, the adapter and the lanes. The rows of a batch may be several passes, each of some of
its sequences; a layer is applied to all of them in turn, so weights are visited once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import numpy as np

from fwdllm.engine.adapter import Adapter
from fwdllm.engine.batch import Batch
from fwdllm.engine.directions import Directions
from fwdllm.engine.rotary import Rotary
from fwdllm.engine.weights import Weights
from fwdllm.kernels.types import Lanes, LoRA


class Pass:
    """A forward pass of ``batch`` under every lane of ``lanes``.

    Until the first perturbed layer all lanes are equal, so there is one; ``enter`` makes the rows
    of the others when the graph gets there. ids, positions, starts and lanes are those of
    the rows at hand. directions: what the lanes' seeds mean.  block_rows: what ``in_blocks`` takes
    at a time.  observe: is shown the name and the input of every adapted layer.
    """

    def __init__(
        self,
        ops: ModuleType,
        weights: Weights,
        batch: Batch,
        adapter: Adapter | None = None,
        directions: Directions | None = None,
        lanes: Lanes | None = None,
        exact: bool = False,
        block_rows: int = 1 << 30,
        observe: Callable[[str, np.ndarray], None] | None = None,
    ) -> None:
        self.ops = ops
        self.weights = weights
        self.batch = batch
        self.ids = batch.ids
        self.positions = batch.positions
        self.starts = batch.starts
        self.exact = exact
        self.block_rows = block_rows
        self._observe = observe
        self._adapter = adapter
        self._all_lanes = lanes or Lanes.plain()
        self.lanes = replace(Lanes.plain(), tangents=self._all_lanes.tangents)
        self._first_row = 0  # of a lane's rows at hand, in a block of them
        self._directions = directions
        moved = directions.targets if directions else ()
        self._moved = {target.name for target in moved}
        self._split = moved[0].layer if moved else None

    def enter(self, layer: int, x: np.ndarray) -> np.ndarray:
        """The rows that layer works on: those of all lanes from the first perturbed one on.

        Other lanes are copies of the plain rows then, and tangents zero.
        """
        if layer != self._split:
            return x
        self.lanes = self._all_lanes
        n = len(self.lanes)
        if n == 1:
            return x
        rows = self.starts[-1]
        ends = [self.starts[1:] + lane * rows for lane in range(n)]
        self.starts = np.concatenate([self.starts[:1], *ends]).astype(np.int32)
        self.positions = np.tile(self.positions, n)
        if self.tangents:
            return np.concatenate([x, np.zeros((self.tangents * len(x), x.shape[1]), np.float32)])
        return np.tile(x, (n, 1))

    def embedding(self, name: str, ids: np.ndarray) -> np.ndarray:
        """Rows ``ids`` of the table ``name``: float32 [len(ids), width]."""
        return self.ops.embedding(self.weights.matrix(name), ids)

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """x W^T + bias, with the adapter's term in each lane: float32 [rows, n_out]."""
        lora, lanes = self._term(name, x)
        return self.ops.matmul(
            x,
            self.weights.matrix(name),
            bias=self.weights.vector_or_none(f"{name}.bias"),
            lora=lora,
            lanes=lanes,
            exact=self.exact,
        )

    def _term(self, name: str, x: np.ndarray) -> tuple[LoRA | None, Lanes]:
        """The adapter's factors for ``name`` and the lanes of the rows x."""
        target = self._adapter.target(name) if self._adapter else None
        lanes = self.lanes.take(self._first_row, self._first_row + len(x) // len(self.lanes))
        if target is None or self._adapter is None:
            return None, lanes
        if self._observe is not None:
            self._observe(name, x)
        if self._directions is None or name not in self._moved:
            return self._adapter.factors(target), lanes.unperturbed()
        return self._directions.lora(target), lanes

    @property
    def tangents(self) -> int:
        """Lanes at hand that are derivatives of lane 0."""
        return self.lanes.n_tangents

    def in_blocks(self, x: np.ndarray, f: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """f(x) for an f that works row by row, a block of rows at a time to bound temporaries.

        A block is the same rows of every lane, so that lanes stay comparable inside it.
        """
        n_lanes, width = len(self.lanes), x.shape[1]
        step = max(1, self.block_rows // n_lanes)
        rows = len(x) // n_lanes
        if rows <= step:
            return f(x)
        lanes = x.reshape(n_lanes, rows, width)
        y = np.empty_like(lanes)
        for i in range(0, rows, step):
            self._first_row = i
            block = np.ascontiguousarray(lanes[:, i : i + step])
            y[:, i : i + step] = f(block.reshape(-1, width)).reshape(block.shape)
        self._first_row = 0
        return y.reshape(x.shape)

    def rms_norm(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        """RMS norm of the rows by the vector ``name``.weight."""
        return self.ops.rms_norm(x, self.weights.vector(f"{name}.weight"), eps, self.tangents)

    def layer_norm(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        """Layer norm of the rows by the vectors ``name``.weight and .bias."""
        weight, bias = (self.weights.vector(f"{name}.{part}") for part in ("weight", "bias"))
        return self.ops.layer_norm(x, weight, bias, eps, self.tangents)

    def rope(self, x: np.ndarray, rotary: Rotary, head_dim: int, interleaved: bool) -> np.ndarray:
        """Rotate the heads of x [rows, heads * head_dim] to their rows' positions."""
        cos, sin = rotary.tables(int(self.positions.max()) + 1)
        return self.ops.rope(x, self.positions, cos, sin, head_dim, interleaved)

    def attention(
        self, q: np.ndarray, k: np.ndarray, v: np.ndarray, head_dim: int, causal: bool
    ) -> np.ndarray:
        """Scaled dot-product attention inside each sequence of each lane."""
        return self.ops.attention(
            q,
            k,
            v,
            self.starts,
            head_dim=head_dim,
            scale=head_dim**-0.5,
            causal=causal,
            tangents=self.tangents,
        )

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        """silu(gate) * up."""
        return self.ops.swiglu(gate, up, self.tangents)

    def gelu(self, x: np.ndarray) -> np.ndarray:
        """GELU in its tanh approximation."""
        return self.ops.gelu(x, self.tangents)
