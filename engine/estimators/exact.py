"""The exact gradient, and the slopes that follow from it.

"backprop" goes one pass forward and one back. "readout" is for what a decoder's last layer writes,
see ``readout``, and goes back through no layer.

What other methods measure along each direction, grad . v, is here one product for each of any
number of them: all that is built on slopes works with it unchanged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fwdllm.engine.adapters import head
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.directions import Directions
from fwdllm.engine.errors import finite
from fwdllm.engine.estimators.activation import Gradient
from fwdllm.engine.estimators.plan import Probe, example_seeds
from fwdllm.engine.graph import Graph

# Passes of a row through the model that count. Backprop goes forward, forward again, and back;
# fewer where memory allows, but a client's work is to count the same on every device. Readout goes
# forward once and reads the logits twice, never more work than another pass.
PASSES = {"backprop": 3, "readout": 2}


def gradient(graph: Graph, batch: Batch, method: str) -> Gradient:
    """Of the mean loss by the adapter and the head. Errors: ConfigError, NumericsError."""
    found = _unchecked(graph, batch, method)
    finite(found.loss)
    return found


def _unchecked(graph: Graph, batch: Batch, method: str) -> Gradient:
    if batch.classes is None:
        losses, values = graph.token_gradient(batch)
        of_head = None
    else:
        adapter, n = head.has_head(graph.adapter), len(batch.classes)

        def cotangents(part: Batch, features: np.ndarray) -> np.ndarray:
            assert part.classes is not None
            return head.feature_cotangents(adapter, features, part.classes) / n

        features, values = graph.feature_gradient(batch, cotangents)
        losses = head.class_losses(adapter, features, batch.classes, 1)[0]
        of_head = head.head_gradient(adapter, features, batch.classes)
    assert graph.adapter is not None
    values = values[: graph.adapter.n_lora]
    return Gradient(float(losses.mean()), values, of_head, PASSES[method] * batch.n_rows)


def of_batch(
    graph: Graph,
    batch: Batch,
    seeds: np.ndarray,
    method: str,
    directions: Directions,
    per_example: bool,
) -> Probe:
    """See ``Engine.directional_derivatives``."""
    if per_example:
        own = example_seeds(seeds, batch.n_sequences)
        found = _of_examples(graph, batch, own, method, directions)
    else:
        found = _slopes(graph, batch, seeds, method, directions)
    finite(found.loss)
    return found


def of_groups(
    graph: Graph,
    batch: Batch,
    sizes: Sequence[int],
    seeds: np.ndarray,
    method: str,
    directions: Directions,
) -> list[Probe]:
    """See ``Engine.group_derivatives``; each group goes through the model by itself."""
    ends = np.cumsum(sizes)
    groups = [batch.sequences(end - n, end) for end, n in zip(ends, sizes, strict=True)]
    return [
        _slopes(graph, group, mine, method, directions)
        for group, mine in zip(groups, seeds, strict=True)
    ]


def _slopes(
    graph: Graph, batch: Batch, seeds: np.ndarray, method: str, directions: Directions
) -> Probe:
    found = _unchecked(graph, batch, method)
    slopes = directions.dot(directions.project(found.values), seeds)
    return Probe(
        found.loss, seeds, slopes, found.head_gradient, found.n_tokens, gradient=found.values
    )


def _of_examples(
    graph: Graph, batch: Batch, seeds: np.ndarray, method: str, directions: Directions
) -> Probe:
    """Each example's share of the loss along its own directions: [n_seeds, n_examples]."""
    alone = [batch.sequences(i, i + 1) for i in range(batch.n_sequences)]
    shares = np.array([part.n_labels for part in alone]) / batch.n_labels
    parts = [
        _slopes(graph, part, mine, method, directions)
        for part, mine in zip(alone, seeds.T, strict=True)
    ]
    heads = [part.head_gradient for part in parts if part.head_gradient is not None]
    return Probe(
        loss=float(shares @ [part.loss for part in parts]),
        seeds=seeds,
        derivative=np.stack([part.derivative for part in parts], axis=1) * shares,
        head_gradient=np.einsum("e,eh->h", shares, heads).astype(np.float32) if heads else None,
        n_tokens=sum(part.n_tokens for part in parts),
    )
