"""Loss and accuracy of a model over examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.adapters.head import has_head, log_probabilities
from fwdllm.engine.data.batch import pack_many
from fwdllm.engine.data.encode import Encoding
from fwdllm.engine.data.jsonl import Example, check_labels
from fwdllm.engine.errors import ConfigError, DataError, finite
from fwdllm.engine.graph import Graph

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


def evaluate(
    graph: Graph, encoding: Encoding, examples: Sequence[Example], max_tokens: int | None
) -> Evaluation:
    """See ``Engine.evaluate``."""
    check_limit(max_tokens)
    if not examples:
        raise DataError("there are no examples to evaluate")
    if examples[0].kind == "label":
        return _by_labels(graph, encoding, examples, max_tokens)
    parts = encoding.separate(examples)
    total, count = 0.0, 0
    for batch in pack_many([encoding.example(e, max_tokens) for e in parts], EVAL_ROWS):
        nll = graph.token_losses(batch)
        total += float(nll.sum())
        count += nll.size
    return Evaluation(finite(total / count), count, len(examples), None)


def check_limit(max_tokens: int | None) -> None:
    """ConfigError for a limit of tokens that leaves nothing of an example."""
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"a maximum number of tokens is at least 2, not {max_tokens}")


def _by_labels(
    graph: Graph, encoding: Encoding, examples: Sequence[Example], max_tokens: int | None
) -> Evaluation:
    labels = encoding.labels or tuple(sorted({e.label for e in examples if e.label is not None}))
    check_labels(examples, labels)
    if encoding.encoder:
        return _by_head(graph, encoding, examples, max_tokens)
    scores, counts = label_scores(graph, encoding, examples, labels, max_tokens)
    truth = np.array([labels.index(e.label) for e in examples if e.label is not None])
    at = np.arange(len(examples))
    n_tokens = int(counts[at, truth].sum())
    accuracy = float(np.mean(scores.argmax(axis=1) == truth))
    loss = finite(float(-scores[at, truth].sum()) / n_tokens)
    return Evaluation(loss, n_tokens, len(examples), accuracy)


def label_scores(
    graph: Graph,
    encoding: Encoding,
    examples: Sequence[Example],
    labels: Sequence[str],
    max_tokens: int | None,
) -> tuple[np.ndarray, np.ndarray]:
    """What a decoder gives every label as the continuation of every text.

    Returns log-likelihoods in nats, summed over the label's tokens, float64 [n_examples, n_labels],
    and the numbers of those tokens, int64 of the same shape. Errors: DataError.
    """
    end = encoding.label_end(tuple(labels))
    candidates = [
        encoding.label(example, label, end, max_tokens) for example in examples for label in labels
    ]
    scores: list[float] = []
    counts: list[int] = []
    for batch in pack_many(candidates, EVAL_ROWS):
        nll = graph.token_losses(batch)[0]
        n = batch.n_sequences
        scores += (-np.bincount(batch.label_sequence, weights=nll, minlength=n)).tolist()
        counts += np.bincount(batch.label_sequence, minlength=n).tolist()
    shape = len(examples), len(labels)
    return np.array(scores).reshape(shape), np.array(counts).reshape(shape)


def _by_head(
    graph: Graph, encoding: Encoding, examples: Sequence[Example], max_tokens: int | None
) -> Evaluation:
    adapter = has_head(graph.adapter)
    total, right = 0.0, 0
    for batch in pack_many([encoding.example(e, max_tokens) for e in examples], EVAL_ROWS):
        assert batch.classes is not None
        scores = log_probabilities(adapter, graph.features(batch))
        total -= float(scores[np.arange(len(batch.classes)), batch.classes].sum())
        right += int((scores.argmax(axis=1) == batch.classes).sum())
    n = len(examples)
    return Evaluation(finite(total / n), n, n, right / n)
