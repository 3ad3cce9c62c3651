"""Our own graph of a model: forward passes through quantized weights, all lanes together."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from types import NoneType
from typing import Any
from weakref import ref

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.data.batch import Batch, Tokens, pack, split
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.graph import PLAIN, Tap, Variants
from fwdllm.engine.memory.plan import MemoryPlan, plan_gpu_step, plan_step
from fwdllm.engine.memory.residency import Residency, resident_bytes
from fwdllm.engine.models import Family
from fwdllm.engine.models.dimensions import Dimensions
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.weights import Weights
from fwdllm.kernels.api import Array, Kernels

_DENSE = (Dense, NoneType)


class OwnGraph:
    """Implements ``engine.graph.Graph`` for a family of ``engine.models``.

    args, family: what the model is.  weights: its tensors, as ``ops``, the kernels, keep them.
    exact: fp32 matmuls.  residency: which pages of the mapped weights stay in memory; None on a
    GPU, which keeps all weights.  memory_budget: bytes the process may have resident in a pass, or
    None.
    """

    def __init__(
        self,
        args: Dimensions,
        family: Family[Any],
        weights: Weights,
        ops: Kernels,
        *,
        adapter: Adapter | None = None,
        exact: bool = False,
        residency: Residency | None = None,
        memory_budget: int | None = None,
    ) -> None:
        self.args, self.family, self.weights, self.ops = args, family, weights, ops
        self.adapter = adapter
        self.exact = exact
        self.residency = residency
        self.memory_budget = memory_budget
        self._resident = resident_bytes()

    def run(self, batch: Batch, variants: Variants = PLAIN) -> list[tuple[Pass, Array]]:
        """The passes that the batch is split into, with the last layer's output of each.

        An output is [rows, width], an array of the kernels.
        """
        passes = self._passes(batch, variants)
        return list(zip(passes, self._outputs(passes), strict=True))

    def watch(self, batch: Batch, tap: Tap) -> None:
        """See ``Graph.watch``."""
        self.run(batch, Variants(tap=tap))

    def token_losses(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """See ``Graph.token_losses``."""
        unembed = self.family.unembed
        if unembed is None:
            raise ConfigError("an encoder predicts no tokens; it learns from texts with labels")
        passes = self._passes(batch, variants)
        n_lanes = len(variants.lanes)
        lanes = np.arange(n_lanes)[:, None]
        rows = [(lanes * p.batch.n_rows + p.batch.label_rows).ravel() for p in passes]
        labels = [np.tile(p.batch.label_ids, n_lanes) for p in passes]

        def losses() -> list[Array]:
            found = []
            for i, x in enumerate(self._outputs(passes)):
                x, matrix = unembed(self.args, passes[i], self.ops.take(x, rows[i]))
                lanes = passes[i].lanes
                found.append(
                    self.ops.cross_entropy(x, matrix, labels[i], lanes=lanes, exact=self.exact)
                )
            return found

        inputs = [x for p in passes for x in p.inputs] + rows + labels
        if self.adapter is not None:
            inputs.append(self.adapter.theta)
        size = batch.n_rows * n_lanes * self.args.width
        found = self.ops.repeated(self._key(batch, variants), size, inputs, losses)
        if self.residency:
            self.residency.leave(self.args.n_layers)
        return np.concatenate([self.ops.host(nll).reshape(n_lanes, -1) for nll in found], axis=1)

    def features(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """See ``Graph.features``."""
        if self.family.pool is None:
            raise ConfigError("a decoder has no pooled features; llama.cpp embeds with it")
        found = [
            self.family.pool(self.args, self.ops.host(x), p.starts).reshape(
                len(p.lanes), -1, self.args.width
            )
            for p, x in self.run(batch, variants)
        ]
        return np.concatenate(found, axis=1).reshape(-1, self.args.width)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """See ``Graph.logits``."""
        if self.family.unembed is None:
            raise ConfigError("an encoder predicts no tokens")
        tokens = Tokens(list(ids), [False] * len(ids))
        [(p, x)] = self.run(pack([tokens]))
        x, matrix = self.family.unembed(self.args, p, x)
        return self.ops.host(self.ops.matmul(x, matrix, exact=self.exact))

    def max_lanes(self, batch: Batch, n_lanes: int) -> int:
        """See ``Graph.max_lanes``."""
        return self.plan(batch, n_lanes).lanes

    def lane_tokens(self, n_rows: int, n_lanes: int, first: int) -> int:
        """See ``Graph.lane_tokens``: of layers before ``first`` one lane is computed."""
        n_layers = self.args.n_layers
        return round(n_rows * (first + n_lanes * (n_layers - first)) / n_layers)

    def plan(self, batch: Batch, n_lanes: int) -> MemoryPlan:
        """How to run a batch in n_lanes lanes within the memory there is."""
        if self.residency is None:
            return plan_gpu_step(self.args, self.ops.free_bytes(), batch.n_rows, n_lanes)
        return plan_step(
            self.args,
            self.memory_budget,
            resident=self._resident,
            largest_layer=self.residency.largest,
            n_trainable=self.adapter.theta.size if self.adapter else 0,
            n_rows=batch.n_rows,
            n_lanes=n_lanes,
            longest=int(np.diff(batch.starts).max()),
            n_labels=len(batch.label_ids),
            int8=not self.exact,
            encoder=self.family.encoder,
        )

    def _passes(self, batch: Batch, variants: Variants) -> list[Pass]:
        n_lanes = len(variants.lanes)
        memory = self.plan(batch, n_lanes)
        if self.residency:
            self.residency.limit(memory.weights)
        return [
            Pass(
                self.ops,
                self.weights,
                part,
                self.adapter,
                replace(variants, lanes=part.lanes(variants.lanes)),
                self.exact,
                memory.block_rows,
            )
            for part in split(batch, memory.block_rows // n_lanes)
        ]

    def _outputs(self, passes: Sequence[Pass]) -> list[Array]:
        """The last layer's output of each pass.

        A layer is applied to all passes before the next layer, so that its weights are read once.
        """
        if self.adapter is not None:
            theta = self.ops.array(self.adapter.theta)
            for p in passes:
                p.theta = theta
        xs = [self.family.embed(self.args, p) for p in passes]
        for layer in range(self.args.n_layers):
            if self.residency:
                self.residency.enter(layer)
            for i, p in enumerate(passes):
                xs[i] = self.family.layer(self.args, p, layer, p.enter(layer, xs[i]))
            if self.residency:
                self.residency.leave(layer)
        return xs

    def _key(self, batch: Batch, variants: Variants) -> Hashable | None:
        """The pass's key for ``Kernels.repeated``: what decides which kernels run on which shapes.

        None if the pass reads arrays that are not among the inputs passed to ``repeated``.
        """
        lanes, directions = variants.lanes, variants.directions
        if variants.tap or lanes.seeds.ndim > 1 or not isinstance(directions, _DENSE):
            return None
        return (
            ref(self.weights),
            self.adapter and ref(self.adapter),
            directions and (directions.distribution, directions.scope),
            (len(lanes), lanes.tangents, lanes.coefficients.any(), lanes.references.tobytes()),
            (batch.starts.tobytes(), batch.label_sequence.tobytes()),
            self.exact,
        )
