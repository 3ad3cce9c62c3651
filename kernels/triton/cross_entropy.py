"""Cross-entropy fused with the output matmul: logits of a part of the vocabulary at a time."""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array, Matrix
from fwdllm.kernels.triton.lora import lane_table, round_to_references
from fwdllm.kernels.triton.products import multiplier
from fwdllm.kernels.triton.runtime import (
    DEVICE,
    check_indices,
    check_rows,
    constant,
    require,
    tensor,
)
from fwdllm.kernels.triton.runtime import weight as on_device
from fwdllm.kernels.types import Lanes

# Words of the vocabulary whose logits exist at a time: a program has those of a row in registers,
# 16 in each thread of 8 warps.
_WORDS = 4096
# Most bytes of logits that exist at a time, of all lanes together.
_LOGITS_BYTES = 256 * 2**20


@triton.jit
def _update(
    logits,
    labels,
    references,
    sums,
    rows,
    first_row,
    n_rows,
    n_words,
    first_word,
    tangents,
    RELATIVE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Add a part of the vocabulary to the running sums of each row.

    logits: float32 [lanes, rows, n_words].  sums: float32 [3, lanes, n_rows]. Of a row with a loss
    these are the largest logit, the sum of exponentials, and the label's logit. Of a row of a
    tangent they are the sum of the logits' derivatives weighted by the primal's exponentials,
    nothing, and the derivative of the label's logit.
    """
    i, lane = tl.program_id(0), tl.program_id(1)
    w = tl.arange(0, WORDS)
    mask = w < n_words
    row = (lane * rows + i).to(tl.int64)
    values = tl.load(logits + row * n_words + w, mask=mask, other=float("-inf"))
    if RELATIVE:
        reference = tl.load(references + lane)
        if reference != lane:
            there = (reference * rows + i).to(tl.int64) * n_words
            values += tl.load(logits + there + w, mask=mask, other=0.0)
    n_lanes = tl.num_programs(1) + tangents
    plane = n_lanes * n_rows
    label = tl.load(labels + lane * n_rows + first_row + i) - first_word
    here = (label >= 0) & (label < n_words)
    at = lane * n_rows + first_row + i
    before = tl.load(sums + at)
    largest = tl.maximum(before, tl.max(values, axis=0))
    p = tl.exp(values - largest)
    shrink = tl.exp(before - largest)
    tl.store(sums + at, largest)
    tl.store(sums + plane + at, tl.load(sums + plane + at) * shrink + tl.sum(p, axis=0))
    if here:
        tl.store(sums + 2 * plane + at, tl.sum(tl.where(w == label, values, 0.0), axis=0))
    for t in range(1, tangents + 1):
        slopes = tl.load(logits + (row + t * rows) * n_words + w, mask=mask, other=0.0)
        to = at + t * n_rows
        tl.store(sums + to, tl.load(sums + to) * shrink + tl.sum(p * slopes, axis=0))
        if here:
            tl.store(sums + 2 * plane + to, tl.sum(tl.where(w == label, slopes, 0.0), axis=0))


def cross_entropy(
    x: Array,
    weight: Matrix,
    labels: Array,
    *,
    lanes: Lanes | None = None,
    exact: bool = False,
) -> torch.Tensor:
    """-log softmax(x W^T)[label] of each row, in nats, float64 [rows]; logits are never all stored.

    x: [rows, n_in].  labels: int32 [rows].  Rows of tangents have the derivatives of the losses.
    """
    check_indices(labels, weight.n_out, "labels")
    x, weight, labels = tensor(x), on_device(weight), constant(labels)
    lanes = Lanes.plain() if lanes is None else lanes
    n_lanes, tangents = len(lanes), lanes.n_tangents
    n = check_rows(len(x), n_lanes, f"{n_lanes} equal lanes")
    fits = x.shape[1] == weight.n_in and len(labels) == len(x)
    require(fits, f"{len(labels)} labels of {tuple(x.shape)} for a weight of {weight.n_in}")
    if n == 0:
        return torch.zeros(0, dtype=torch.float64, device=DEVICE)
    table = lane_table(lanes, n)
    own = np.arange(n_lanes)
    relative = bool(not exact and x.dtype == torch.float32 and (lanes.references != own).any())
    if relative:
        x = round_to_references(x, table)
    x = x.view(n_lanes, n, -1)
    sums = torch.zeros(3, n_lanes, n, dtype=torch.float32, device=DEVICE)
    sums[0, : n_lanes - tangents] = float("-inf")
    step = max(1, _LOGITS_BYTES // (4 * _WORDS * n_lanes))
    for word in range(0, weight.n_out, _WORDS):
        part = weight.rows(word, word + _WORDS)
        multiply = multiplier(part, len(lanes) * n, exact)
        for row in range(0, n, step):
            block = x[:, row : row + step]
            flat = block.reshape(-1, x.shape[2]).contiguous()
            logits = multiply(flat, torch.float32)
            _update[(block.shape[1], n_lanes - tangents)](
                logits,
                labels,
                table.references,
                sums,
                block.shape[1],
                row,
                n,
                part.n_out,
                word,
                tangents,
                RELATIVE=relative,
                WORDS=_WORDS,
                num_warps=8,
            )
    return _losses(sums.double(), tangents).view(-1)


def _losses(sums: torch.Tensor, tangents: int) -> torch.Tensor:
    """Losses, and derivatives in tangents, from the sums of ``_update``: [n_lanes, n]."""
    plain = sums.shape[1] - tangents
    largest, total, label = sums[:, :plain]
    losses = largest + torch.log(total) - label
    weighted, _, slope = sums[:, plain:]
    return torch.cat([losses, weighted / total[:1] - slope])
