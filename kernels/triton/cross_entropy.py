"""Cross-entropy fused with the output matmul: logits of a part of the vocabulary at a time.

The way back computes them a second time, for the probabilities that need the sums of the first.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array, Matrix
from fwdllm.kernels.triton.decode import embedding
from fwdllm.kernels.triton.lora import lane_table, round_to_references
from fwdllm.kernels.triton.products import multiplier, product_back
from fwdllm.kernels.triton.runtime import (
    DEVICE,
    DeviceWeight,
    cdiv,
    check_indices,
    check_rows,
    constant,
    require,
    require_softcap,
    tanh,
    tensor,
)
from fwdllm.kernels.triton.runtime import weight as on_device
from fwdllm.kernels.types import Lanes

# Words of the vocabulary whose logits exist at a time: a program has those of a row in registers,
# 16 in each thread of 8 warps.
_WORDS = 4096
# Most bytes of logits that exist at a time, of all lanes together.
_LOGITS_BYTES = 256 * 2**20
# Logits that a program of ``_to_probabilities`` has, 8 in each thread of 4 warps.
_BLOCK = 1024


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
    SOFTCAP: tl.constexpr,
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
    if SOFTCAP > 0:
        t = tanh(tl.where(mask, values, 0.0) / SOFTCAP)
        values = tl.where(mask, SOFTCAP * t, float("-inf"))
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
    for lane_of in range(1, tangents + 1):
        slopes = tl.load(logits + (row + lane_of * rows) * n_words + w, mask=mask, other=0.0)
        if SOFTCAP > 0:
            slopes *= 1.0 - t * t
        to = at + lane_of * n_rows
        tl.store(sums + to, tl.load(sums + to) * shrink + tl.sum(p * slopes, axis=0))
        if here:
            tl.store(sums + 2 * plane + to, tl.sum(tl.where(w == label, slopes, 0.0), axis=0))


def cross_entropy(
    x: Array,
    weight: Matrix,
    labels: Array,
    *,
    lanes: Lanes | None = None,
    softcap: float = 0.0,
    exact: bool = False,
) -> torch.Tensor:
    """-log softmax(x W^T)[label] of each row, in nats, float64 [rows]; logits are never all stored.

    x: [rows, n_in].  labels: int32 [rows].  Rows of tangents have the derivatives of the losses.
    softcap: c > 0 makes c tanh(l / c) of a logit l.
    """
    require_softcap(softcap)
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
    sums = _sums(x, weight, labels, table.references, tangents, relative, softcap, exact)
    return _losses(sums.double(), tangents).view(-1)


def _sums(
    x: torch.Tensor,
    weight: DeviceWeight,
    labels: torch.Tensor,
    references: torch.Tensor,
    tangents: int,
    relative: bool,
    softcap: float,
    exact: bool,
) -> torch.Tensor:
    """The sums of ``_update`` over all of the vocabulary; x [n_lanes, n, n_in]."""
    n_lanes, n = x.shape[:2]
    sums = torch.zeros(3, n_lanes, n, dtype=torch.float32, device=DEVICE)
    sums[0, : n_lanes - tangents] = float("-inf")
    for part, word, row, logits in _logits(x, weight, exact):
        rows = len(logits) // n_lanes
        _update[(rows, n_lanes - tangents)](
            logits,
            labels,
            references,
            sums,
            rows,
            row,
            n,
            part.n_out,
            word,
            tangents,
            RELATIVE=relative,
            SOFTCAP=float(softcap),
            WORDS=_WORDS,
            num_warps=8,
        )
    return sums


def _logits(
    x: torch.Tensor, weight: DeviceWeight, exact: bool
) -> Iterator[tuple[DeviceWeight, int, int, torch.Tensor]]:
    """Logits of a part of the vocabulary, and of as many rows of all lanes as there is room for.

    x: [n_lanes, n, n_in].  Yields the part, its first word, the first row, and the logits, float32
    [n_lanes * rows, words].
    """
    n_lanes, n, n_in = x.shape
    step = max(1, _LOGITS_BYTES // (4 * _WORDS * n_lanes))
    for word in range(0, weight.n_out, _WORDS):
        part = weight.rows(word, word + _WORDS)
        multiply = multiplier(part, n_lanes * n, exact)
        for row in range(0, n, step):
            block = x[:, row : row + step].reshape(-1, n_in).contiguous()
            yield part, word, row, multiply(block, torch.float32)


def _losses(sums: torch.Tensor, tangents: int) -> torch.Tensor:
    """Losses, and derivatives in tangents, from the sums of ``_update``: [n_lanes, n]."""
    plain = sums.shape[1] - tangents
    largest, total, label = sums[:, :plain]
    losses = largest + torch.log(total) - label
    weighted, _, slope = sums[:, plain:]
    return torch.cat([losses, weighted / total[:1] - slope])


@triton.jit
def _to_probabilities(
    logits,
    labels,
    sums,
    n_rows,
    first_row,
    n_words,
    first_word,
    size,
    SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Make probabilities of logits [rows, n_words], in place, and of the label's 0.

    Times the slope of a soft cap.

    sums: of ``_update``, over all of the vocabulary, [3, n_rows].
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    row = first_row + at // n_words
    largest = tl.load(sums + row, mask=mask, other=0.0)
    total = tl.load(sums + n_rows + row, mask=mask, other=1.0)
    label = tl.load(labels + row, mask=mask, other=-1)
    values = tl.load(logits + at, mask=mask, other=0.0)
    slope = 1.0
    if SOFTCAP > 0:
        t = tanh(values / SOFTCAP)
        values = SOFTCAP * t
        slope = 1.0 - t * t
    p = slope * tl.exp(values - largest) / total
    tl.store(logits + at, tl.where(at % n_words + first_word == label, 0.0, p), mask=mask)


def cross_entropy_vjp(
    x: Array, weight: Matrix, labels: Array, *, softcap: float = 0.0, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses, float64 [rows], and dx[r] = sum_j p[r, j] W[j] - W[labels[r]], float32.

    x, dx: [rows, n_in].  p: the softmax of the row's logits. The label's own weight, p - 1, is the
    largest by far and cancels most of what is summed: its product is in float32, apart from those
    of the others. With a soft cap each term is times its slope.
    """
    require_softcap(softcap)
    check_indices(labels, weight.n_out, "labels")
    x, weight, labels = tensor(x), on_device(weight), constant(labels)
    fits = x.shape[1] == weight.n_in and len(labels) == len(x)
    require(fits, f"{len(labels)} labels of {tuple(x.shape)} for a weight of {weight.n_in}")
    dx = torch.zeros(x.shape, dtype=torch.float32, device=DEVICE)
    n = len(x)
    if n == 0:
        return torch.zeros(0, dtype=torch.float64, device=DEVICE), dx
    sums = _sums(x[None], weight, labels, labels, 0, relative=False, softcap=softcap, exact=exact)
    losses = _losses(sums.double(), 0).view(-1)
    for part, word, row, logits in _logits(x[None], weight, exact):
        size = logits.numel()
        _to_probabilities[(cdiv(size, _BLOCK),)](
            logits,
            labels,
            sums,
            n,
            row,
            part.n_out,
            word,
            size,
            SOFTCAP=float(softcap),
            BLOCK=_BLOCK,
        )
        dx[row : row + len(logits)] += product_back(logits, part, exact)
    of_label = torch.expm1(-losses)
    if softcap > 0:
        of_label *= 1 - (sums[2, 0].double() / softcap) ** 2
    return losses, dx + of_label.float()[:, None] * embedding(weight, labels)
