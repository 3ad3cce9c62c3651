"""An engine for the adapters of a store: evaluates perturbations of an adapter and updates it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.backends import choose
from fwdllm.engine.classification import Classification
from fwdllm.engine.data.jsonl import Example, check_labels, parse_jsonl
from fwdllm.engine.directions import Dense
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.memory.system import resident_bytes
from fwdllm.engine.settings import DEFAULT_EPSILON, LoRAConfig, Scope
from fwdllm.http import limits
from fwdllm.http.adapter_bytes import as_file, to_bytes
from fwdllm.http.api_error import ApiError
from fwdllm.http.queue import Queue
from fwdllm.http.schemas import FirstFault, Strict, Suffix, at_most
from fwdllm.http.store import AdapterRow, Store

_MAX_SEEDS = 4096
Seeds = Annotated[
    list[Annotated[int, Field(ge=0, lt=2**64)]],
    Field(min_length=1, max_length=_MAX_SEEDS),
    at_most(_MAX_SEEDS),
]
Method = Literal["forward-ad", "central", "forward-difference", "backprop", "readout"]  # METHODS
Number = Annotated[float, Field(allow_inf_nan=False, ge=-3e38, le=3e38)]
Name = Annotated[str, Field(min_length=1, max_length=64)]
Layers = Annotated[list[int], Field(min_length=1, max_length=512), at_most(512)]
Targets = Annotated[list[Name], Field(min_length=1, max_length=16), at_most(16)]
Labels = Annotated[list[Name], Field(max_length=1000), at_most(1000)]


class AdapterRequest(Strict):
    """A new adapter; it does not change the outputs yet. labels: classes of an encoder's head."""

    rank: Annotated[int, Field(ge=1, le=limits.MAX_RANK)] = 8
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 16.0
    targets: Targets = Field(default=["attn_q", "attn_v"])
    layers: Layers | None = None
    labels: Labels = Field(default=[])
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    suffix: Suffix = ""


class ScopeRequest(Strict):
    """The part of an adapter that seeds perturb. None: all layers, all targets."""

    layers: Layers | None = None
    targets: Targets | None = None

    def scope(self) -> Scope:
        """As the engine's ``Scope``."""
        layers = None if self.layers is None else tuple(self.layers)
        return Scope(layers, None if self.targets is None else tuple(self.targets))


class EvaluateRequest(Strict):
    """A request for directional derivatives.

    examples: objects like the lines of a data file.  seeds, scope, distribution: of the directions.
    per_example: every example has directions of its own.  method: None: forward-ad, or central with
    llama.cpp.
    """

    adapter: str
    examples: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=256), at_most(256)]
    seeds: Seeds
    scope: ScopeRequest = ScopeRequest()
    distribution: Literal["normal", "rademacher"] = "normal"
    method: Method | None = None
    epsilon: Annotated[float, Field(gt=0, le=1)] = DEFAULT_EPSILON
    per_example: bool = False
    max_tokens: Annotated[int, Field(ge=2, le=2**20)] | None = None


class UpdateRequest(Strict):
    """A request for theta += sum of coefficient * v(seed).

    head: added to the parameters of a classification head.  version: the adapter's expected
    version; with it, a request that is sent twice is applied only once.
    """

    seeds: Seeds
    coefficients: Annotated[
        list[Number], Field(min_length=1, max_length=_MAX_SEEDS), at_most(_MAX_SEEDS)
    ]
    scope: ScopeRequest = ScopeRequest()
    distribution: Literal["normal", "rademacher"] = "normal"
    head: Annotated[list[Number], Field(max_length=10_000_000), FirstFault()] | None = None
    version: Annotated[int, Field(ge=0, lt=2**62)] | None = None


class AdapterEngine:
    """An engine with one adapter of a store at a time. Threads may share it; they take turns.

    classifying: held by the one request to classify that has a thread.
    memory_budget: bytes for its work; not used if llama.cpp runs the model.
    Errors: those of ``Engine.load``; ApiError 429.
    """

    def __init__(self, model: Path, store: Store, memory_budget: int) -> None:
        self._model, self._store = model, store
        # The budget is on top of what is resident already, such as llama.cpp's copy of the weights.
        own = choose(GGUFFile.open(model)).own
        self._memory_budget = resident_bytes() + memory_budget if own else None
        self.classifying = asyncio.Lock()
        self._lock = threading.Lock()
        self._queue = Queue(limits.MAX_WAITING_FOR_ENGINE)
        self._engine: Engine | None = None
        self._holds: tuple[int, int] | None = None

    def create(self, name: str, config: LoRAConfig, labels: Sequence[str], seed: int) -> Any:
        """A new adapter in the store."""
        with self._turn():
            engine = self._load(lora=config, labels=labels, seed=seed)
            assert engine.adapter is not None
            content = to_bytes(engine.adapter)
            return self._store.add_adapter(name, content, engine.adapter.theta.size)

    def evaluate(self, id: str, body: EvaluateRequest) -> dict[str, Any]:
        """Losses and directional derivatives at an adapter."""
        with self._turn():
            engine = self._at(id)
            assert engine.adapter is not None
            examples = parse_jsonl((json.dumps(e).encode() for e in body.examples), "examples")
            if engine.encoder:
                check_labels(examples, engine.labels)
            batch = engine.encode(examples, body.max_tokens)
            probe = engine.directional_derivatives(
                batch,
                np.array(body.seeds, np.uint64),
                body.method or engine.backend.method,
                body.epsilon,
                directions=Dense(engine.adapter, body.distribution, body.scope.scope()),
                per_example=body.per_example,
            )
            losses = engine.loss(batch)
        gradient = probe.head_gradient
        return {
            "object": "perturbations",
            "adapter": id,
            "loss": probe.loss,
            "losses": _numbers(losses),
            "seeds": probe.seeds.tolist(),
            "derivatives": _numbers(probe.derivative),
            "head_gradient": None if gradient is None else _numbers(gradient),
            "n_tokens": probe.n_tokens,
        }

    def classify(
        self,
        adapter: AdapterRow | None,
        examples: Sequence[Example],
        labels: Sequence[str],
        *,
        truncate: bool,
        cancelled: threading.Event,
    ) -> list[Classification]:
        """The labels of texts by an adapter, or by the model alone; see ``Engine.classify``.

        truncate: cut texts to the model's context.  cancelled: once it is set, nobody wants them.
        """
        with self._lock:
            engine = self._bare() if adapter is None else self._at(adapter.id)
            wanted = takewhile(lambda _: not cancelled.is_set(), examples)
            return list(engine.classify(wanted, labels, engine.args.context if truncate else None))

    def update(self, id: str, body: UpdateRequest) -> AdapterRow:
        """Move an adapter along directions."""
        if len(body.seeds) != len(body.coefficients):
            raise ApiError(400, "there must be a coefficient for every seed", "coefficients")
        with self._turn():
            before = find_adapter(self._store, id)
            if body.version not in (None, before.version):
                text = f"the adapter is at version {before.version}, not {body.version}"
                raise ApiError(409, text, "version", "version_conflict")
            engine = self._at(id)
            self._holds = None  # until the adapter in memory is in the store
            assert engine.adapter is not None
            _move(engine.adapter, body)
            after = self._store.update_adapter(before, to_bytes(engine.adapter))
            if after is None:
                raise ApiError(409, "the adapter has changed meanwhile", code="version_conflict")
            self._holds = (after.number, after.version)
            return after

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        with self._queue.place(), self._lock:
            yield

    def _at(self, id: str) -> Engine:
        adapter = find_adapter(self._store, id)
        key = (adapter.number, adapter.version)
        if self._holds != key or self._engine is None:
            with as_file(self._store.adapter_content(adapter.number)) as path:
                self._engine = self._load(adapter=path)
            self._holds = key
        return self._engine

    def _bare(self) -> Engine:
        if self._engine is None or self._engine.adapter is not None:
            self._engine, self._holds = self._load(), None
        return self._engine

    def _load(self, **options: Any) -> Engine:
        return Engine.load(self._model, memory_budget=self._memory_budget, **options)


def find_adapter(store: Store, id: str) -> AdapterRow:
    """The adapter with this id. Errors: ApiError 404."""
    found = store.adapter(id)
    if found is None:
        raise ApiError(404, f"there is no adapter {id!r}", "adapter", "adapter_not_found")
    return found


def _move(adapter: Adapter, body: UpdateRequest) -> None:
    seeds = np.array(body.seeds, np.uint64)
    directions = Dense(adapter, body.distribution, body.scope.scope())
    step = directions.combine(seeds, np.array(body.coefficients, np.float32))
    head = np.array(body.head or [], np.float32)
    if body.head is not None and head.size != adapter.n_head:
        raise ConfigError(f"head has {head.size} numbers, but the adapter's {adapter.n_head}")
    with np.errstate(over="ignore"):  # non-finite values are not saved
        adapter.theta[: adapter.n_lora] += step
        adapter.theta[adapter.n_lora :] += head if body.head is not None else 0


def _numbers(values: np.ndarray) -> Any:
    """As JSON values; numbers that are not finite become null."""
    if values.ndim > 1:
        return [_numbers(row) for row in values]
    return [x if math.isfinite(x) else None for x in values.tolist()]
