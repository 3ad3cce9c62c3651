"""What one tuning step needs in memory, from the shapes of a model alone.

Counted are the arrays of ``models.llama`` and ``models.bert`` that exist together at the
places where most of them do, and the buffers of ``kernels.cpu``. Not counted: the Python
process itself (about 60 MB with NumPy and llama.cpp loaded) and per-thread scratch memory
(under 2 MB each).
"""

from __future__ import annotations

from typing import Any

from fwdllm.engine.forward import BLOCK_ROWS

_FLOAT = 4
# kernels/cpu/panel.h: 32 activations as int8, their scale, and up to two corrections.
_INT8_PACKED = (32 + 4 + 8) / 32
# kernels/cpu/matmul.h: a partial softmax of 16 bytes for each 256 words of the vocabulary.
_SOFTMAX_CHUNK, _SOFTMAX_BYTES = 256, 16


def estimate_step(
    args: Any,
    *,
    weight_bytes: int,
    n_trainable: int,
    n_rows: int,
    n_lanes: int,
    n_labels: int | None = None,
    optimizer_slots: int = 2,
    int8: bool = True,
    encoder: bool = False,
) -> dict[str, int]:
    """Bytes of one step by purpose, and the peak of them that exist together as "total".

    args: of the model's family.  weight_bytes: of all tensors in the file.  n_trainable:
    elements of theta.  n_rows: tokens of the batch.  n_lanes: variants of the adapter in one
    pass, 2K for central differences.  n_labels: tokens that count in the loss; None is all.
    optimizer_slots: averages kept for each parameter, 2 for Adam.  int8: whether products
    quantize activations (quantized weights, not exact).  encoder: a BERT, not a decoder.

    weights: mapped from the file; the system can drop them and read them again.
    adapter, optimizer: kept between steps.  update: the gradient and the optimizer's
    temporaries.  residual, attention: activations of all lanes.  feed_forward: activations of
    a block of rows.  packed: the largest input of a product as the kernel lays it out.
    logits: of the loss.
    """
    rows = n_rows * n_lanes
    block = min(rows, max(1, BLOCK_ROWS // n_lanes) * n_lanes)  # as Pass.in_blocks
    labels = 0 if encoder else (n_rows if n_labels is None else n_labels) * n_lanes
    packed = _INT8_PACKED if int8 else _FLOAT
    query = args.n_heads * args.head_dim
    key_value = getattr(args, "n_kv_heads", args.n_heads) * args.head_dim
    hidden_arrays = 2 if encoder else 3  # gate, up and their product; or before and after GELU
    chunks = -(-args.n_vocab // _SOFTMAX_CHUNK)
    parts = {
        "weights": weight_bytes,
        "adapter": _FLOAT * n_trainable,
        "optimizer": _FLOAT * n_trainable * optimizer_slots,
        "update": _FLOAT * n_trainable * 4,
        "residual": _FLOAT * rows * 3 * args.width,  # the stream, its norm, what is added
        "attention": _FLOAT * rows * (2 * query + 2 * key_value),
        "feed_forward": _FLOAT * block * (hidden_arrays * args.hidden + 3 * args.width),
        "packed": int(packed * max(rows * max(args.width, query), block * args.hidden)),
        "logits": labels * (chunks * _SOFTMAX_BYTES + 2 * _FLOAT * args.width),
    }
    # Attention and feed-forward follow each other, but the C library keeps what one has freed.
    layer = sum(parts[name] for name in ("residual", "attention", "feed_forward", "packed"))
    kept = parts["weights"] + parts["adapter"] + parts["optimizer"]
    return {**parts, "total": kept + max(layer, parts["logits"], parts["update"])}
