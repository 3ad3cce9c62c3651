"""A llama.cpp context in which we can change the results of products while it computes.

A product here is a matmul with a weight. llama.cpp's scheduler asks a callback about every
operation, in order, whether its result is wanted. If so, the scheduler calls the callback again
after the operation; the callback may then read and change the result, which later operations use.

How llama.cpp computes a call is found out by two rehearsals of it, which stop as early as possible.
The first finds the order of the rows: llama.cpp may split a call into several micro-batches and
reorder its rows, but a sequence's own tokens stay in order. In it, every token is replaced by the
number of its sequence. The second lists the operations.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fwdllm.engine.errors import ModelError
from fwdllm.engine.llamacpp.ggml import (
    F32,
    Layout,
    Tensor,
    as_array,
    as_rows,
    is_rows,
    layout,
    source_of,
    weight_name,
)
from fwdllm.engine.llamacpp.native import (
    NativeModel,
    apply_adapter,
    call,
    llama_cpp,
    open_context,
    reason,
)
from fwdllm.engine.llamacpp.products import Operation, Relative, relative_products
from fwdllm.kernels.api import HostKernels

# A graph begins by looking tokens up in the embedding table; these are the names of the table and
# of the tokens (src/llama-graph.cpp).
_TABLE, _TOKENS = b"token_embd.weight", b"inp_tokens"
_ABORTED = 2  # llama_decode in llama.h


class ProductTap(Protocol):
    """A hook at products."""

    def wants(self, name: str) -> bool:
        """Whether to be called after the product with the weight ``name`` (without ".weight")."""
        ...

    def __call__(self, name: str, rows: np.ndarray, x: np.ndarray, y: np.ndarray) -> None:
        """Called when y = x W^T is computed; y may be changed.

        rows: int64 [n], which rows of the call these are.  x: float32 [n, n_in].
        y: float32 [n, n_out].
        """
        ...


class NodeTap(Protocol):
    """A hook at all operations, for one call after the other; it changes nothing."""

    def begin(self, work: Call) -> None:
        """Called before a call."""
        ...

    def asked(self, node: Tensor) -> bool:
        """Called before an operation; returns whether to call ``computed`` after it."""
        ...

    def computed(self, node: Tensor, rows: np.ndarray) -> None:
        """Called after this operation, and after others. rows: int64 [n], the micro-batch's rows of
        the call."""
        ...


@dataclass(frozen=True)
class Call:
    """Tokens to evaluate together, sequence after sequence.

    ids, positions, sequences: int32 [n_rows]; sequences are numbered from 0.  outputs: bool
    [n_rows], rows whose logits are wanted.  references: int64 [n_rows], for each row the row that
    it is rounded relative to, which must be its own reference; None if each is rounded by itself.
    """

    ids: np.ndarray
    positions: np.ndarray
    sequences: np.ndarray
    outputs: np.ndarray
    references: np.ndarray | None = None

    @property
    def n_sequences(self) -> int:
        return int(self.sequences[-1]) + 1


@dataclass(frozen=True)
class _Shape:
    """What rehearsals found out about calls of one shape.

    orders: the rows of the call in each micro-batch.  products: see ``relative_products``; empty
    if there are several micro-batches.
    """

    orders: Sequence[np.ndarray]
    products: dict[int, Relative]


class Context:
    """A llama.cpp context for calls of up to ``n_rows`` rows in ``n_sequences`` sequences.

    n_cells: tokens whose keys and values are kept, as many of each sequence.  pooling: of an
    encoder, as enum llama_pooling_type; None for a decoder.  ops: kernels that make rows relative.
    """

    def __init__(
        self,
        model: NativeModel,
        *,
        n_sequences: int,
        n_cells: int,
        n_rows: int,
        ops: HostKernels,
        pooling: int | None = None,
    ) -> None:
        from fwdllm.kernels.cpu import num_threads  # a machine with a GPU may lack it

        pooled = {} if pooling is None else {"embeddings": True, "pooling_type": pooling}
        self.model = model
        self.ops = ops
        self._layout = layout()
        callback = _callback(weakref.WeakMethod(self._evaluated))
        self._running: _Running | None = None
        self._error: BaseException | None = None
        self._shapes: dict[tuple[bytes, int], _Shape] = {}
        self._handle = open_context(
            model,
            n_seq_max=n_sequences,
            n_ctx=n_cells,
            n_batch=n_rows,
            n_ubatch=n_rows,
            n_threads=num_threads(),
            n_threads_batch=num_threads(),
            kv_unified=False,
            flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            cb_eval=callback,
            **pooled,
        )
        weakref.finalize(self, _free, self._handle, model, callback)

    def apply(self, adapter: Path) -> None:
        """Let llama.cpp itself apply a GGUF LoRA file from now on. Errors: AdapterError."""
        apply_adapter(self.model, self._handle, adapter)

    def forget(self) -> None:
        """Start new sequences."""
        memory = llama_cpp.llama_get_memory(self._handle)
        if memory:  # encoders have none
            # True clears the data, too: values that are not finite would spoil later sequences.
            llama_cpp.llama_memory_clear(memory, True)

    def rehearse(self, work: Call) -> None:
        """Find out how llama.cpp computes calls of this shape, once for each shape.

        Sequences have the tokens of rehearsals afterwards; call ``forget`` before ``run``.
        """
        key = _shape_of(work)
        if key in self._shapes:
            return
        start = work.positions - work.positions[np.searchsorted(work.sequences, work.sequences)]
        order = _Order(replace(work, ids=work.sequences, positions=start), self._layout)
        listing = _Listing(replace(work, positions=start), self._layout)
        self.forget()
        self._decode(order)
        if len(order.orders) == 1:
            self.forget()
            self._decode(listing)
        self._shapes[key] = _Shape(order.orders, relative_products(listing.operations))

    def run(self, work: Call, tap: ProductTap, nodes: NodeTap | None = None) -> None:
        """Evaluate a rehearsed call; its tokens follow those that its sequences have already."""
        shape = self._shapes[_shape_of(work)]
        self._decode(_Evaluation(work, self._layout, shape, tap, nodes, self.ops))

    def logits(self, n: int) -> np.ndarray:
        """Logits of the last call's outputs, in the call's order: float32 [n, n_vocab].

        The array is llama.cpp's memory, not a copy.
        """
        pointer = llama_cpp.llama_get_logits(self._handle)
        n_vocab = llama_cpp.llama_vocab_n_tokens(self.model.vocab)
        return np.ctypeslib.as_array(pointer, (n, n_vocab))

    def features(self, n_sequences: int) -> np.ndarray:
        """Pooled embeddings of the sequences of the last call: float32 [n_sequences, width]."""
        width = llama_cpp.llama_model_n_embd_out(self.model.handle)
        found = np.empty((n_sequences, width), np.float32)
        for i, row in enumerate(found):
            pointer = llama_cpp.llama_get_embeddings_seq(self._handle, i)
            row[:] = np.ctypeslib.as_array(pointer, (width,))
        return found

    def _decode(self, running: _Running) -> None:
        work = running.work
        n = len(work.ids)
        counts, outputs = np.ones(n, np.int32), work.outputs.astype(np.int8)
        sequences = work.sequences.ctypes.data + 4 * np.arange(n, dtype=np.uint64)
        batch = llama_cpp.llama_batch()
        batch.n_tokens = n
        batch.token = _pointer(work.ids, ctypes.c_int32)
        batch.pos = _pointer(work.positions, ctypes.c_int32)
        batch.n_seq_id = _pointer(counts, ctypes.c_int32)
        batch.seq_id = _pointer(sequences, ctypes.POINTER(ctypes.c_int32))
        batch.logits = _pointer(outputs, ctypes.c_int8)
        llama_cpp.llama_set_abort_callback(self._handle, running.abort, None)
        self._running, self._error = running, None
        try:
            failed = call(llama_cpp.llama_decode, self._handle, batch)
        finally:
            self._running = None
        if self._error is not None:
            raise self._error
        if failed and not (failed == _ABORTED and running.abort):
            raise ModelError(f"llama.cpp failed on {self.model.file.path}: {reason()}")

    def _evaluated(self, tensor: int, ask: bool) -> bool:
        """What the callback does: say whether a result is wanted (``ask``), or use the result."""
        if self._running is None:  # not a call of ours: llama.cpp tries its graphs
            return False
        if self._error is None:
            try:
                node = self._layout.tensor.from_address(tensor)
                return self._running.asked(node) if ask else self._running.computed(node)
            except BaseException as error:  # it would be lost in ctypes
                self._error = error
        # After an error: ask for the result of this operation, and then stop.
        return ask


class _Running(Protocol):
    """What the callback does during a call.

    abort: a function that llama.cpp calls after operations; the call ends if it returns True.
    """

    work: Call
    abort: Any

    def asked(self, node: Tensor) -> bool:
        """Called before an operation; returns whether to call ``computed`` after it."""
        ...

    def computed(self, node: Tensor) -> bool:
        """Called after an operation; returns whether to continue."""
        ...


_never = llama_cpp.ggml_abort_callback(0)  # a null pointer


@llama_cpp.ggml_abort_callback
def _always(_data: object) -> bool:
    return True


class _Order:
    """The rehearsal that finds out the order of rows."""

    abort = _never

    def __init__(self, work: Call, layout: Layout) -> None:
        self.work, self._layout = work, layout
        self.orders: list[np.ndarray] = []

    def asked(self, node: Tensor) -> bool:
        ids = _tokens(self._layout, node)
        if ids is None:
            return False
        sequences, left = self.work.sequences, np.ones(len(self.work.ids), bool)
        for rows in self.orders:
            left[rows] = False
        order = np.empty(len(ids), np.int64)
        for sequence in np.unique(ids):
            here = np.flatnonzero(ids == sequence)
            order[here] = np.flatnonzero(left & (sequences == sequence))[: len(here)]
        self.orders.append(order)
        return True

    def computed(self, node: Tensor) -> bool:
        return False  # ends this micro-batch


class _Listing:
    """The rehearsal that lists the operations."""

    abort = _always

    def __init__(self, work: Call, layout: Layout) -> None:
        self.work, self._layout = work, layout
        self.operations: list[Operation] = []

    def asked(self, node: Tensor) -> bool:
        weight = None
        if node.op == self._layout.mul_mat:
            matrix, x = source_of(self._layout, node, 0), source_of(self._layout, node, 1)
            rounds = matrix.op == 0 and matrix.type != F32 and matrix.ne[2] == 1
            if rounds and is_rows(x) and is_rows(node):
                weight = weight_name(matrix)
        sources = tuple(source for source in node.src if source)
        address = ctypes.addressof(node)
        self.operations.append(Operation(address, sources, node.view_src, weight))
        return False

    def computed(self, node: Tensor) -> bool:
        return False


class _Evaluation:
    """The evaluation of a call that was rehearsed."""

    abort = _never

    def __init__(
        self,
        work: Call,
        layout: Layout,
        shape: _Shape,
        tap: ProductTap,
        nodes: NodeTap | None,
        ops: HostKernels,
    ) -> None:
        self.work, self._layout, self._tap, self._nodes, self._ops = work, layout, tap, nodes, ops
        if nodes is not None:
            nodes.begin(work)
        self._orders = iter(shape.orders)
        self._rows = np.empty(0, np.int64)
        self._products = {} if work.references is None else shape.products
        self._opens = {
            at - 1: product.source for at, product in self._products.items() if product.opens
        }
        self._sources = {product.source for product in self._products.values()}
        self._kept = {
            product.source
            for product in self._products.values()
            if product.restores or tap.wants(product.weight)
        }
        self._at = -1
        self._made: dict[int, Tensor] = {}  # inputs of products, by operation
        self._scales: dict[int, np.ndarray] = {}
        self._saved: dict[int, np.ndarray] = {}  # inputs before they were made relative
        self._references: dict[int, np.ndarray] = {}  # by number of rows

    def asked(self, node: Tensor) -> bool:
        mine = self._asked(node)
        return (self._nodes is not None and self._nodes.asked(node)) or mine

    def _asked(self, node: Tensor) -> bool:
        self._at += 1
        if self._at in self._sources:
            self._made[self._at] = node
        if node.op == self._layout.mul_mat:
            weight = weight_name(source_of(self._layout, node, 0))
            product = self._products.get(self._at)
            if product is not None and product.weight != weight:
                raise ModelError("llama.cpp has changed its graph between two calls")
            if product is not None or self._tap.wants(weight):
                return True
        ids = _tokens(self._layout, node)
        if ids is not None:
            self._rows = next(self._orders, self._rows[:0])
            if not np.array_equal(ids, self.work.ids[self._rows]):
                raise ModelError("llama.cpp evaluates tokens in an order that cannot be followed")
            self._references = {}
        return self._at in self._opens

    def computed(self, node: Tensor) -> bool:
        if node.op == self._layout.mul_mat:
            self._multiplied(node)
        if self._at in self._opens:
            source = self._opens[self._at]
            x = as_rows(self._made[source])
            if len(x):
                if source in self._kept:
                    self._saved[source] = x.copy()
                references = self._references_of(self._rows_of(x))
                self._scales[source] = self._ops.to_relative(x, references)
        if self._nodes is not None:
            self._nodes.computed(node, self._rows)
        return True

    def _multiplied(self, node: Tensor) -> None:
        weight = weight_name(source_of(self._layout, node, 0))
        product = self._products.get(self._at)
        if not (wanted := self._tap.wants(weight)) and product is None:
            return
        x, y = as_rows(source_of(self._layout, node, 1)), as_rows(node)
        if not len(y):
            return
        rows = self._rows_of(y)
        if product is not None:
            scales = self._scales[product.source]
            self._ops.from_relative(y, self._references_of(rows), scales)
            if product.source in self._saved:
                relative, x = x, self._saved[product.source]
                if product.restores:
                    relative[:] = x
                if product.closes:
                    del self._saved[product.source]
        if wanted:
            if len(x) != len(rows):
                raise ModelError(f"llama.cpp's {weight} has rows of unknown meaning")
            self._tap(weight, rows, x, y)

    def _rows_of(self, y: np.ndarray) -> np.ndarray:
        """Which rows of the call y has: all of the micro-batch, or only its outputs."""
        rows = self._rows
        if len(y) != len(rows):  # after the last attention only outputs are computed
            rows = rows[self.work.outputs[rows]]
        if len(y) != len(rows):
            raise ModelError("llama.cpp's graph has rows of unknown meaning")
        return rows

    def _references_of(self, rows: np.ndarray) -> np.ndarray:
        """For each of these rows of the call, the position in ``rows`` of its reference."""
        if len(rows) not in self._references:
            assert self.work.references is not None
            place = np.full(len(self.work.ids), -1, np.int32)
            place[rows] = np.arange(len(rows))
            self._references[len(rows)] = place[self.work.references[rows]]
        return self._references[len(rows)]


def _shape_of(work: Call) -> tuple[bytes, int]:
    return work.sequences.tobytes(), int(work.outputs.sum())


def _tokens(layout: Layout, node: Tensor) -> np.ndarray | None:
    """The ids that this operation looks up, int32 [n], if it begins a micro-batch; else None."""
    if node.op != layout.get_rows:
        return None
    table, tokens = source_of(layout, node, 0), source_of(layout, node, 1)
    if table.name != _TABLE or tokens.name != _TOKENS:
        return None
    return as_array(tokens.data, ctypes.c_int32, tokens.ne[0])


def _pointer(array: np.ndarray, kind: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(kind))


def _callback(evaluated: weakref.WeakMethod[Any]) -> Any:
    """The callback for llama.cpp; it refers to the Context weakly, to not keep it alive."""

    @llama_cpp.ggml_backend_sched_eval_callback
    def callback(tensor: int, ask: bool, _user_data: object) -> bool:
        method = evaluated()
        return method is not None and method(tensor, ask)

    return callback


def _free(handle: Any, _model: NativeModel, _callback: Any) -> None:
    llama_cpp.llama_free(handle)
