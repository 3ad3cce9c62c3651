"""A linear classification head on an encoder's features, with its gradient in closed form."""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.errors import ConfigError


def has_head(adapter: Adapter | None) -> Adapter:
    """The adapter; ConfigError if there is no head to classify with."""
    if adapter is None or adapter.head is None:
        raise ConfigError(
            "classifying with an encoder needs an adapter with a head; tune one on texts with "
            "labels"
        )
    return adapter


def class_scores(adapter: Adapter, features: np.ndarray) -> np.ndarray:
    """W h + b of features h float32 [n, width]: float64 [n, n_labels]."""
    assert adapter.head_weight is not None and adapter.head_bias is not None
    scores: np.ndarray = _products(features, adapter.head_weight) + adapter.head_bias
    return scores


def _products(features: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """h W^T in float64. A row has its bits in any company, which BLAS does not promise."""
    return np.einsum("nw,lw->nl", features.astype(np.float64), weight.astype(np.float64))


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Of each row: float64 [n, n_labels]."""
    scores = scores - scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def log_probabilities(adapter: Adapter, features: np.ndarray) -> np.ndarray:
    """log softmax(W h + b) of features h float32 [n, width]: float64 [n, n_labels]."""
    return log_softmax(class_scores(adapter, features))


def class_losses(
    adapter: Adapter, features: np.ndarray, classes: np.ndarray, n_lanes: int, tangents: int = 0
) -> np.ndarray:
    """-log p of the classes: float64 [n_lanes, n].

    features: float32 [n_lanes * n, width].  classes: int32 [n].  tangents: how many lanes, at the
    end, are derivatives of the first; they get derivatives of the loss, (p - y) . W dh.
    """
    assert adapter.head_weight is not None
    n, at = len(classes), np.arange(len(classes))
    scores = log_probabilities(adapter, features[: (n_lanes - tangents) * n])
    losses = -scores.reshape(-1, n, scores.shape[1])[:, at, classes]
    error = np.exp(scores[:n])
    error[at, classes] -= 1
    slopes = _products(features[len(scores) :], adapter.head_weight)
    slopes = slopes.reshape(tangents, n, scores.shape[1])
    return np.concatenate([losses, (error * slopes).sum(axis=2)])


def head_gradient(adapter: Adapter, features: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Gradient of the mean loss with respect to the head: dW = mean (p - y) h^T, db = mean (p - y).

    features: float32 [n, width].  classes: int32 [n].  Returns float32 [n_head], in the order of
    the head's part of theta.
    """
    error = np.exp(log_probabilities(adapter, features))
    error[np.arange(len(classes)), classes] -= 1
    error /= len(classes)
    weight = error.T @ features.astype(np.float64)
    return np.concatenate([weight.ravel(), error.sum(axis=0)]).astype(np.float32)


def feature_cotangents(adapter: Adapter, features: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Gradients of the examples' losses by their features, (p - y) W: float64 [n, width]."""
    assert adapter.head_weight is not None
    error = np.exp(log_probabilities(adapter, features))
    error[np.arange(len(classes)), classes] -= 1
    return error @ adapter.head_weight.astype(np.float64)
