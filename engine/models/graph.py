"""A model's own graph: forward passes of a batch through quantized weights, all lanes together."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType, NoneType
from typing import TYPE_CHECKING, Any
from weakref import ref

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.data.batch import Batch, Tokens, pack, split
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.models import Family, bert
from fwdllm.engine.models.forward import PLAIN, Pass, Tap, Variants
from fwdllm.engine.models.weights import Weights

if TYPE_CHECKING:
    from fwdllm.engine.memory.plan import MemoryPlan
    from fwdllm.engine.memory.residency import Residency

# Rows of all lanes times width: 4,096 rows of a model of a billion parameters, 15 ms of an H100,
# are as long as launching the kernels of its 22 layers. An estimate that awaits its measurement.
_REPEATED_ELEMENTS = 1 << 23
_DENSE = (Dense, NoneType)


@dataclass(frozen=True)
class Graph:
    """What computes a model's outputs.

    args, family: what the model is.  weights: its tensors, as ``ops``, the kernel backend, keeps
    them.  adapter: or None.  exact: fp32 products.  plan: how a batch is to go through in so many
    lanes.  residency: of the weights' pages, where they are a mapped file.
    """

    args: Any
    family: Family
    weights: Weights
    ops: ModuleType
    adapter: Adapter | None
    exact: bool
    plan: Callable[[Batch, int], MemoryPlan]
    residency: Residency | None = None

    def run(self, batch: Batch, variants: Variants = PLAIN) -> list[tuple[Pass, Any]]:
        """The last layer's output, in passes of some sequences each: [rows, width].

        Arrays are the backend's.
        """
        passes = self._passes(batch, variants)
        return list(zip(passes, self._outputs(passes), strict=True))

    def watch(self, batch: Batch, tap: Tap) -> None:
        """Let a tap look on at a plain pass."""
        self.run(batch, Variants(tap=tap))

    def token_losses(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """NLL of label tokens in every lane, slopes in tangents: float64 [n_lanes, n_labels]."""
        if self.family.encoder:
            raise ConfigError("an encoder predicts no tokens; it learns from texts with labels")
        passes = self._passes(batch, variants)
        n_lanes = len(variants.lanes)
        lanes = np.arange(n_lanes)[:, None]
        rows = [(lanes * p.batch.n_rows + p.batch.label_rows).ravel() for p in passes]
        labels = [np.tile(p.batch.label_ids, n_lanes) for p in passes]

        def losses() -> list[Any]:
            found = []
            for i, x in enumerate(self._outputs(passes)):
                p = passes[i]
                x = p.rms_norm(self.ops.take(x, rows[i]), "output_norm", self.args.norm_eps)
                found.append(
                    self.ops.cross_entropy(
                        x, self._output, labels[i], lanes=p.lanes, exact=self.exact
                    )
                )
            return found

        inputs = [x for p in passes for x in p.inputs] + rows + labels
        if self.adapter is not None:
            inputs.append(self.adapter.theta)
        found = self.ops.repeated(self._key(batch, variants), inputs, losses)
        if self.residency:
            self.residency.leave(self.args.n_layers)
        return np.concatenate([self.ops.host(nll).reshape(n_lanes, -1) for nll in found], axis=1)

    def features(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """Pooled features of every sequence in every lane: float32 [lanes * sequences, width]."""
        if not self.family.encoder:
            raise ConfigError("a decoder has no pooled features; llama.cpp embeds with it")
        found = [
            bert.pool(self.args, self.ops.host(x), p.starts).reshape(
                len(p.lanes), -1, self.args.width
            )
            for p, x in self.run(batch, variants)
        ]
        return np.concatenate(found, axis=1).reshape(-1, self.args.width)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits after each token of one sequence: float32 [n_tokens, n_vocab]."""
        if self.family.encoder:
            raise ConfigError("an encoder predicts no tokens")
        tokens = Tokens(list(ids), [False] * len(ids))
        [(p, x)] = self.run(pack([tokens]))
        x = p.rms_norm(x, "output_norm", self.args.norm_eps)
        logits: np.ndarray = self.ops.host(self.ops.matmul(x, self._output, exact=self.exact))
        return logits

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

    def _outputs(self, passes: Sequence[Pass]) -> list[Any]:
        """A layer is applied to all passes before the next one, so weights are visited once."""
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
        """What a backend may know this pass by: all that decides which kernels run on what shapes.

        None for what reads more arrays than it gives away, and for passes so large that launching
        their kernels takes no time beside them.
        """
        lanes, directions = variants.lanes, variants.directions
        wide = batch.n_rows * len(lanes) * self.args.width > _REPEATED_ELEMENTS
        if wide or variants.tap or lanes.seeds.ndim > 1 or not isinstance(directions, _DENSE):
            return None
        return (
            ref(self.weights),
            self.adapter and ref(self.adapter),
            directions and (directions.distribution, directions.scope),
            (len(lanes), lanes.tangents, lanes.coefficients.any(), lanes.references.tobytes()),
            (batch.starts.tobytes(), batch.label_sequence.tobytes()),
            self.exact,
        )

    @property
    def _output(self) -> Any:
        tied = not self.weights.has("output")
        return self.weights.matrix("token_embd" if tied else "output")
