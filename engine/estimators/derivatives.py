"""Directional derivatives of an engine's loss: of one batch, or of many groups in shared passes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fwdllm.engine.data.batch import Batch
from fwdllm.engine.directions import Directions
from fwdllm.engine.errors import ConfigError, NumericsError
from fwdllm.engine.estimators import exact
from fwdllm.engine.estimators.lanes import head_gradient, lane_losses
from fwdllm.engine.estimators.plan import Plan, Probe, example_seeds, plan
from fwdllm.engine.graph import Graph, Variants
from fwdllm.engine.settings import DEFAULT_EPSILON, EXACT_METHODS

# A label's losses are equal in two lanes by chance about once in some thousand times; that so many
# are does not happen. Below this loss, in nats, labels are learned to the last bit and equal, too.
_LEAST_COMPARED, _NOTHING_TO_LEARN = 8, 1e-3


def of_batch(
    graph: Graph,
    batch: Batch,
    seeds: np.ndarray,
    method: str,
    epsilon: float,
    directions: Directions,
    per_example: bool,
) -> Probe:
    """See ``Engine.directional_derivatives``."""
    seeds = np.asarray(seeds, np.uint64)
    if method in EXACT_METHODS:
        return exact.of_batch(graph, batch, seeds, method, directions, per_example)
    if per_example:
        seeds = example_seeds(seeds, batch.n_sequences)
    p = plan(seeds, method, epsilon, directions.distribution, batch.classes is not None)
    nll, features = _losses(graph, batch, p, directions)
    losses = nll.mean(axis=1)
    loss = p.loss(losses)
    _check_moved(p, nll, loss)
    if not np.isfinite(loss):
        raise NumericsError(
            f"the loss is {loss}: the model, the adapter or epsilon {epsilon} is out of range"
        )
    shares = batch.sums_by_sequence(nll) / nll.shape[1] if per_example else losses
    gradient = head_gradient(graph, batch, features)
    n_tokens = _lane_tokens(graph, batch, p, directions)
    return Probe(loss, seeds, p.derivative(shares), gradient, n_tokens)


def of_groups(
    graph: Graph,
    batch: Batch,
    sizes: Sequence[int],
    seeds: np.ndarray,
    method: str,
    epsilon: float,
    directions: Directions,
) -> list[Probe]:
    """See ``Engine.group_derivatives``."""
    if sum(sizes) != batch.n_sequences or len(sizes) != len(seeds):
        raise ConfigError(f"{len(sizes)} groups do not fit the batch or their seeds")
    seeds = np.asarray(seeds, np.uint64)
    if method in EXACT_METHODS:
        return exact.of_groups(graph, batch, sizes, seeds, method, directions)
    own = np.repeat(seeds.T, sizes, axis=1)
    p = plan(own, method, epsilon, directions.distribution, batch.classes is not None)
    nll, features = _losses(graph, batch, p, directions)
    sums, found, first = batch.sums_by_sequence(nll), [], 0
    owners = batch.label_sequence if batch.classes is None else np.arange(batch.n_sequences)
    for size, mine in zip(sizes, seeds, strict=True):
        group = batch.sequences(first, first + size)
        # A copy, so that the order of the sum is the same wherever the group lies.
        losses = np.ascontiguousarray(sums[:, first : first + size]).sum(axis=1) / group.n_labels
        inside = (owners >= first) & (owners < first + size)
        _check_moved(p, nll[:, inside], p.loss(losses))
        part = None if features is None else features[first : first + size]
        gradient = head_gradient(graph, group, part)
        n_tokens = _lane_tokens(graph, group, p, directions)
        found.append(Probe(p.loss(losses), mine, p.derivative(losses), gradient, n_tokens))
        first += size
    return found


def _check_moved(p: Plan, nll: np.ndarray, loss: float) -> None:
    """NumericsError if no difference of a finite-difference step is other than zero.

    nll: float64 [n_lanes, n_labels].
    """
    if p.method not in ("central", "forward-difference") or not loss > _NOTHING_TO_LEARN:
        return
    compared = nll[int(p.plain) :]
    if compared.size < _LEAST_COMPARED or (compared != nll[0]).any():
        return
    raise NumericsError(
        f"a step of epsilon {p.epsilon:g} along any direction changes no loss at all, so that "
        f"nothing is learned: it is lost in rounding; the default is {DEFAULT_EPSILON:g}"
    )


def _losses(
    graph: Graph, batch: Batch, p: Plan, directions: Directions
) -> tuple[np.ndarray, np.ndarray | None]:
    """``lane_losses`` of a plan, in as many passes as memory requires.

    The features are those of the first pass, in which lane 0 is then plain.
    """
    parts: list[np.ndarray] = []
    first = None
    for lanes in p.parts(graph.max_lanes(batch, len(p.lanes))):
        nll, features = lane_losses(graph, batch, Variants(lanes, directions))
        if not parts:
            first = features
        parts.append(nll[int(p.plain) if parts else 0 :])
    return np.concatenate(parts), first


def _lane_tokens(graph: Graph, batch: Batch, p: Plan, directions: Directions) -> int:
    return graph.lane_tokens(batch.n_rows, len(p.lanes), directions.targets[0].layer)
