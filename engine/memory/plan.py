"""How much memory a tuning step needs, by the model's shapes alone, and how to run it in less.

Counted are the arrays of the graphs in ``models`` that exist at the same time at
the peaks, and the buffers of ``kernels.cpu``. Not counted: the Python process itself (about
60 MB with NumPy and llama.cpp loaded) and per-thread scratch memory (under 2 MB each).
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.memory.system import available_bytes, limit_bytes

if TYPE_CHECKING:
    from fwdllm.engine.models.dimensions import Dimensions

_FLOAT = 4
# kernels/cpu/int8_pack.h: 32 activations as int8, their scale, and up to two corrections.
_INT8_PACKED = (32 + 4 + 8) / 32
# kernels/cpu/cross_entropy.h: a partial softmax of 16 bytes for each 256 words of the vocabulary.
_SOFTMAX_CHUNK, _SOFTMAX_BYTES = 256, 16
# kernels/cpu/cross_entropy_vjp.h: words of the vocabulary whose probabilities exist at a time.
_VOCABULARY_BLOCK = 2048
# Bytes of the widest array of a block of rows: a few of them are about the size of an L3 cache, and
# ``keep_freed_memory`` covers them. More rows than _MOST_ROWS make no matmul faster.
_BLOCK_BYTES, _MOST_ROWS = 24 * 2**20, 2048
# Rows of a block on a GPU: with so many, decoding weights to scratch takes 3% of the matmuls' time.
_GPU_ROWS = 16384
# kernels/triton: bytes of decoded weights, words of the vocabulary whose logits exist at a time,
# parts that an exact product is added up from.
_GPU_DECODED, _GPU_WORDS, _GPU_PARTS = 128 * 2**20, 4096, 8
# glibc's numbers for mallopt, and the largest threshold it adapts to by itself.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MMAP_THRESHOLD = -1, -3, 32 * 2**20
# With so few rows, decoding the weights takes 5% of the matmuls' time (36 ns for a panel of 16 x 32
# weights, against 770 ns).
_LEAST_ROWS = 256
# What decoding costs in rows: as much as the matmuls of so many, by the times above.
_DECODING_ROWS = 12
# Bytes of layers' values that a way back keeps where no budget is set, if a fourth of the memory
# that is free is not less: those of 256 rows are 0.4 GiB for 1.1B and 1.3 GiB for 7B.
VALUE_BYTES, _VALUE_SHARE = 2**30, 4


def keep_freed_memory() -> None:
    """Let glibc use the memory of a freed array for the next one, up to a few blocks of rows.

    By default glibc returns such memory to the system and gets it again by page faults, zeroed,
    which takes 7% of a forward pass. Other C libraries have no such setting.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, 4 * _MMAP_THRESHOLD)


def default_block_rows(args: Dimensions) -> int:
    """Rows of all lanes that go through a layer at a time."""
    return min(_MOST_ROWS, max(_LEAST_ROWS, _BLOCK_BYTES // (_FLOAT * args.hidden)))


def estimate_step(
    args: Dimensions,
    *,
    weight_bytes: int,
    n_trainable: int,
    n_rows: int,
    n_lanes: int,
    block_rows: int | None = None,
    longest: int | None = None,
    n_labels: int | None = None,
    optimizer_slots: int = 2,
    int8: bool = True,
    encoder: bool = False,
) -> dict[str, int]:
    """Bytes of one step by purpose, and as "total" the peak of those that exist together.

    args: of the model's family.  weight_bytes: of all tensors in the file, or of those kept in
    memory.  n_trainable: elements of theta.  n_rows: tokens of the batch.  n_lanes: variants of
    the adapter in one pass, 1 + K with tangents and 2K for central differences.  block_rows: rows
    of all lanes that go through a layer at a time; None is ``default_block_rows``.  longest: tokens
    of the longest example, which goes through a layer as a whole; None is ``n_rows``.  n_labels:
    tokens that count in the loss; None is all.
    optimizer_slots: averages kept for each parameter, 2 for Adam.  int8: whether matmuls
    quantize activations (quantized weights, not exact).  encoder: a BERT, not a decoder.

    weights: mapped from the file; the system can drop them and read them again.
    adapter, optimizer: kept between steps.  update: the gradient and the optimizer's
    temporaries.  residual: the residual stream of all lanes.  attention, feed_forward: activations
    of a block of rows.  packed: the largest input of a matmul as the kernel lays it out.
    logits: buffers of the loss.
    """
    rows = n_rows * n_lanes
    wanted = block_rows or default_block_rows(args)
    sequences = min(rows, max(wanted, (longest or n_rows) * n_lanes))  # as batch.split
    block = min(sequences, max(1, wanted // n_lanes) * n_lanes)  # as Pass.in_blocks
    labels = 0 if encoder else (n_rows if n_labels is None else n_labels) * n_lanes
    packed = _INT8_PACKED if int8 else _FLOAT
    query = args.n_heads * args.head_dim
    key_value = args.n_kv_heads * args.head_dim
    fused = query + 2 * key_value if args.fused_qkv else 0
    chunks = -(-args.n_vocab // _SOFTMAX_CHUNK)
    parts = {
        "weights": weight_bytes,
        "adapter": _FLOAT * n_trainable,
        "optimizer": _FLOAT * n_trainable * optimizer_slots,
        "update": _FLOAT * n_trainable * 6,
        "residual": _FLOAT * rows * args.width,
        "attention": _FLOAT * sequences * (2 * args.width + 2 * query + 2 * key_value + fused)
        + _FLOAT * _num_threads() * n_lanes * (longest or n_rows) * args.head_dim,
        "feed_forward": _FLOAT * block * (args.hidden_arrays * args.hidden + 3 * args.width),
        "packed": int(packed * max(sequences * max(args.width, query), block * args.hidden)),
        "logits": labels * (chunks * _SOFTMAX_BYTES + 2 * _FLOAT * args.width),
    }
    # Attention and feed-forward follow each other, but the C library keeps what one has freed.
    layer = sum(parts[name] for name in ("attention", "feed_forward", "packed"))
    kept = parts["weights"] + parts["adapter"] + parts["optimizer"]
    work = max(parts["residual"] + max(layer, parts["logits"]), parts["update"])
    return {**parts, "total": kept + work}


def _num_threads() -> int:
    from fwdllm.kernels.cpu import num_threads  # a machine with a GPU may lack it

    return num_threads()


def estimate_gradient(
    args: Dimensions,
    *,
    weight_bytes: int,
    n_trainable: int,
    n_rows: int,
    first_layer: int = 0,
    kept_layers: int = 0,
    block_rows: int | None = None,
    longest: int | None = None,
    n_labels: int | None = None,
    optimizer_slots: int = 2,
    encoder: bool = False,
) -> dict[str, int]:
    """Bytes of one step by the way back, as ``estimate_step``.

    n_rows: tokens that go forward and back together; a batch of more takes them in turn.
    first_layer: the first that is adapted, where the way back ends.  kept_layers: how many of the
    last are not computed again.

    kept: what layers read, of all of them, and of the last ones the other values that the way back
    reads.  residual: the stream, and its cotangents.  attention,
    feed_forward: activations and cotangents of a layer that is computed again, of whole examples
    and of a block of rows.  loss: probabilities of a block of the vocabulary, and what is added
    up of them.
    """
    wanted = block_rows or default_block_rows(args)
    sequences = min(n_rows, max(wanted, longest or n_rows))
    block = min(sequences, wanted)
    labels = 0 if encoder else n_rows if n_labels is None else n_labels
    query, key_value = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    fused = 2 * (query + 2 * key_value) if args.fused_qkv else 0
    hidden_arrays = 2 * max(3, args.hidden_arrays)
    parts = {
        "weights": weight_bytes,
        "adapter": _FLOAT * n_trainable,
        "optimizer": _FLOAT * n_trainable * optimizer_slots,
        "update": _FLOAT * n_trainable * 6,
        "kept": _FLOAT * n_rows * args.width * (args.n_layers - first_layer)
        + kept_layers * n_rows * _value_bytes(args),
        "residual": _FLOAT * n_rows * 2 * args.width,
        "attention": _FLOAT
        * sequences
        * (3 * args.width + 4 * query + 4 * key_value + fused + args.further_values)
        + _FLOAT * _num_threads() * 2 * (longest or n_rows) * args.head_dim,
        "feed_forward": _FLOAT * block * (hidden_arrays * args.hidden + 4 * args.width),
        "loss": _FLOAT * labels * (_VOCABULARY_BLOCK + 4 * args.width),
    }
    kept = parts["weights"] + parts["adapter"] + parts["optimizer"]
    layer = parts["attention"] + parts["feed_forward"]
    work = parts["kept"] + parts["residual"] + max(layer, parts["loss"]) + parts["adapter"]
    return {**parts, "total": kept + max(work, parts["update"])}


def _value_bytes(args: Dimensions) -> int:
    """Of a row and layer, besides its input: what a ``Recorded`` layer keeps at most."""
    query, key_value = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    usual = args.width + 2 * query + 2 * key_value + 2 * args.hidden
    return _FLOAT * (usual + args.further_values)


@dataclass(frozen=True)
class MemoryPlan:
    """How to run a step: rows of a block, lanes of a pass, bytes of weights to keep in memory."""

    block_rows: int
    lanes: int
    weights: int | None


def plan_step(
    args: Dimensions,
    budget: int | None,
    *,
    resident: int,
    largest_layer: int,
    n_trainable: int,
    n_rows: int,
    n_lanes: int,
    longest: int,
    n_labels: int,
    int8: bool,
    encoder: bool,
) -> MemoryPlan:
    """The fastest way to keep a step within ``budget`` bytes resident; None is no bound.

    resident: bytes the process has resident beside weights.  largest_layer: bytes of weights
    that must be in memory at once.  Other arguments: as in ``estimate_step``. To save memory, first
    blocks get smaller, then lanes go through the model in several passes. ConfigError if neither is
    enough.
    """
    block = default_block_rows(args)
    if budget is None:
        return MemoryPlan(block, n_lanes, None)

    def needed(block_rows: int, lanes: int) -> int:
        estimate = estimate_step(
            args,
            weight_bytes=0,
            n_trainable=n_trainable,
            n_rows=n_rows,
            n_lanes=lanes,
            block_rows=block_rows,
            longest=longest,
            n_labels=n_labels,
            int8=int8,
            encoder=encoder,
        )
        return resident + estimate["total"]

    lanes = n_lanes
    while needed(block, lanes) + largest_layer > budget:
        if block > _LEAST_ROWS:
            block = max(_LEAST_ROWS, block // 2)
        elif lanes > 3:  # a plain lane and a pair
            lanes = max(3, lanes // 2)
        else:
            least = needed(block, lanes) + largest_layer
            raise ConfigError(
                f"this step needs about {least / 2**20:.0f} MiB of memory, more than the budget of "
                f"{budget / 2**20:.0f} MiB: use fewer or shorter examples"
            )
    return MemoryPlan(block, lanes, budget - needed(block, lanes))


@dataclass(frozen=True)
class GradientPlan:
    """How to run a way back: rows of a block, rows of the batch at a time, bytes of weights to keep
    in memory, and of how many of the last layers the values are kept instead of computed again.
    """

    block_rows: int
    rows: int
    weights: int | None
    kept_layers: int = 0


def plan_gradient(
    args: Dimensions,
    budget: int | None,
    *,
    resident: int,
    weight_bytes: int,
    largest_layer: int,
    n_trainable: int,
    n_rows: int,
    first_layer: int,
    longest: int,
    n_labels: int,
    encoder: bool,
) -> GradientPlan:
    """The fastest way to keep a gradient within ``budget`` bytes resident, as ``plan_step``.

    weight_bytes: of all layers. First the batch goes in several parts, down to an example at a
    time, then blocks get smaller. What all that and the weights leave is for values of layers;
    fewer rows at a time, whose weights are decoded more often, are taken if more layers' values fit
    for it.
    """
    block = default_block_rows(args)
    # What is kept of more rows than these grows, and their products get no faster.
    rows = min(n_rows, max(longest, _MOST_ROWS))

    def needed(rows: int, block: int) -> int:
        estimate = estimate_gradient(
            args,
            weight_bytes=0,
            n_trainable=n_trainable,
            n_rows=rows,
            first_layer=first_layer,
            block_rows=block,
            longest=longest,
            n_labels=min(rows, n_labels),
            encoder=encoder,
        )
        return resident + estimate["total"]

    while budget is not None and needed(rows, block) + largest_layer > budget:
        if rows > longest:
            rows = max(longest, rows // 2)
        elif block > _LEAST_ROWS:
            block = max(_LEAST_ROWS, block // 2)
        else:
            least = needed(rows, block) + largest_layer
            raise ConfigError(
                f"this step needs about {least / 2**20:.0f} MiB of memory, more than the budget of "
                f"{budget / 2**20:.0f} MiB: use shorter examples, or a method of forward passes "
                "only, such as forward-ad"
            )

    n_layers = args.n_layers - first_layer
    free = VALUE_BYTES
    if budget is None:
        known = [n for n in (available_bytes(), limit_bytes()) if n is not None]
        free = min([free, *(n // _VALUE_SHARE for n in known)])

    def kept_layers(rows: int) -> int:
        left = free if budget is None else budget - needed(rows, block) - weight_bytes
        return min(n_layers, max(0, left) // (rows * _value_bytes(args)))

    def work(rows: int) -> float:
        """In passes of a layer: forward, back, and forward once more where values are not kept."""
        return (1 + _DECODING_ROWS / rows) * (3 * n_layers - kept_layers(rows))

    choices = [rows]
    while choices[-1] // 2 >= max(longest, _LEAST_ROWS):
        choices.append(choices[-1] // 2)
    rows = min(choices, key=work)
    weights = None if budget is None else budget - needed(rows, block)
    return GradientPlan(block, rows, weights, kept_layers(rows))


def plan_gpu_step(args: Dimensions, free: int | None, n_rows: int, n_lanes: int) -> MemoryPlan:
    """How to run a step on a GPU with ``free`` bytes of memory, None for no bound.

    Lanes go through the model in several passes if they do not fit together.
    """
    of_block = _FLOAT * (6 * args.width + max(3, args.hidden_arrays) * args.hidden)
    lanes, block = n_lanes, _GPU_ROWS
    while free is not None and lanes > 3:
        # The residual stream exists twice while a layer adds to it.
        needed = 2 * _FLOAT * n_rows * lanes * args.width + of_block * block
        if needed <= free:
            break
        lanes = max(3, lanes // 2)
    return MemoryPlan(block, lanes, None)


def plan_gpu_gradient(
    args: Dimensions,
    free: int | None,
    *,
    n_trainable: int,
    n_rows: int,
    first_layer: int,
    longest: int,
    n_labels: int,
    exact: bool,
) -> GradientPlan:
    """How to run a way back on a GPU with ``free`` bytes of memory, None for no bound.

    As ``plan_gradient``; ConfigError if an example at a time is too much. Half of the memory that
    is left is for values of layers.
    """
    block = _GPU_ROWS
    rows = min(n_rows, max(longest, block))

    def needed(rows: int, block: int) -> int:
        sequences, labels = min(rows, max(block, longest)), min(rows, n_labels)
        query, key_value = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
        parts = _GPU_PARTS if exact else 0
        kept = 2 * n_trainable + rows * args.width * (args.n_layers - first_layer + 2)
        fused = 2 * (query + 2 * key_value) if args.fused_qkv else 0
        hidden_arrays = 1 + 2 * max(3, args.hidden_arrays) + parts
        attention = sequences * ((3 + parts) * args.width + 4 * query + 4 * key_value + fused)
        feed_forward = min(sequences, block) * (hidden_arrays * args.hidden + 4 * args.width)
        loss = labels * 4 * args.width + 2 * min(labels, _GPU_ROWS) * _GPU_WORDS
        decoded = min(_GPU_DECODED, 2 * args.width * max(args.hidden, _GPU_WORDS))
        return _FLOAT * (kept + max(attention + feed_forward, loss)) + 2 * decoded

    while free is not None and needed(rows, block) > free:
        if rows > longest:
            rows = max(longest, rows // 2)
        elif block > _LEAST_ROWS:
            block = max(_LEAST_ROWS, block // 2)
        else:
            raise ConfigError(
                f"this step needs about {needed(rows, block) / 2**20:.0f} MiB of the GPU's memory, "
                f"of which {free / 2**20:.0f} MiB are free: use shorter examples, or a method of "
                "forward passes only, such as forward-ad"
            )
    kept_layers = args.n_layers - first_layer
    if free is not None:
        left = (free - needed(rows, block)) // 2
        kept_layers = min(kept_layers, left // (rows * _value_bytes(args)))
    return GradientPlan(block, rows, None, kept_layers)
