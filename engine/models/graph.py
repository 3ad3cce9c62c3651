"""Our own graph of a model: forward passes through quantized weights, all lanes together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
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
from fwdllm.engine.memory.plan import (
    GradientPlan,
    MemoryPlan,
    plan_gpu_gradient,
    plan_gpu_step,
    plan_gradient,
    plan_step,
)
from fwdllm.engine.memory.residency import Residency, resident_bytes
from fwdllm.engine.models import Family
from fwdllm.engine.models.backward import Backward
from fwdllm.engine.models.dimensions import Dimensions
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.weights import Weights
from fwdllm.kernels.api import Array, BackwardKernels

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
        ops: BackwardKernels,
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

    def token_gradient(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """See ``Graph.token_gradient``."""
        unembed = self.family.unembed
        if unembed is None:
            raise ConfigError("an encoder predicts no tokens; it learns from texts with labels")
        losses = []

        def cotangent(back: Backward, x: Array) -> Array:
            rows, labels = back.batch.label_rows, back.batch.label_ids
            last = back.leaf(self.ops.take(x, rows))
            output: Any  # a node, see Backward
            output, matrix = unembed(self.args, back, last)
            nll, of_output = self.ops.cross_entropy_vjp(
                output.value, matrix, labels, exact=self.exact
            )
            losses.append(self.ops.host(nll))
            back.pull_back(output, of_output / batch.n_labels)
            found = self.ops.zeros(*x.shape)
            found[rows] = last.cotangent
            return found

        gradient = self._gradient(batch, cotangent)
        return np.concatenate(losses), gradient

    def feature_gradient(
        self, batch: Batch, cotangents: Callable[[Batch, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``Graph.feature_gradient``."""
        pool, pool_vjp = self.family.pool, self.family.pool_vjp
        if pool is None or pool_vjp is None:
            raise ConfigError("a decoder has no pooled features; llama.cpp embeds with it")
        features = []

        def cotangent(back: Backward, x: Array) -> Array:
            found = pool(self.args, self.ops.host(x), back.starts)
            features.append(found)
            of_rows = pool_vjp(self.args, cotangents(back.batch, found), back.starts)
            return self.ops.array(of_rows)

        gradient = self._gradient(batch, cotangent)
        return np.concatenate(features), gradient

    def _gradient(self, batch: Batch, cotangent: Callable[[Backward, Array], Array]) -> np.ndarray:
        """The gradient by theta, float32 [n_lora] and zeros for a head.

        cotangent: of the last layer's output, of one pass of some sequences after the other.
        Forward only what layers read is kept; back each layer is computed again from that.
        """
        if self.adapter is None:
            raise ConfigError("a gradient needs an adapter to be of")
        first = min(target.layer for target in self.adapter.targets)
        memory = self.plan_gradient(batch, first)
        if self.residency:
            self.residency.limit(memory.weights)
        gradient = self.ops.zeros(*self.adapter.theta.shape)
        for part in split(batch, memory.rows):
            self._add_gradient(part, first, memory.block_rows, cotangent, gradient)
        return self.ops.host(gradient)

    def _add_gradient(
        self,
        batch: Batch,
        first: int,
        block_rows: int,
        cotangent: Callable[[Backward, Array], Array],
        gradient: Array,
    ) -> None:
        """The same of some sequences, added to ``gradient``; nothing changes below ``first``."""
        passes = self._split(batch, PLAIN, block_rows)
        kept: list[list[Array]] = []

        def keep(layer: int, xs: Sequence[Array]) -> None:
            if layer >= first:
                kept.append(list(xs))

        outputs = self._outputs(passes, keep)
        ways = [Backward.of(p, self.ops, gradient) for p in passes]
        cotangents = [cotangent(back, x) for back, x in zip(ways, outputs, strict=True)]
        if self.residency:
            self.residency.leave(self.args.n_layers)
        for layer in reversed(range(first, self.args.n_layers)):
            if self.residency:
                self.residency.enter(layer, back=True)
            for i, (back, x) in enumerate(zip(ways, kept.pop(), strict=True)):
                leaf = back.leaf(x, layer > first)
                output: Any = self.family.layer(self.args, back, layer, leaf)
                back.pull_back(output, cotangents[i])
                if leaf.cotangent is not None:
                    cotangents[i] = leaf.cotangent
            if self.residency:
                self.residency.leave(layer)

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

    def plan_gradient(self, batch: Batch, first_layer: int) -> GradientPlan:
        """How a batch is to go forward and back to layer ``first_layer``."""
        assert self.adapter is not None
        longest, n_labels = int(np.diff(batch.starts).max()), len(batch.label_ids)
        if self.residency is None:
            return plan_gpu_gradient(
                self.args,
                self.ops.free_bytes(),
                n_trainable=self.adapter.theta.size,
                n_rows=batch.n_rows,
                first_layer=first_layer,
                longest=longest,
                n_labels=n_labels,
                exact=self.exact,
            )
        return plan_gradient(
            self.args,
            self.memory_budget,
            resident=self._resident,
            largest_layer=self.residency.largest,
            n_trainable=self.adapter.theta.size,
            n_rows=batch.n_rows,
            first_layer=first_layer,
            longest=longest,
            n_labels=n_labels,
            encoder=self.family.encoder,
        )

    def _passes(self, batch: Batch, variants: Variants) -> list[Pass]:
        memory = self.plan(batch, len(variants.lanes))
        if self.residency:
            self.residency.limit(memory.weights)
        return self._split(batch, variants, memory.block_rows)

    def _split(self, batch: Batch, variants: Variants, block_rows: int) -> list[Pass]:
        return [
            Pass(
                self.ops,
                self.weights,
                part,
                self.adapter,
                replace(variants, lanes=part.lanes(variants.lanes)),
                self.exact,
                block_rows,
            )
            for part in split(batch, block_rows // len(variants.lanes))
        ]

    def _outputs(
        self,
        passes: Sequence[Pass],
        keep: Callable[[int, Sequence[Array]], None] = lambda layer, xs: None,
    ) -> list[Array]:
        """A layer is applied to all passes before the next one, so weights are visited once.

        keep: sees what each layer is about to read.
        """
        if self.adapter is not None:
            theta = self.ops.array(self.adapter.theta)
            for p in passes:
                p.theta = theta
        xs = [self.family.embed(self.args, p) for p in passes]
        for layer in range(self.args.n_layers):
            if self.residency:
                self.residency.enter(layer)
            keep(layer, xs)
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
