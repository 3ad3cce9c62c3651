"""Loss and accuracy of a model over examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fwdllm.engine.adapters.head import log_probabilities
from fwdllm.engine.data.batch import pack_many
from fwdllm.engine.data.encode import encode_label
from fwdllm.engine.data.jsonl import Example, check_labels
from fwdllm.engine.errors import ConfigError, DataError, finite

if TYPE_CHECKING:
    from fwdllm.engine.engine import Engine

# Rows of one evaluation batch: enough to amortize decoding the weights, small in memory.
EVAL_ROWS = 2048


@dataclass(frozen=True)
class Evaluation:
    """loss: mean negative log-likelihood per label token (or class) in nats.

    n_tokens: label tokens (or classes).  accuracy: share of labels chosen right, None for
    examples without labels.
    """

    loss: float
    n_tokens: int
    n_examples: int
    accuracy: float | None


def evaluate(engine: Engine, examples: Sequence[Example], max_tokens: int | None) -> Evaluation:
    """See ``Engine.evaluate``."""
    if not examples:
        raise DataError("there are no examples to evaluate")
    if examples[0].kind == "label":
        return _by_labels(engine, examples, max_tokens)
    total, count = 0.0, 0
    for batch in pack_many([engine.tokenize(e, max_tokens) for e in examples], EVAL_ROWS):
        nll = engine.graph.token_losses(batch)
        total += float(nll.sum())
        count += nll.size
    return Evaluation(finite(total / count), count, len(examples), None)


def _by_labels(engine: Engine, examples: Sequence[Example], max_tokens: int | None) -> Evaluation:
    labels = engine.labels or tuple(sorted({e.label for e in examples if e.label is not None}))
    check_labels(examples, labels)
    if engine.encoder:
        return _by_head(engine, examples, max_tokens)
    context = engine.args.context
    candidates = [
        encode_label(engine.tokenizer, example, label, context, max_tokens)
        for example in examples
        for label in labels
    ]
    score: list[float] = []  # summed log-likelihood of each candidate
    counts: list[int] = []
    for batch in pack_many(candidates, EVAL_ROWS):
        nll = engine.graph.token_losses(batch)[0]
        n = batch.n_sequences
        score += (-np.bincount(batch.label_sequence, weights=nll, minlength=n)).tolist()
        counts += np.bincount(batch.label_sequence, minlength=n).tolist()
    scores = np.array(score).reshape(len(examples), len(labels))
    truth = np.array([labels.index(e.label) for e in examples if e.label is not None])
    at = np.arange(len(examples))
    n_tokens = int(np.array(counts).reshape(scores.shape)[at, truth].sum())
    accuracy = float(np.mean(scores.argmax(axis=1) == truth))
    loss = finite(float(-scores[at, truth].sum()) / n_tokens)
    return Evaluation(loss, n_tokens, len(examples), accuracy)


def _by_head(engine: Engine, examples: Sequence[Example], max_tokens: int | None) -> Evaluation:
    if engine.adapter is None or engine.adapter.head is None:
        raise ConfigError("classifying with an encoder needs an adapter with a head")
    total, right = 0.0, 0
    for batch in pack_many([engine.tokenize(e, max_tokens) for e in examples], EVAL_ROWS):
        assert batch.classes is not None
        scores = log_probabilities(engine.adapter, engine.graph.features(batch))
        total -= float(scores[np.arange(len(batch.classes)), batch.classes].sum())
        right += int((scores.argmax(axis=1) == batch.classes).sum())
    n = len(examples)
    return Evaluation(finite(total / n), n, n, right / n)
