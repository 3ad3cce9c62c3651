"""Cross-entropy of the output matrix product."""

from __future__ import annotations

import numpy as np

from fwdllm.kernels.api import Matrix
from fwdllm.kernels.reference.checks import require_indices
from fwdllm.kernels.reference.decode import dequantize
from fwdllm.kernels.reference.layers import softcapped
from fwdllm.kernels.reference.linear import row_products
from fwdllm.kernels.reference.tangents import split
from fwdllm.kernels.types import Lanes


def cross_entropy(
    x: np.ndarray,
    weight: Matrix,
    labels: np.ndarray,
    *,
    lanes: Lanes | None = None,
    softcap: float = 0.0,
    exact: bool = False,
) -> np.ndarray:
    """-log softmax(x W^T)[label] of each row, in nats, float64 [rows].

    x: float32 [rows, n_in].  weight: [n_vocabulary, n_in].  labels: int32 [rows].
    lanes: with tangents, rows of lane 0 give losses and rows of the others derivatives of these
    losses; otherwise lanes change nothing.  softcap: c > 0 makes c tanh(l / c) of a logit l.
    exact: accepted for the common signature; these kernels always compute exactly. IndexError if a
    label is outside the vocabulary.
    """
    require_indices(labels, weight.n_out, "labels")
    n_tangents = lanes.n_tangents if lanes else 0
    logits, tangents = split(row_products(x, dequantize(weight)), n_tangents)
    logits, slope = softcapped(logits, softcap)
    tangents = tangents * slope
    logits -= logits.max(axis=1, keepdims=True)
    sums = np.sum(np.exp(logits), axis=1, keepdims=True)
    at = np.arange(len(logits))
    label = labels[: len(logits)]
    nll = np.log(sums[:, 0]) - logits[at, label]
    slopes = np.sum(np.exp(logits) / sums * tangents, axis=2) - tangents[:, at, label]
    return np.concatenate([nll, slopes.ravel()])
