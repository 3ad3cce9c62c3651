"""Losses in every lane of a pass, of tokens or of classes by a head."""

from __future__ import annotations

import numpy as np

from fwdllm.engine.adapters import head
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.graph import PLAIN, Graph, Variants


def lane_losses(
    graph: Graph, batch: Batch, variants: Variants = PLAIN
) -> tuple[np.ndarray, np.ndarray | None]:
    """NLL of every label in every lane, derivatives of it in tangents: float64 [n_lanes, n_labels].

    The second result is what a head reads, see ``Graph.features``, or None without classes.
    """
    if batch.classes is None:
        return graph.token_losses(batch, variants), None
    adapter, lanes = head.has_head(graph.adapter), variants.lanes
    features = graph.features(batch, variants)
    losses = head.class_losses(adapter, features, batch.classes, len(lanes), lanes.n_tangents)
    return losses, features


def head_gradient(graph: Graph, batch: Batch, features: np.ndarray | None) -> np.ndarray | None:
    """The gradient with respect to the head: float32 [n_head], or None without classes.

    features: as ``lane_losses`` returns them, lane 0 being plain.
    """
    if features is None or batch.classes is None or graph.adapter is None:
        return None
    return head.head_gradient(graph.adapter, features[: batch.n_sequences], batch.classes)
