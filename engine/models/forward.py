"""A forward pass: the rows of all lanes, and the operations graphs are written in.

A graph reads like the model's paper: it names tensors and calls a Pass, which knows the
kernels, the adapter and the lanes. Arrays are those of the kernels, NumPy's or PyTorch's; graphs
use only operations that both have. A batch may be split into several passes, each with some of its
sequences; each layer is applied to all passes in turn, so that its weights are read only once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.graph import PLAIN, Variants
from fwdllm.engine.models.rotary import Rotary
from fwdllm.engine.models.weights import Weights
from fwdllm.kernels.api import Array, Kernels
from fwdllm.kernels.types import Lanes, LoRA


# One array of each size, so that a GPU copies it once.
@lru_cache(maxsize=8)
def _zeros(n: int) -> np.ndarray:
    return np.zeros(n, np.float32)


class Pass:
    """A forward pass of ``batch`` under every lane of ``variants``.

    Before the first perturbed layer all lanes are equal, so only one is computed; ``enter`` adds
    the rows of the others when the graph reaches that layer. ids, positions, starts and lanes are
    those of the current rows.  block_rows: rows, of all lanes, that ``in_blocks`` takes at a time.
    """

    def __init__(
        self,
        ops: Kernels,
        weights: Weights,
        batch: Batch,
        adapter: Adapter | None = None,
        variants: Variants = PLAIN,
        exact: bool = False,
        block_rows: int = 1 << 30,
    ) -> None:
        self.ops = ops
        self.weights = weights
        self.batch = batch
        self.ids = batch.ids
        self.exact = exact
        self.block_rows = block_rows
        self._tap = variants.tap
        self.adapter = adapter
        self._all_lanes = variants.lanes
        self.begin(None)
        self._first_row = 0  # of each lane, in the current block of rows
        self._directions = variants.directions
        moved = self._directions.targets if self._directions else ()
        self._moved = {target.name for target in moved}
        layers = [moved[0].layer] if moved else []
        if self._tap is not None and self._tap.layer is not None:
            layers.append(self._tap.layer)
        self._split = min(layers, default=None)
        # Starts and positions of all lanes' rows, for ``enter``. They are made here because
        # kernels may need the arrays before the pass runs, see ``inputs``.
        n, rows = len(self._all_lanes), self.starts[-1]
        ends = [self.starts[1:] + lane * rows for lane in range(n)]
        self._all_starts = np.concatenate([self.starts[:1], *ends]).astype(np.int32)
        self._all_positions = np.tile(self.positions, n)
        self._still = self._all_lanes.unperturbed()

    def begin(self, theta: Array | None) -> None:
        """Go to before the first layer. theta: the kernels' copy of the adapter's."""
        self.theta = theta
        self.positions, self.starts = self.batch.positions, self.batch.starts
        self.lanes = replace(Lanes.plain(), tangents=self._all_lanes.tangents)

    @property
    def inputs(self) -> list[np.ndarray]:
        """The arrays that depend only on the batch and the seeds; see ``Kernels.repeated``."""
        lanes = self._all_lanes
        return [self.ids, self.positions, self._all_positions, lanes.seeds, lanes.coefficients]

    def enter(self, layer: int, x: Array) -> Array:
        """The input of a layer, given x, the output of the layer before.

        At the first perturbed layer the rows of the other lanes are added: copies of the plain
        rows, or zeros for tangents. Elsewhere it is x.
        """
        if layer != self._split:
            return x
        self.lanes = self._all_lanes
        if len(self.lanes) == 1:
            return x
        self.starts, self.positions = self._all_starts, self._all_positions
        return self.ops.spread(x, self.lanes, self.exact)

    def lanes_of(self, x: Array) -> tuple[int, np.ndarray]:
        """How many lanes an output of the last layer has, and the starts of all their sequences.

        Also of a pass that was not run, because a recording of one like it was.
        """
        n = len(x) // self.batch.n_rows
        return n, self._all_starts if n > 1 else self.batch.starts

    def embedding(self, name: str, ids: np.ndarray) -> Array:
        """Rows ``ids`` of the table ``name``: float32 [len(ids), width]."""
        return self.ops.embedding(self.weights.matrix(name), ids)

    def linear(self, x: Array, name: str) -> Array:
        """x W^T + bias, with the adapter's term in each lane: float32 [rows, n_out]."""
        target = self.adapter.target(name) if self.adapter else None
        n_rows = len(x) // len(self.lanes)
        lanes = self.lanes.take(self._first_row, self._first_row + n_rows)
        lora, lanes = self._term(target, lanes)
        y = self.ops.matmul(
            x,
            self.weights.matrix(name),
            bias=self.weights.vector_or_none(f"{name}.bias"),
            lora=lora,
            lanes=lanes,
            exact=self.exact,
        )
        if self._tap is not None and target is not None:
            start = self.batch.first_row + self._first_row
            seen = self.ops.host(y)
            self._tap(target, slice(start, start + n_rows), self.ops.host(x), seen)
            if seen is not y and self._tap.layer is not None:
                y[:] = self.ops.array(seen)
        return y

    def split(self, x: Array, *widths: int) -> list[Array]:
        """The columns of x, the product of several matrices in one, as an array for each width."""
        ends = accumulate(widths)
        return [
            self.ops.contiguous(x[:, end - width : end])
            for width, end in zip(widths, ends, strict=True)
        ]

    def _term(self, target: Target | None, lanes: Lanes) -> tuple[LoRA | None, Lanes]:
        """The adapter's factors for a target, and the lanes as far as they perturb it."""
        if target is None or self.adapter is None:
            return None, lanes
        if self._directions is None or target.name not in self._moved:
            still = self._still if len(lanes) == len(self._still) else lanes.unperturbed()
            return self.adapter.factors(target, self.theta), still
        return self._directions.lora(target, self.theta), lanes

    @property
    def tangents(self) -> int:
        """Number of current lanes that are derivatives of lane 0."""
        return self.lanes.n_tangents

    def in_blocks(self, x: Array, f: Callable[[Array], Array]) -> Array:
        """f(x) for an f that treats each row independently, a block at a time to save memory.

        A block has the same rows of every lane, because kernels relate lanes to each other (see
        ``Lanes.references``). The result may overwrite x.
        """
        n_lanes, width = len(self.lanes), x.shape[1]
        step = max(1, self.block_rows // n_lanes)
        rows = len(x) // n_lanes
        if rows <= step:
            return f(x)
        lanes = x.reshape(n_lanes, rows, width)
        for i in range(0, rows, step):
            self._first_row = i
            block = lanes[:, i : i + step]
            lanes[:, i : i + step] = f(self.ops.contiguous(block.reshape(-1, width))).reshape(
                block.shape
            )
        self._first_row = 0
        return lanes.reshape(x.shape)

    def rms_norm(self, x: Array, name: str, eps: float) -> Array:
        """RMS norm of the rows by the vector ``name``.weight."""
        return self.ops.rms_norm(x, self.weights.vector(f"{name}.weight"), eps, self.tangents)

    def layer_norm(self, x: Array, name: str, eps: float) -> Array:
        """Layer norm of the rows by the vectors ``name``.weight and, if there is one, .bias."""
        return self.ops.layer_norm(x, *self._gain_and_bias(name), eps, self.tangents)

    def _gain_and_bias(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        weight = self.weights.vector(f"{name}.weight")
        bias = self.weights.vector_or_none(f"{name}.bias")
        return weight, _zeros(len(weight)) if bias is None else bias

    def rope(self, x: Array, rotary: Rotary, head_dim: int, interleaved: bool) -> Array:
        """Rotary embedding of the heads of x [rows, heads * head_dim] at the rows' positions."""
        cos, sin = rotary.tables(int(self.positions.max()) + 1)
        return self.ops.rope(x, self.positions, cos, sin, head_dim, interleaved)

    def attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        head_dim: int,
        causal: bool,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Array:
        """Scaled dot-product attention inside each sequence of each lane.

        scale: None is 1 / sqrt(head_dim).  window, softcap: see ``Kernels.attention``.
        """
        return self.ops.attention(
            q,
            k,
            v,
            self.starts,
            head_dim=head_dim,
            scale=head_dim**-0.5 if scale is None else scale,
            causal=causal,
            window=window,
            softcap=softcap,
            tangents=self.tangents,
        )

    def swiglu(self, gate: Array, up: Array) -> Array:
        """silu(gate) * up."""
        return self.ops.swiglu(gate, up, self.tangents)

    def geglu(self, gate: Array, up: Array) -> Array:
        """gelu(gate) * up."""
        return self.ops.geglu(gate, up, self.tangents)

    def gelu(self, x: Array) -> Array:
        """GELU in its tanh approximation."""
        return self.ops.gelu(x, self.tangents)
