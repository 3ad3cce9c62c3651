"""Model outputs computed by llama.cpp, for every architecture that it knows.

The model, its kernels and its graphs are llama.cpp's. After each matmul with the weight of an
adapted layer, ``llamacpp.context`` interrupts the graph, and a kernel that our own graphs use, too,
adds the adapter's term of each lane to the result. No adapter file is needed, and no direction is
stored.

Lanes are sequences of one call. llama.cpp would quantize the activations of each lane separately,
and that noise is larger than the small differences between lanes. So the lanes of a seed go through
its matmuls as differences to one of them (``engine.llamacpp.products``). There are no tangents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import temporary_folder
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.graph import PLAIN, Tap, Variants
from fwdllm.engine.llamacpp.context import Call, Context, NodeTap, ProductTap
from fwdllm.engine.llamacpp.ggml import layout
from fwdllm.engine.llamacpp.losses import negative_log_likelihood
from fwdllm.engine.llamacpp.native import llama_cpp, open_model
from fwdllm.engine.llamacpp.readout import Readout
from fwdllm.engine.llamacpp.readout import agrees as slope_agrees
from fwdllm.kernels.api import BackwardKernels, HostKernels
from fwdllm.kernels.types import Lanes, LoRA

# Rows of a call: llama.cpp's own n_ubatch. More make no matmul faster.
_ROWS = 512
# Tokens whose keys and values are kept: 0.5 GB in a 7B model without grouped queries.
_CELLS = 1024
# The most lanes that must be in the same call: those of +v and -v.
_GROUP = 2
# Cells of a sequence are a multiple of this (llama_context in src/llama-context.cpp).
_CELL_BLOCK = 256
# Bytes of a call's logits, which llama.cpp has twice: in its graph and for us.
_LOGITS_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Part:
    """The part of a batch that one call evaluates.

    lanes: their numbers.  references: for each, the number of the lane that it is rounded relative
    to.  examples: numbers of the sequences.  rows: of the batch, the same in every lane; equally
    many of each example.
    """

    lanes: np.ndarray
    references: np.ndarray
    examples: np.ndarray
    rows: np.ndarray


class LlamaGraph:
    """Implements ``engine.graph.Graph`` with a llama.cpp model.

    encoder: whether the model yields features, not next tokens.  ops: the kernels that compute the
    adapter's terms.  adapter: may be replaced at any time.

    The sequences of one call have equal lengths, and cells of the KV cache of their own, so that
    the bits of a seed's lanes do not depend on other lanes.
    """

    def __init__(self, file: GGUFFile, encoder: bool, ops: BackwardKernels) -> None:
        assert isinstance(ops, HostKernels)  # Engine has refused other devices than the CPU
        layout()  # fails before a model is read if this llama.cpp is not supported
        self.model = open_model(file.path, vocab_only=False, cpu_only=True)
        self.pooling = self.model.pooling if encoder else None
        self.ops, self._vjps = ops, ops
        self.adapter: Adapter | None = None
        self._file, self._checked = file, False
        n_vocab = llama_cpp.llama_vocab_n_tokens(self.model.vocab)
        self._rows = max(1, min(_ROWS, _LOGITS_BYTES // (4 * n_vocab)))
        self._context: Context | None = None
        self._longest = self._n_sequences = 0

    def token_losses(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """NLL of label tokens in every lane: float64 [n_lanes, n_labels]."""
        if self.pooling is not None:
            raise ConfigError("an encoder predicts no tokens; it learns from texts with labels")
        return self._losses(batch, variants)

    def _losses(
        self, batch: Batch, variants: Variants, thetas: Sequence[np.ndarray] = ()
    ) -> np.ndarray:
        """The same of a decoder. thetas: see ``_run``."""
        label_of = _labels_of_rows(batch)
        found = np.empty((len(variants.lanes), len(batch.label_rows)))
        for part, context in self._run(batch, variants, label_of >= 0, thetas):
            labels = label_of[part.rows]
            labels = labels[labels >= 0]
            if not labels.size:
                continue
            n_lanes = len(part.lanes)
            logits = context.logits(n_lanes * len(labels))
            nll = negative_log_likelihood(logits, np.tile(batch.label_ids[labels], n_lanes))
            found[np.ix_(part.lanes, labels)] = nll.reshape(n_lanes, -1)
        return found

    def features(self, batch: Batch, variants: Variants = PLAIN) -> np.ndarray:
        """Pooled features of every sequence in every lane: float32 [lanes * sequences, width]."""
        if self.pooling is None:
            raise ConfigError("a decoder has no pooled features; llama.cpp embeds with it")
        width = llama_cpp.llama_model_n_embd_out(self.model.handle)
        found = np.empty((len(variants.lanes), batch.n_sequences, width), np.float32)
        for part, context in self._run(batch, variants, np.ones(batch.n_rows, bool)):
            n_lanes, n = len(part.lanes), len(part.examples)
            features = context.features(n_lanes * n).reshape(n_lanes, n, width)
            found[np.ix_(part.lanes, part.examples)] = features
        return found.reshape(-1, width)

    def token_gradient(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """See ``Graph.token_gradient``."""
        if self.pooling is not None:
            raise ConfigError("an encoder predicts no tokens; it learns from texts with labels")
        readout = Readout(self._file, self.adapter, layout(), self._vjps)
        label_of = _labels_of_rows(batch)
        losses = np.empty(batch.n_labels)
        for part, context in self._run(batch, PLAIN, label_of >= 0, nodes=readout.follower):
            labels = label_of[part.rows]
            labels = labels[labels >= 0]
            if labels.size:
                logits = context.logits(len(labels))
                losses[labels] = readout.add(logits, batch.label_ids[labels])
        gradient = readout.gradient / np.float32(batch.n_labels)
        self._check_gradient(batch, gradient)
        return losses, gradient

    def feature_gradient(
        self, batch: Batch, cotangents: Callable[[Batch, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """See ``Graph.feature_gradient``."""
        raise ConfigError("there is no way back through llama.cpp's graphs")

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """Next-token logits after each token of one sequence: float32 [n_tokens, n_vocab]."""
        if self.pooling is not None:
            raise ConfigError("an encoder predicts no tokens")
        batch = pack([Tokens(list(ids), [False] * len(ids))])
        parts = self._run(batch, PLAIN, np.ones(len(ids), bool))
        return np.concatenate([context.logits(len(part.rows)).copy() for part, context in parts])

    def watch(self, batch: Batch, tap: Tap) -> None:
        """See ``Graph.watch``."""
        for _ in self._run(batch, Variants(tap=tap), np.ones(batch.n_rows, bool)):
            pass

    def max_lanes(self, batch: Batch, n_lanes: int) -> int:
        """All of them: ``_run`` itself splits them into several calls."""
        return n_lanes

    def lane_tokens(self, n_rows: int, n_lanes: int, first: int) -> int:
        """See ``Graph.lane_tokens``: every lane goes through all layers."""
        return n_rows * n_lanes

    def check_reach(self, adapter: Adapter) -> None:
        """ConfigError for a target to which llama.cpp would not apply the adapter.

        Some of its graphs compute a matmul without the adapter. So llama.cpp applies the adapter
        from a file, as it would after training, and the matmuls of a call are listed.
        """
        with temporary_folder() as folder:
            path = folder / "adapter.gguf"
            save_gguf(adapter, path)
            context = self._context_for(1)
            context.apply(path)
            names = _Names()
            zero = np.zeros(1, np.int32)
            work = Call(zero, positions=zero, sequences=zero, outputs=zero == 0)
            context.rehearse(work)
            context.run(work, names)
            self._context = None  # frees the context, and with it the adapter
        for target in adapter.targets:
            if not {target.name, f"{target.name}.weight.lora_a"} <= names.found:
                raise ConfigError(
                    f"llama.cpp does not apply adapters to {target.name} of this model: choose "
                    "other targets"
                )

    def _check_gradient(self, batch: Batch, gradient: np.ndarray) -> None:
        """ConfigError if losses do not change along the gradient as it says; once for a model.

        What is known of llama.cpp's graphs would be wrong then.
        """
        if self._checked:
            return
        assert self.adapter is not None
        # Named by no direction, the lanes are in one call still, as those of a seed.
        pair = Lanes(np.zeros(2, np.uint64), np.array([1, -1], np.float32))

        def losses(thetas: Sequence[np.ndarray]) -> np.ndarray:
            found: np.ndarray = self._losses(batch, Variants(pair), thetas).mean(axis=1)
            return found

        agrees = slope_agrees(gradient, self.adapter.theta, losses)
        if agrees is False:
            raise ConfigError(
                f"there is no gradient through llama.cpp's graph of {self.model.architecture} "
                "here, so choose --method central: the loss does not change along what should be "
                "its gradient as that says"
            )
        self._checked = bool(agrees)

    def _run(
        self,
        batch: Batch,
        variants: Variants,
        outputs: np.ndarray,
        thetas: Sequence[np.ndarray] = (),
        nodes: NodeTap | None = None,
    ) -> Iterator[tuple[_Part, Context]]:
        """Evaluate a batch call by call; yields the part of the batch and the context with results.

        outputs: bool [n_rows], rows with logits.  thetas: each lane's, in place of what
        ``variants`` says of lanes.  nodes: a hook that looks on.
        """
        if variants.lanes.tangents:
            raise ConfigError(
                "llama.cpp has no tangents: use method central or forward-difference for a model "
                "that has no graph of its own here"
            )
        context = self._context_for(int(np.diff(batch.starts).max()))
        for pieces in self._parts(batch.starts, _groups(variants.lanes)):
            works = [_call(batch, part, outputs) for part in pieces]
            for work in works:
                context.rehearse(work)
            context.forget()
            for part, work in zip(pieces, works, strict=True):
                if thetas:
                    tap: ProductTap = _Moved(self.adapter, self.ops, thetas, part)
                else:
                    tap = _Terms(self.adapter, self.ops, variants, part)
                context.run(work, tap, nodes)
                yield part, context

    def _parts(self, starts: np.ndarray, groups: Sequence[Sequence[int]]) -> Iterator[list[_Part]]:
        """Split a batch into calls; a group of lanes is always in one call.

        Each list has the calls for some sequences in some lanes: one for each piece of the
        sequences, in order.
        """
        lengths, least = np.diff(starts), max(map(len, groups))
        for length in np.unique(lengths).tolist():
            examples, most = np.flatnonzero(lengths == length), least
            step = length  # an encoder has to see all of a sequence at once
            if self.pooling is None:
                most = max(least, min(self._rows // length, self._n_sequences))
                step = min(length, max(1, self._rows // most))
            at_once = max(1, most // least)
            for i in range(0, len(examples), at_once):
                some = examples[i : i + at_once]
                # An encoder's bits depend on where a call's other sequences end: one group a call.
                limit = most // len(some) if self.pooling is None else 1
                for lanes, references in _packed(groups, limit):
                    yield [
                        _Part(lanes, references, some, (starts[some][:, None] + piece).ravel())
                        for piece in np.split(np.arange(length), range(step, length, step))
                    ]

    def _context_for(self, longest: int) -> Context:
        """A context for sequences of up to ``longest`` tokens."""
        if self._context is None or longest > self._longest:
            self._longest = -(-longest // _CELL_BLOCK) * _CELL_BLOCK
            n_rows = max(self._rows, _GROUP * self._longest if self.pooling else _GROUP)
            self._n_sequences = max(_GROUP, _CELLS // self._longest if self.pooling is None else 0)
            self._context = None  # frees its memory first
            self._context = Context(
                self.model,
                n_sequences=self._n_sequences,
                n_cells=self._n_sequences * self._longest,
                n_rows=n_rows,
                ops=self.ops,
                pooling=self.pooling,
            )
        return self._context


def _groups(lanes: Lanes) -> list[list[int]]:
    """Groups of lanes; the lanes of a group are rounded relative to its first.

    A group has the lanes of a seed, or the plain lane 0 and a seed's only lane. Every lane is in a
    group.
    """
    seeds = lanes.seeds.reshape(len(lanes), -1)
    plain = lanes.coefficients == 0
    groups: list[list[int]] = []
    for i in range(len(lanes)):
        last = groups[-1][-1] if groups else 0
        if i and not plain[i] and not plain[last] and (seeds[i] == seeds[last]).all():
            groups[-1].append(i)
        else:
            groups.append([i])
    if not plain[0]:
        return groups
    paired = [group if plain[group[0]] or len(group) > 1 else [0, *group] for group in groups]
    return paired[1:] if any(0 in group for group in paired[1:]) else paired


def _packed(groups: Sequence[Sequence[int]], limit: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Merge consecutive groups up to ``limit`` lanes; yields their lanes and references."""
    together: dict[int, int] = {}
    for group in groups:
        more = dict.fromkeys(group, group[0])
        if together and len(together | more) > limit:
            yield np.array([*together]), np.array([*together.values()])
            together = {}
        together |= more
    yield np.array([*together]), np.array([*together.values()])


def _call(batch: Batch, part: _Part, outputs: np.ndarray) -> Call:
    """The call that evaluates a part of a batch."""
    n_lanes, n = len(part.lanes), len(part.rows)
    sequences = np.arange(n_lanes * len(part.examples), dtype=np.int32)
    references = None
    if (part.references != part.lanes).any():
        place = np.searchsorted(part.lanes, part.references)
        references = (place[:, None] * n + np.arange(n)).ravel()
    return Call(
        ids=np.tile(batch.ids[part.rows], n_lanes),
        positions=np.tile(batch.positions[part.rows], n_lanes),
        sequences=np.repeat(sequences, n // len(part.examples)),
        outputs=np.tile(outputs[part.rows], n_lanes),
        references=references,
    )


class _Names:
    """A tap that collects the names of products' weights and changes nothing."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def wants(self, name: str) -> bool:
        self.found.add(name)
        return False

    def __call__(self, name: str, rows: np.ndarray, x: np.ndarray, y: np.ndarray) -> None: ...


class _OfAdapter:
    """What taps of an adapter's products have in common."""

    def __init__(self, adapter: Adapter | None, ops: HostKernels) -> None:
        self._adapter, self._ops = adapter, ops

    def wants(self, name: str) -> bool:
        return self._adapter is not None and self._adapter.target(name) is not None

    def _target(self, name: str) -> tuple[Adapter, Target]:
        """Of a product that it wants."""
        assert self._adapter is not None
        target = self._adapter.target(name)
        assert target is not None
        return self._adapter, target


class _Terms(_OfAdapter):
    """The tap that adds the adapter's term of each lane."""

    def __init__(
        self, adapter: Adapter | None, ops: HostKernels, variants: Variants, part: _Part
    ) -> None:
        super().__init__(adapter, ops)
        self._tap = variants.tap
        self._directions = variants.directions
        moved = self._directions.targets if self._directions else ()
        self._moved = {target.name for target in moved}
        self._n = len(part.rows)
        lanes = variants.lanes
        seeds = lanes.seeds[part.lanes]
        starts = None
        if seeds.ndim == 2:
            seeds = seeds[:, part.examples]
            starts = np.linspace(0, self._n, len(part.examples) + 1, dtype=np.int32)
        self._lanes = Lanes(
            seeds, lanes.coefficients[part.lanes], lanes.distribution, starts=starts
        )

    def __call__(self, name: str, rows: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        adapter, target = self._target(name)
        if self._tap is not None:
            self._tap(target, slice(0, len(rows)), x, y)
        lora, lanes = adapter.factors(target), self._lanes.unperturbed()
        if self._directions is not None and name in self._moved:
            lora, lanes = self._directions.lora(target), self._lanes
        if len(rows) == self._n * len(lanes) and (np.diff(rows) == 1).all():
            self._ops.add_lora(y, x, lora, lanes)
        else:
            self._add_by_lanes(rows, x, y, lora, lanes)

    def _add_by_lanes(
        self, rows: np.ndarray, x: np.ndarray, y: np.ndarray, lora: LoRA, lanes: Lanes
    ) -> None:
        """The same lane by lane, for rows that are not all there or not in order."""
        lane, row = np.divmod(rows, self._n)
        for i in np.unique(lane):
            here = np.flatnonzero(lane == i)
            here = here[np.argsort(row[here])]
            starts = lanes.starts
            if starts is not None:
                starts = np.searchsorted(row[here], starts).astype(np.int32)
            own = replace(
                lanes,
                seeds=lanes.seeds[i : i + 1],
                coefficients=lanes.coefficients[i : i + 1],
                starts=starts,
            )
            rows_of_lane = y[here]
            self._ops.add_lora(rows_of_lane, x[here], lora, own)
            y[here] = rows_of_lane


class _Moved(_OfAdapter):
    """The tap that adds the terms of an adapter at another theta in each lane.

    thetas: of every lane of the batch.
    """

    def __init__(
        self,
        adapter: Adapter | None,
        ops: HostKernels,
        thetas: Sequence[np.ndarray],
        part: _Part,
    ) -> None:
        super().__init__(adapter, ops)
        self._n = len(part.rows)
        self._thetas = [thetas[lane] for lane in part.lanes]

    def __call__(self, name: str, rows: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        adapter, target = self._target(name)
        for i, theta in enumerate(self._thetas):
            here = rows // self._n == i
            rows_of_lane = y[here]
            lora = adapter.factors(target, theta)
            self._ops.add_lora(rows_of_lane, x[here], lora, Lanes.plain())
            y[here] = rows_of_lane


def _labels_of_rows(batch: Batch) -> np.ndarray:
    """For each row of a batch, the number of the label that it predicts, or -1."""
    found = np.full(batch.n_rows, -1)
    found[batch.label_rows] = np.arange(len(batch.label_rows))
    return found
