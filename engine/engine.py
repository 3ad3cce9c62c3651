"""The engine: a quantized model, its adapter, and losses of both under many perturbations."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Head, LoRAConfig
from fwdllm.engine.adapters.head import class_losses, head_gradient
from fwdllm.engine.adapters.io import load_adapter
from fwdllm.engine.backends import choose
from fwdllm.engine.data.batch import Batch, Tokens, pack, pack_many
from fwdllm.engine.data.encode import encode_decoder, encode_text
from fwdllm.engine.data.jsonl import Example, check_labels
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.devices import kernels_of
from fwdllm.engine.directions import Dense, Directions, DirectionsConfig, Scope, frozen_b
from fwdllm.engine.errors import (
    AdapterError,
    ConfigError,
    DataError,
    ModelError,
)
from fwdllm.engine.estimators import activation, derivatives
from fwdllm.engine.estimators.activation import Gradient
from fwdllm.engine.estimators.plan import DEFAULT_EPSILON, Probe
from fwdllm.engine.evaluation import EVAL_ROWS, Evaluation, evaluate
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.llamacpp.graph import LlamaGraph
from fwdllm.engine.memory.plan import MemoryPlan, keep_freed_memory, plan_gpu_step, plan_step
from fwdllm.engine.memory.residency import Residency, resident_bytes
from fwdllm.engine.models.forward import PLAIN, SquareSums, Variants
from fwdllm.engine.models.graph import Graph
from fwdllm.engine.models.weights import Weights
from fwdllm.kernels.types import Lanes


class Engine:
    """A model with an adapter. Make one with ``Engine.load``; the fields are read-only.

    file: the GGUF file.  backend: what computes with it, and what it is; architecture, args
    and encoder are its.  adapter: trainable parameters, or None.  labels: names of classes, () if
    there are none.  device: see ``devices.kernels_of``, and ops, its kernels.  memory_budget: bytes
    the process may have resident in a pass, mapped weights included, or None.
    """

    def __init__(
        self,
        file: GGUFFile,
        *,
        labels: Sequence[str] = (),
        exact: bool = False,
        memory_budget: int | None = None,
        device: str = "cpu",
        backend: str = "auto",
    ) -> None:
        if memory_budget is not None and device == "cuda":
            raise ConfigError("a memory budget is for device cpu: a GPU keeps all of the model")
        keep_freed_memory()
        self.file = file
        self.device = device
        self.ops = kernels_of(device)
        self.exact = exact
        self.memory_budget = memory_budget
        self.labels = tuple(labels)
        self.backend = choose(file, backend)
        self.architecture, self.encoder = self.backend.architecture, self.backend.encoder
        self.family = self.backend.family
        self.args: Any = self.backend.args
        if self.family is None:
            self._check_llama_cpp()
            self._llama = LlamaGraph(file, self.encoder, self.ops)
            self.tokenizer = Tokenizer(self._llama.model)
        else:
            self.weights = Weights(file, *self.family.shapes(self.args), self.ops)
            self.tokenizer = Tokenizer.open(file.path)
        if self.tokenizer.n_vocab > self.args.n_vocab:
            raise ModelError(f"{file.path}: the vocabulary has more tokens than the embedding")
        self.adapter: Adapter | None = None
        self._directions: Directions | None = None
        self._residency = Residency(file, self.args.n_layers)
        self._resident = resident_bytes()

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        lora: LoRAConfig | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        labels: Sequence[str] = (),
        seed: int = 0,
        exact: bool = False,
        memory_budget: int | None = None,
        device: str = "cpu",
        backend: str = "auto",
    ) -> Engine:
        """Open a GGUF model, with a new adapter of shape ``lora`` or the one in a file.

        labels: class names; an encoder gets a linear head for them.  seed: of a new adapter's
        A.  exact: fp32 arithmetic instead of int8 activations.  memory_budget: bytes the process
        may have resident in a pass, mapped weights included: layers that do not fit are dropped
        behind the pass and read again in the next.  device: "cpu", or "cuda" for a GPU.
        backend: "fwdllm", our own graph and kernels; "llama.cpp", its graph and kernels, for any
        architecture that it knows, with differences of losses only; or "auto", our own graph where
        there is one.
        Errors: ModelError, AdapterError, ConfigError.
        """
        engine = cls(
            GGUFFile.open(path),
            labels=labels,
            exact=exact,
            memory_budget=memory_budget,
            device=device,
            backend=backend,
        )
        if adapter is not None:
            engine._load_adapter(adapter)
        elif lora is not None:
            head = Head(engine.labels, engine.args.width) if engine._needs_head else None
            engine.adapter = Adapter.create(
                engine.architecture, engine.backend.linear, lora, seed, engine.ops, head
            )
        if engine.family is None and engine.adapter is not None:
            engine._llama.check_reach(engine.adapter)
        return engine

    @property
    def graph(self) -> Graph | LlamaGraph:
        """What computes the model's outputs, with the adapter as it is now."""
        if self.family is None:
            self._llama.adapter, self._llama.ops = self.adapter, self.ops
            return self._llama
        return Graph(
            self.args,
            self.family,
            self.weights,
            self.ops,
            self.adapter,
            self.exact,
            self._memory,
            None if self.device == "cuda" else self._residency,
        )

    @property
    def directions(self) -> Directions:
        """What seeds mean where nothing else is said; at first normal numbers for all of theta."""
        if self.adapter is None:
            raise ConfigError("directions need an adapter to perturb")
        if self._directions is None:
            self._directions = Dense(self.adapter)
        return self._directions

    @directions.setter
    def directions(self, directions: Directions) -> None:
        self._directions = directions

    def use_directions(
        self, config: DirectionsConfig, seed: int, examples: Sequence[Example]
    ) -> None:
        """Let seeds mean ``config`` from now on; see ``DirectionsConfig.make``.

        examples: what a mask is chosen by.
        """
        if self.adapter is None:
            raise ConfigError("directions need an adapter to perturb")
        self.directions = config.make(
            self.adapter,
            seed,
            lambda: self.input_mean_squares(self.encode(examples)),
            lambda target: self.ops.dequantize(
                self.ops.weight(self.file.weight(f"{target.name}.weight"))
            ),
        )

    def use_activations(self, scope: Scope | None = None) -> None:
        """Get ready for ``activation_gradient``: factors zero, and only A learns from now on.

        Errors: ConfigError if the adapter's rank is more than ``activation.max_rank``.
        """
        if self.adapter is None:
            raise ConfigError("activations are perturbed where an adapter reads them")
        self.backend.check_method("activation")
        activation.check_rank(self)
        self.adapter.theta[: self.adapter.n_lora] = 0
        self.directions = frozen_b(self.adapter, scope)

    def input_mean_squares(self, batch: Batch) -> dict[str, np.ndarray]:
        """Mean squares over a batch's rows of what adapted layers read: float64 [n_in] each."""
        tap = SquareSums()
        self.graph.watch(batch, tap)
        return {name: total / batch.n_rows for name, total in tap.sums.items()}

    def encode(self, examples: Sequence[Example], max_tokens: int | None = None) -> Batch:
        """Tokenize examples into one batch, one sequence each; DataError names a bad line."""
        if not examples:
            raise DataError("there are no examples")
        return pack([self.tokenize(example, max_tokens) for example in examples])

    def loss(self, batch: Batch) -> np.ndarray:
        """Mean negative log-likelihood of each example: float64 [n_examples], in nats."""
        if batch.classes is not None:
            return self._class_losses(self.graph.features(batch), batch.classes)[0]
        counts = np.bincount(batch.label_sequence, minlength=batch.n_sequences)
        return batch.sums_by_sequence(self.graph.token_losses(batch))[0] / counts

    def directional_derivatives(
        self,
        batch: Batch,
        seeds: np.ndarray,
        method: str = "forward-ad",
        epsilon: float = DEFAULT_EPSILON,
        directions: Directions | None = None,
        per_example: bool = False,
    ) -> Probe:
        """Loss of the batch and its slope along v(seed) of the adapter for every seed.

        seeds: uint64 [n_seeds].  method, epsilon: see ``estimators.plan``.  directions: what
        v(seed) is, by default ``self.directions``.  per_example: every example has a direction of
        its own, see ``Probe`` and ``estimators.example_seeds``.
        A slope is NaN or infinite where a perturbed loss is; NumericsError if the loss itself is.
        """
        self.backend.check_method(method)
        directions = directions or self.directions
        return derivatives.of_batch(self, batch, seeds, method, epsilon, directions, per_example)

    def group_derivatives(
        self,
        batch: Batch,
        sizes: Sequence[int],
        seeds: np.ndarray,
        method: str = "forward-ad",
        epsilon: float = DEFAULT_EPSILON,
        directions: Directions | None = None,
    ) -> list[Probe]:
        """``directional_derivatives`` of groups of examples, each along its own, in shared passes.

        sizes: examples of each group, which follow each other in the batch.  seeds: uint64
        [n_groups, n_seeds].  A group's numbers have the same bits in any company; those that are
        not finite, its loss included, are left for the caller to find.
        """
        self.backend.check_method(method)
        directions = directions or self.directions
        return derivatives.of_groups(self, batch, sizes, seeds, method, epsilon, directions)

    def head_step(self, batch: Batch) -> Gradient:
        """The gradient by the head alone, from one forward pass."""
        return activation.head_alone(self, batch)

    def activation_gradient(self, batch: Batch, seed: int, n_tangents: int) -> Gradient:
        """The gradient by A from perturbed bottlenecks; see ``estimators.activation.gradient``."""
        return activation.gradient(self, batch, seed, n_tangents)

    def output_sensitivity(self, batch: Batch, seed: int, n_tangents: int) -> Gradient:
        """What layers' outputs do to the loss; see ``estimators.activation.sensitivity``."""
        return activation.sensitivity(self, batch, seed, n_tangents)

    def lane_losses(
        self, batch: Batch, variants: Variants = PLAIN
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """NLL of every label in every lane, slopes in tangents: float64 [n_lanes, n_labels].

        And what a head reads, see ``Graph.features``, or None without classes.
        """
        if batch.classes is None:
            return self.graph.token_losses(batch, variants), None
        features = self.graph.features(batch, variants)
        return self._class_losses(features, batch.classes, variants.lanes), features

    def head_gradient(self, batch: Batch, features: np.ndarray | None) -> np.ndarray | None:
        """Gradient by the head's parameters from features of ``lane_losses``: float32 [n_head]."""
        if features is None or batch.classes is None or self.adapter is None:
            return None
        return head_gradient(self.adapter, features[: batch.n_sequences], batch.classes)

    def evaluate(self, examples: Sequence[Example], max_tokens: int | None = None) -> Evaluation:
        """Loss and accuracy over examples; see ``Evaluation``. Errors: DataError, NumericsError."""
        return evaluate(self, examples, max_tokens)

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits after each token of one sequence: float32 [n_tokens, n_vocab]."""
        return self.graph.logits(ids)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Unit-length embeddings of texts by an encoder: float32 [n, width]."""
        tokens = [self.tokenize(Example(text=text), None) for text in texts]
        batches = pack_many(tokens, EVAL_ROWS)
        features = np.concatenate([self.graph.features(batch) for batch in batches])
        return features / np.linalg.norm(features, axis=1, keepdims=True)

    @property
    def _needs_head(self) -> bool:
        if not self.encoder:
            return False
        if len(self.labels) < 2:
            raise ConfigError(
                f"{self.architecture} is an encoder; tune it on examples with two or more labels"
            )
        return True

    def _load_adapter(self, path: str | os.PathLike[str]) -> None:
        args = self.args
        self.adapter = load_adapter(
            Path(path),
            self.architecture,
            self.backend.linear,
            args.n_heads,
            getattr(args, "n_kv_heads", args.n_heads),
            self.ops,
        )
        head = self.adapter.head
        if head is not None:
            if not self.encoder or head.n_in != args.width:
                raise AdapterError(f"{path} has a classification head for another model")
            self.labels = head.labels

    def tokenize(self, example: Example, max_tokens: int | None) -> Tokens:
        """One example as ``encode`` packs it. Errors: DataError."""
        context = self.args.context
        if not self.encoder:
            return encode_decoder(self.tokenizer, example, context, max_tokens)
        ids = encode_text(self.tokenizer, example, context, max_tokens)
        if example.label is None:
            return Tokens(ids, [False] * len(ids))
        check_labels([example], self.labels)
        return Tokens(ids, [False] * len(ids), self.labels.index(example.label))

    def max_lanes(self, batch: Batch, n_lanes: int) -> int:
        """How many of n_lanes go through the model at once within the memory budget."""
        if self.family is None:
            return n_lanes  # it takes them in several calls by itself
        return self._memory(batch, n_lanes).lanes

    def _memory(self, batch: Batch, n_lanes: int) -> MemoryPlan:
        if self.device == "cuda":
            return plan_gpu_step(self.args, self.ops.free_bytes(), batch.n_rows, n_lanes)
        return plan_step(
            self.args,
            self.memory_budget,
            resident=self._resident,
            largest_layer=self._residency.largest,
            n_trainable=self.adapter.theta.size if self.adapter else 0,
            n_rows=batch.n_rows,
            n_lanes=n_lanes,
            longest=int(np.diff(batch.starts).max()),
            n_labels=len(batch.label_ids),
            int8=not self.exact,
            encoder=self.encoder,
        )

    def _check_llama_cpp(self) -> None:
        """ConfigError for what only our own graphs can do."""
        options = {
            f"device {self.device}": self.device != "cpu",
            "exact arithmetic": self.exact,
            "a memory budget": self.memory_budget is not None,
        }
        for option, given in options.items():
            if given:
                why = f" ({self.backend.reason})" if self.backend.reason else ""
                raise ConfigError(f"{option} is not for models that llama.cpp computes{why}")

    def _class_losses(
        self, features: np.ndarray, classes: np.ndarray, lanes: Lanes = PLAIN.lanes
    ) -> np.ndarray:
        """NLL of every class in every lane, slopes in tangents: float64 [n_lanes, n_sequences]."""
        if self.adapter is None or self.adapter.head is None:
            raise ConfigError("classifying with an encoder needs an adapter with a head")
        return class_losses(self.adapter, features, classes, len(lanes), lanes.n_tangents)
