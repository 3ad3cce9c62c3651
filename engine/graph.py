"""A model's own graph: forward passes of a batch through quantized weights, all lanes together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from fwdllm.engine.adapter import Adapter
from fwdllm.engine.batch import Batch, Tokens, pack, split
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.forward import PLAIN, Pass, Variants
from fwdllm.engine.models import Family, bert
from fwdllm.engine.weights import Weights

if TYPE_CHECKING:
    from fwdllm.engine.memory import MemoryPlan
    from fwdllm.engine.residency import Residency


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

        A layer is applied to all passes before the next one, so weights are visited once. Arrays
        are the backend's.
        """
        n_lanes = len(variants.lanes)
        memory = self.plan(batch, n_lanes)
        if self.residency:
            self.residency.limit(memory.weights)
        theta = None if self.adapter is None else self.ops.array(self.adapter.theta)
        passes = []
        for part in split(batch, memory.block_rows // n_lanes):
            p = Pass(
                self.ops,
                self.weights,
                part,
                self.adapter,
                replace(variants, lanes=part.lanes(variants.lanes)),
                self.exact,
                memory.block_rows,
                theta,
            )
            passes.append(p)
        xs = [self.family.embed(self.args, p) for p in passes]
        for layer in range(self.args.n_layers):
            if self.residency:
                self.residency.enter(layer)
            for i, p in enumerate(passes):
                xs[i] = self.family.layer(self.args, p, layer, p.enter(layer, xs[i]))
            if self.residency:
                self.residency.leave(layer)
        return list(zip(passes, xs, strict=True))

    def token_losses(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """NLL of label tokens in every lane, slopes in tangents: float64 [n_lanes, n_labels]."""
        if self.family.encoder:
            raise ConfigError("an encoder predicts no tokens; it learns from texts with labels")
        found = []
        for p, x in self.run(batch, variants):
            n_lanes = len(p.lanes)
            rows = (np.arange(n_lanes)[:, None] * p.batch.n_rows + p.batch.label_rows).ravel()
            x = p.rms_norm(self.ops.take(x, rows), "output_norm", self.args.norm_eps)
            labels = np.tile(p.batch.label_ids, n_lanes)
            nll = self.ops.cross_entropy(x, self._output, labels, lanes=p.lanes, exact=self.exact)
            found.append(self.ops.host(nll).reshape(n_lanes, -1))
        if self.residency:
            self.residency.leave(self.args.n_layers)
        return np.concatenate(found, axis=1)

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

    @property
    def _output(self) -> Any:
        tied = not self.weights.has("output")
        return self.weights.matrix("token_embd" if tied else "output")
