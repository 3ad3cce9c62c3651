"""Our own graph of a model: forward passes through quantized weights, all lanes together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
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
from fwdllm.engine.memory.residency import Residency
from fwdllm.engine.memory.system import resident_bytes
from fwdllm.engine.models import Family
from fwdllm.engine.models.backward import Backward, Recorded
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
                    self.ops.cross_entropy(
                        x,
                        matrix,
                        labels[i],
                        lanes=lanes,
                        softcap=self.args.logit_softcap,
                        exact=self.exact,
                    )
                )
            return found

        found = self._repeated(batch, variants, passes, rows + labels, losses)
        if self.residency:
            self.residency.leave(self.args.n_layers)
        return np.concatenate([self.ops.host(nll).reshape(n_lanes, -1) for nll in found], axis=1)

    def features(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """See ``Graph.features``."""
        if self.family.pool is None:
            raise ConfigError("a decoder has no pooled features; llama.cpp embeds with it")
        passes = self._passes(batch, variants)
        outputs = self._repeated(batch, variants, passes, [], lambda: self._outputs(passes))
        found = []
        for p, x in zip(passes, outputs, strict=True):
            n_lanes, starts = p.lanes_of(x)
            features = self.family.pool(self.args, self.ops.host(x), starts)
            found.append(features.reshape(n_lanes, -1, self.args.width))
        return np.concatenate(found, axis=1).reshape(-1, self.args.width)

    def token_gradient(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """See ``Graph.token_gradient``."""
        unembed = self.family.unembed
        if unembed is None:
            raise ConfigError("an encoder predicts no tokens; it learns from texts with labels")
        losses = []

        def cotangent(back: Backward, x: Array) -> Array:
            rows, labels = back.batch.label_rows, back.batch.label_ids
            matrix: Any = None

            def output(x: Any) -> Any:
                nonlocal matrix
                x, matrix = unembed(self.args, back, x)
                return x

            last = back.record(output, self.ops.take(x, rows))
            softcap, exact = self.args.logit_softcap, self.exact
            nll, of_output = self.ops.cross_entropy_vjp(
                last.value(), matrix, labels, softcap=softcap, exact=exact
            )
            losses.append(self.ops.host(nll))
            found = self.ops.zeros(*x.shape)
            found[rows] = last.pull_back(of_output / batch.n_labels)
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
        Forward only what layers read is kept, and back each layer is computed again from that; of
        the last layers what there is room for is kept instead.
        """
        if self.adapter is None:
            raise ConfigError("a gradient needs an adapter to be of")
        first = min(target.layer for target in self.adapter.targets)
        memory = self.plan_gradient(batch, first)
        if self.residency:
            self.residency.limit(memory.weights)
        gradient = self.ops.zeros(*self.adapter.theta.shape)
        for part in split(batch, memory.rows):
            self._add_gradient(part, first, memory, cotangent, gradient)
        return self.ops.host(gradient)

    def _add_gradient(
        self,
        batch: Batch,
        first: int,
        memory: GradientPlan,
        cotangent: Callable[[Backward, Array], Array],
        gradient: Array,
    ) -> None:
        """The same of some sequences, added to ``gradient``; nothing changes below ``first``."""
        passes = self._split(batch, PLAIN, memory.block_rows)
        xs = self._inputs(passes)
        ways = [Backward.of(p, self.ops, gradient) for p in passes]
        # For each layer from ``first`` on and each pass, where its way back begins.
        kept: list[list[Array | Recorded]] = [[] for _ in range(first, self.args.n_layers)]

        def record(layer: int, i: int, x: Array) -> Recorded:
            f = partial(self.family.layer, self.args, ways[i], layer)
            return ways[i].record(f, x, wanted=layer > first)

        def forward(layer: int, i: int, x: Array) -> Array:
            if layer < first:
                return self.family.layer(self.args, passes[i], layer, x)
            if layer < self.args.n_layers - memory.kept_layers:
                kept[layer - first].append(x)
                return self.family.layer(self.args, passes[i], layer, x)
            recorded = record(layer, i, x)
            kept[layer - first].append(recorded)
            return recorded.value()

        outputs = self._through_layers(xs, forward)
        cotangents = [cotangent(back, x) for back, x in zip(ways, outputs, strict=True)]
        del xs, outputs
        if self.residency:
            self.residency.leave(self.args.n_layers)
        for layer in reversed(range(first, self.args.n_layers)):
            if self.residency:
                self.residency.enter(layer, back=True)
            for i, start in enumerate(kept.pop()):
                recorded = start if isinstance(start, Recorded) else record(layer, i, start)
                of_input = recorded.pull_back(cotangents[i])
                if of_input is not None:
                    cotangents[i] = of_input
            if self.residency:
                self.residency.leave(layer)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """See ``Graph.logits``."""
        if self.family.unembed is None:
            raise ConfigError("an encoder predicts no tokens")
        tokens = Tokens(list(ids), [False] * len(ids))
        [(p, x)] = self.run(pack([tokens]))
        x, matrix = self.family.unembed(self.args, p, x)
        logits = self.ops.host(self.ops.matmul(x, matrix, exact=self.exact))
        softcap = self.args.logit_softcap
        return softcap * np.tanh(logits / softcap) if softcap else logits

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
            weight_bytes=self.residency.total,
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

    def _outputs(self, passes: Sequence[Pass]) -> list[Array]:
        """The last layer's output of each pass."""

        def layer(i_layer: int, i: int, x: Array) -> Array:
            p = passes[i]
            return self.family.layer(self.args, p, i_layer, p.enter(i_layer, x))

        return self._through_layers(self._inputs(passes), layer)

    def _inputs(self, passes: Sequence[Pass]) -> list[Array]:
        """The first layer's input of each pass, which from now on is at the adapter's theta."""
        theta = None if self.adapter is None else self.ops.array(self.adapter.theta)
        for p in passes:
            p.begin(theta)
        return [self.family.embed(self.args, p) for p in passes]

    def _through_layers(
        self, xs: list[Array], layer: Callable[[int, int, Array], Array]
    ) -> list[Array]:
        """A layer is applied to all passes before the next one, so weights are visited once.

        layer: of its number, a pass's number and the pass's input.
        """
        for i_layer in range(self.args.n_layers):
            if self.residency:
                self.residency.enter(i_layer)
            for i, x in enumerate(xs):
                xs[i] = layer(i_layer, i, x)
            if self.residency:
                self.residency.leave(i_layer)
        return xs

    def _repeated(
        self,
        batch: Batch,
        variants: Variants,
        passes: Sequence[Pass],
        others: Sequence[np.ndarray],
        run: Callable[[], list[Array]],
    ) -> list[Array]:
        """What ``run`` returns, by ``Kernels.repeated``. others: arrays that only it reads."""
        inputs = [x for p in passes for x in p.inputs] + list(others)
        if self.adapter is not None:
            inputs.append(self.adapter.theta)
        size = batch.n_rows * len(variants.lanes) * self.args.width
        return self.ops.repeated(self._key(batch, variants), size, inputs, run)

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
