"""This engine as a side of a measurement; see ``bench.worker``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fwdllm.bench.inputs import UPDATE_RATE, half_trained, prompt_batch, step_batch
from fwdllm.bench.stopwatch import Stopwatch
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.directions import Dense
from fwdllm.engine.estimators.plan import n_lanes
from fwdllm.engine.settings import Scope
from fwdllm.kernels import cpu


class Prompt:
    """One prompt under ``lanes`` variants of a new adapter of rank 8 on q and v.

    With one lane there is no adapter.  plain: run ``lanes`` copies of the prompt through the model
    without an adapter instead.
    """

    def __init__(
        self, model: str, ids: Sequence[int], lanes: int, backend: str, plain: bool = False
    ) -> None:
        lora = None if plain or lanes == 1 else LoRAConfig()
        self.engine = Engine.load(model, lora, backend=backend)
        self.batch = prompt_batch(ids, lanes if plain else 1)
        self.seeds = np.arange(lanes // 2, dtype=np.uint64)
        self.plain = self.engine.adapter is None
        self.run()
        loss = float(self.engine.loss(prompt_batch(ids, 1)).mean())
        self.facts = {**machine(), "loss": loss}

    def run(self) -> None:
        if self.plain:
            self.engine.loss(self.batch)
        else:
            self.engine.directional_derivatives(self.batch, self.seeds, "central")


class Step:
    """Directional derivatives of a batch along ``perturbations`` seeds, and an update.

    lora: rank and targets.  scope: layers to perturb; None: all.  memory_budget: in bytes.
    backend: see ``Engine.load``.
    """

    def __init__(
        self,
        model: str,
        ids: Sequence[Sequence[int]],
        lora: Mapping[str, Any],
        perturbations: int,
        method: str,
        scope: Sequence[int] | None,
        memory_budget: int | None,
        backend: str,
    ) -> None:
        adapted = Engine.load(
            model, LoRAConfig(**lora), memory_budget=memory_budget, backend=backend
        )
        self.engine = half_trained(adapted)
        self.batch = step_batch(ids, 1)
        self.seeds = np.arange(perturbations, dtype=np.uint64)
        self.method = method
        assert self.engine.adapter is not None
        layers = None if scope is None else tuple(scope)
        self.directions = Dense(self.engine.adapter, scope=Scope(layers))
        self.facts = {**machine(), "loss": float(self.engine.loss(self.batch).mean())}
        self.run()

    def run(self) -> dict[str, list[float]]:
        assert self.engine.adapter is not None
        probe = self.engine.directional_derivatives(
            self.batch, self.seeds, self.method, directions=self.directions
        )
        steps = -UPDATE_RATE / len(self.seeds) * probe.derivative
        self.engine.adapter.add(self.seeds, steps, self.directions)
        return {"derivatives": probe.derivative.tolist()}

    def breakdown(self) -> dict[str, float]:
        """Run one further step; its seconds by operation, largest first."""
        watch = Stopwatch(cpu)
        watch.name_tensors(self.engine.file)
        assert self.engine.adapter is not None
        # Changes this engine, because a second one would not fit into the same memory budget.
        graph: Any = self.engine.graph
        graph.ops = watch.kernels
        self.engine.adapter = replace(self.engine.adapter, ops=watch.kernels)
        self.directions = replace(self.directions, adapter=self.engine.adapter)
        start = time.perf_counter()
        self.run()
        watch.seconds["other"] = time.perf_counter() - start - watch.spent
        return dict(sorted(watch.seconds.items(), key=lambda item: -item[1]))


class PlainStep:
    """The same number of rows without an adapter: the examples, repeated once for every lane."""

    def __init__(
        self,
        model: str,
        ids: Sequence[Sequence[int]],
        lora: Mapping[str, Any],
        perturbations: int,
        method: str,
        scope: Sequence[int] | None,
        memory_budget: int | None,
        backend: str,
    ) -> None:
        self.engine = Engine.load(model, memory_budget=memory_budget, backend=backend)
        self.batch = step_batch(ids, n_lanes(method, perturbations))
        self.facts = {"loss": float(self.engine.loss(self.batch).mean())}

    def run(self) -> None:
        self.engine.loss(self.batch)


def machine() -> dict[str, Any]:
    """The instruction set and number of threads, on which figures depend."""
    return {"isa": cpu.isa, "threads": cpu.num_threads()}
