"""Labels of texts with their probabilities: what ``evaluation`` counts, for use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.adapters.head import class_scores, has_head, log_softmax
from fwdllm.engine.data.batch import Tokens, pack_many
from fwdllm.engine.data.encode import Encoding, encode_text
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.errors import ConfigError, DataError, NumericsError
from fwdllm.engine.evaluation import EVAL_ROWS, check_limit, label_scores
from fwdllm.engine.graph import Graph

# Texts, and characters of them, that are in memory at a time.
_MOST_TEXTS, _MOST_CHARACTERS = 64, 2**14


@dataclass(frozen=True)
class Classification:
    """The labels of one text, likeliest first.

    labels: all that there are.  probabilities: of each; their sum is 1.  scores: what they are the
    softmax of: of an encoder W h + b, of a decoder the label's log-likelihood in nats.
    """

    labels: tuple[str, ...]
    probabilities: tuple[float, ...]
    scores: tuple[float, ...]

    @property
    def label(self) -> str:
        """The likeliest."""
        return self.labels[0]

    @property
    def probability(self) -> float:
        """That of the likeliest."""
        return self.probabilities[0]


def classify(
    graph: Graph,
    encoding: Encoding,
    examples: Iterable[Example],
    labels: Sequence[str],
    max_tokens: int | None,
) -> Iterator[Classification]:
    """See ``Engine.classify``."""
    check_limit(max_tokens)
    names = _names(graph, encoding, tuple(labels))
    return _classified(graph, encoding, examples, names, max_tokens)


def _classified(
    graph: Graph,
    encoding: Encoding,
    examples: Iterable[Example],
    names: tuple[str, ...],
    max_tokens: int | None,
) -> Iterator[Classification]:
    for texts in _chunks(examples):
        try:
            rows = _scores(graph, encoding, texts, names, max_tokens)
        except DataError:  # a text is too long; one by one, so that those before it come first
            for text in texts:
                yield _ordered(names, _scores(graph, encoding, [text], names, max_tokens)[0])
        else:
            yield from (_ordered(names, row) for row in rows)


def _names(graph: Graph, encoding: Encoding, labels: tuple[str, ...]) -> tuple[str, ...]:
    if encoding.encoder:
        head = has_head(graph.adapter).head
        assert head is not None
        if labels:
            raise ConfigError(
                f"the adapter's head has its own labels ({', '.join(head.labels)}); give no others"
            )
        return head.labels
    if not labels:
        raise ConfigError("a decoder has no labels of its own: name those to choose from")
    if len(set(labels)) < len(labels) or len(labels) < 2 or not all(labels):
        raise ConfigError("a decoder chooses from two or more labels, none of them empty or twice")
    return labels


def _chunks(examples: Iterable[Example]) -> Iterator[list[Example]]:
    """Texts by the chunk; those before a bad one come before its error."""
    chunk: list[Example] = []
    size = 0
    try:
        for example in examples:
            size += len(_checked(example))
            chunk.append(example)
            if len(chunk) >= _MOST_TEXTS or size >= _MOST_CHARACTERS:
                yield chunk
                chunk, size = [], 0
    except DataError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _checked(example: Example) -> str:
    if not example.text:
        raise DataError(f"{example.where}: there is no text to classify")
    try:
        example.text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{example.where}: the text cannot be written as UTF-8") from None
    return example.text


def _scores(
    graph: Graph,
    encoding: Encoding,
    texts: Sequence[Example],
    names: Sequence[str],
    max_tokens: int | None,
) -> np.ndarray:
    """Float64 [n_texts, n_labels]."""
    if not encoding.encoder:
        return label_scores(graph, encoding, texts, names, max_tokens)[0]
    adapter = has_head(graph.adapter)
    # Not by ``Encoding.example``, which would keep the texts of a stream.
    rows = [encode_text(encoding.tokenizer, text, encoding.context, max_tokens) for text in texts]
    batches = pack_many([Tokens(ids, [False] * len(ids)) for ids in rows], EVAL_ROWS)
    features = np.concatenate([graph.features(batch) for batch in batches])
    # Row by row, because the bits of NumPy's product of several depend on how many there are.
    return np.concatenate([class_scores(adapter, row[None]) for row in features])


def _ordered(names: tuple[str, ...], scores: np.ndarray) -> Classification:
    if not np.isfinite(scores).all():
        raise NumericsError("a score is not finite: the model or the adapter is out of range")
    probabilities = np.exp(log_softmax(scores[None])[0])
    order = np.argsort(-scores, kind="stable").tolist()
    return Classification(
        tuple(names[i] for i in order),
        tuple(probabilities[order].tolist()),
        tuple(scores[order].tolist()),
    )
