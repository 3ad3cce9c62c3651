"""The engine: a quantized model with an adapter, and its losses under many perturbations."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.adapters.io import load_adapter
from fwdllm.engine.backends import choose
from fwdllm.engine.classification import Classification, classify
from fwdllm.engine.data.batch import Batch, Tokens, pack, pack_many
from fwdllm.engine.data.encode import Encoding
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.devices import kernels_of
from fwdllm.engine.directions import Dense, Directions, frozen_b, make_directions
from fwdllm.engine.errors import (
    AdapterError,
    ConfigError,
    DataError,
    FwdllmWarning,
    ModelError,
)
from fwdllm.engine.estimators import activation, derivatives, exact, readout
from fwdllm.engine.estimators.activation import Gradient
from fwdllm.engine.estimators.lanes import lane_losses
from fwdllm.engine.estimators.plan import Probe
from fwdllm.engine.evaluation import EVAL_ROWS, Evaluation, evaluate
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.graph import Graph, SquareSums
from fwdllm.engine.llamacpp.graph import LlamaGraph
from fwdllm.engine.memory.plan import keep_freed_memory
from fwdllm.engine.memory.residency import Residency
from fwdllm.engine.models import family_of
from fwdllm.engine.models.graph import OwnGraph
from fwdllm.engine.models.weights import Weights
from fwdllm.engine.settings import DEFAULT_EPSILON, DirectionsConfig, LoRAConfig, Scope


class Engine:
    """A model with an adapter. Make one with ``Engine.load``; the fields are read-only.

    file: the GGUF file.  backend: see ``backends.Backend``; architecture, args and encoder are
    taken from it.  adapter: trainable parameters, or None.  labels: names of classes, () if there
    are none.  device: see ``devices.kernels_of``.  ops: the device's kernels.  memory_budget: bytes
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
        self.backend = choose(file, backend)
        if self.backend.reason:
            warnings.warn(
                f"{file.path} is computed by llama.cpp, slower and by fewer methods: "
                f"{self.backend.reason}",
                FwdllmWarning,
                stacklevel=2,
            )
        self.architecture, self.encoder = self.backend.architecture, self.backend.encoder
        self.args = self.backend.args
        self.graph: Graph
        if self.backend.own:
            self.tokenizer = Tokenizer.open(file.path)
            self.graph = self._own_graph()
        else:
            self._check_llama_cpp()
            self.graph = LlamaGraph(file, self.encoder, self.ops)
            self.tokenizer = Tokenizer(self.graph.model)
        if self.tokenizer.n_vocab != self.args.n_vocab:
            raise ModelError(
                f"{file.path}: the vocabulary has {self.tokenizer.n_vocab} tokens, but the "
                f"embedding {self.args.n_vocab} rows, which llama.cpp does not run: convert the "
                "model again with a current llama.cpp"
            )
        self.encoding = Encoding(self.tokenizer, self.args.context, self.encoder, tuple(labels))
        self._directions: Directions | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        lora: LoRAConfig | None = None,
        *,
        adapter: str | os.PathLike[str] | None = None,
        labels: Sequence[str] = (),
        literal: bool = False,
        seed: int = 0,
        exact: bool = False,
        memory_budget: int | None = None,
        device: str = "cpu",
        backend: str = "auto",
    ) -> Engine:
        """Open a GGUF model, with a new adapter of shape ``lora`` or the one in a file.

        labels: class names; an encoder gets a linear head for them.  literal: whether names of
        special tokens in raw text are text, see ``Encoding``.  seed: of a new adapter's A.
        exact: fp32 arithmetic instead of int8 activations.  memory_budget: bytes the process
        may have resident in a pass, mapped weights included: layers that do not fit are dropped
        after use and read again in the next pass.  device: "cpu", or "cuda" for a GPU.
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
        engine.encoding.literal = literal
        if adapter is not None:
            engine._load_adapter(adapter)
        elif lora is not None:
            head = Head(engine.labels, engine.args.width) if engine._needs_head else None
            engine.adapter = Adapter.create(
                engine.architecture, engine.backend.linear, lora, seed, engine.ops, head
            )
        if engine.adapter is not None and isinstance(engine.graph, LlamaGraph):
            engine.graph.check_reach(engine.adapter)
        return engine

    @property
    def adapter(self) -> Adapter | None:
        """Trainable parameters, or None."""
        return self.graph.adapter

    @adapter.setter
    def adapter(self, adapter: Adapter | None) -> None:
        self.graph.adapter = adapter

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of classes, () if there are none."""
        return self.encoding.labels

    @property
    def directions(self) -> Directions:
        """The directions that seeds name by default; at first ``Dense``, all of theta."""
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
        """Use the directions of ``config`` by default from now on; see ``make_directions``.

        examples: data by which "sparse" chooses its mask.
        """
        if self.adapter is None:
            raise ConfigError("directions need an adapter to perturb")
        self.directions = make_directions(
            config,
            self.adapter,
            seed,
            lambda: self.input_mean_squares(self.encode(examples)),
            lambda target: self.ops.dequantize(
                self.ops.weight(self.file.weight(f"{target.name}.weight"))
            ),
        )

    def use_activations(self, scope: Scope | None = None) -> None:
        """Prepare for ``activation_gradient``: set A and B to zero, and train only A from now on.

        Errors: ConfigError if the adapter's rank is more than ``activation.check_rank`` allows.
        """
        if self.adapter is None:
            raise ConfigError("activations are perturbed where an adapter reads them")
        self.backend.check_method("activation")
        activation.check_rank(self.adapter)
        self.adapter.theta[: self.adapter.n_lora] = 0
        self.directions = frozen_b(self.adapter, scope)

    def check_method(self, method: str) -> None:
        """ConfigError for a method that the model's graph or its adapter is not for."""
        self.backend.check_method(method)
        if method == "readout" and self.adapter is not None:
            readout.check(self.adapter, self.args.n_layers)

    def input_mean_squares(self, batch: Batch) -> dict[str, np.ndarray]:
        """Mean squares, over a batch's rows, of adapted layers' inputs: float64 [n_in] by name."""
        tap = SquareSums()
        self.graph.watch(batch, tap)
        return {name: total / batch.n_rows for name, total in tap.sums.items()}

    def encode(self, examples: Sequence[Example], max_tokens: int | None = None) -> Batch:
        """Tokenize examples into one batch, one sequence each; DataError names a bad line.

        Of conversations that are several, see ``separate``.
        """
        if not examples:
            raise DataError("there are no examples")
        return pack([self.tokenize(example, max_tokens) for example in examples])

    def separate(self, examples: Sequence[Example]) -> list[Example]:
        """Examples of one sequence each, of some that may have more; see ``data.turns``."""
        return self.encoding.separate(examples)

    def loss(self, batch: Batch) -> np.ndarray:
        """Mean negative log-likelihood of each example: float64 [n_examples], in nats."""
        losses, _ = lane_losses(self.graph, batch)
        if batch.classes is not None:
            return losses[0]
        counts = np.bincount(batch.label_sequence, minlength=batch.n_sequences)
        return batch.sums_by_sequence(losses)[0] / counts

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
        its own, see ``Probe`` and ``estimators.plan.example_seeds``.
        A slope is NaN or infinite where a perturbed loss is; NumericsError if the loss itself is.
        """
        self.check_method(method)
        directions = directions or self.directions
        return derivatives.of_batch(
            self.graph, batch, seeds, method, epsilon, directions, per_example
        )

    def group_derivatives(
        self,
        batch: Batch,
        sizes: Sequence[int],
        seeds: np.ndarray,
        method: str = "forward-ad",
        epsilon: float = DEFAULT_EPSILON,
        directions: Directions | None = None,
    ) -> list[Probe]:
        """``directional_derivatives`` of groups with seeds of their own, in shared passes.

        sizes: number of examples in each group; groups follow each other in the batch.  seeds:
        uint64 [n_groups, n_seeds].  The bits of a group's results do not depend on the other
        groups. Results that are not finite, the loss included, are returned: the caller must check.
        """
        self.check_method(method)
        directions = directions or self.directions
        return derivatives.of_groups(self.graph, batch, sizes, seeds, method, epsilon, directions)

    def gradient(self, batch: Batch, method: str = "backprop") -> Gradient:
        """The exact gradient by the adapter, and by a head; see ``estimators.exact``.

        Errors: ConfigError without an adapter, or for "readout" of one that it is not for.
        """
        if self.adapter is None:
            raise ConfigError("a gradient needs an adapter to be of")
        self.check_method(method)
        return exact.gradient(self.graph, batch, method)

    def head_step(self, batch: Batch) -> Gradient:
        """The gradient with respect to the head only, from one forward pass."""
        return activation.head_alone(self.graph, batch)

    def activation_gradient(self, batch: Batch, seed: int, n_tangents: int) -> Gradient:
        """An estimate of the gradient with respect to A; see ``estimators.activation.gradient``."""
        return activation.gradient(self.graph, batch, seed, n_tangents, self.directions.targets)

    def output_sensitivity(self, batch: Batch, seed: int, n_tangents: int) -> Gradient:
        """How layers' outputs change the loss; see ``estimators.activation.sensitivity``."""
        return activation.sensitivity(self.graph, batch, seed, n_tangents, self.directions.targets)

    def evaluate(self, examples: Sequence[Example], max_tokens: int | None = None) -> Evaluation:
        """Loss and accuracy over examples; see ``Evaluation``. Errors: DataError, NumericsError."""
        return evaluate(self.graph, self.encoding, examples, max_tokens)

    def classify(
        self, examples: Iterable[Example], labels: Sequence[str] = (), max_tokens: int | None = None
    ) -> Iterator[Classification]:
        """The labels of texts with their probabilities, those that ``evaluate`` counts, in order.

        examples: with a text each; some at a time are taken and computed together, so that they may
        be without end.  labels: what a decoder chooses from; an encoder's adapter has its own.
        max_tokens: as of ``evaluate``. Errors: ConfigError at once; DataError, after the results of
        the texts before, and NumericsError while it goes.
        """
        return classify(self.graph, self.encoding, examples, labels, max_tokens)

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
            args.n_kv_heads,
            self.ops,
        )
        head = self.adapter.head
        if head is not None:
            if not self.encoder or head.n_in != args.width:
                raise AdapterError(f"{path} has a classification head for another model")
            self.encoding.labels = head.labels

    def tokenize(self, example: Example, max_tokens: int | None) -> Tokens:
        """The tokens of one example, as ``encode`` uses them. Errors: DataError."""
        return self.encoding.example(example, max_tokens)

    def _own_graph(self) -> OwnGraph:
        _, family = family_of(self.file)
        weights = Weights(self.file, *family.shapes(self.args), self.ops)
        return OwnGraph(
            self.args,
            family,
            weights,
            self.ops,
            exact=self.exact,
            residency=None if self.device == "cuda" else Residency(self.file, self.args.n_layers),
            memory_budget=self.memory_budget,
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
