"""The loss of label tokens from llama.cpp's logits."""

from __future__ import annotations

import numpy as np


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """-log softmax(logits)[labels] in nats: float64 [n]; logits [n, n_vocab] are overwritten by
    numbers in proportion to the softmax.
    """
    chosen = logits[np.arange(len(labels)), labels]
    highest = logits.max(axis=1)
    logits -= highest[:, None]
    np.exp(logits, out=logits)
    return np.log(logits.sum(axis=1, dtype=np.float64)) + (highest - chosen.astype(np.float64))
