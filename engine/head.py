"""A linear classification head on an encoder's features, with its gradient in closed form."""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapter import Adapter


def log_probabilities(adapter: Adapter, features: np.ndarray) -> np.ndarray:
    """log softmax(W h + b) of features h float32 [n, width]: float64 [n, n_labels]."""
    assert adapter.head_weight is not None and adapter.head_bias is not None
    scores = features.astype(np.float64) @ adapter.head_weight.T + adapter.head_bias
    scores -= scores.max(axis=1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))


def head_gradient(adapter: Adapter, features: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """Gradient of the mean loss by the head: dW = mean (p - y) h^T, db = mean (p - y).

    features: float32 [n, width].  classes: int32 [n].  Returns float32 [n_head], as theta ends.
    """
    error = np.exp(log_probabilities(adapter, features))
    error[np.arange(len(classes)), classes] -= 1
    error /= len(classes)
    weight = error.T @ features.astype(np.float64)
    return np.concatenate([weight.ravel(), error.sum(axis=0)]).astype(np.float32)
