"""Activation perturbation: gradients by perturbing few activations instead of many weights.

An adapted layer computes y = x W^T + scale (x A^T) B^T. A affects the loss only through u = x A^T,
which has ``rank`` numbers per token, so dL/dA = sum over tokens of (dL/du) x^T. The forward pass
gives x; only dL/du has to be estimated. Examples do not interact, so one tangent can perturb the u
of every example independently. An example of 12 tokens and 24 layers of rank 1 has 288 unknowns;
the A of these layers have ten thousand parameters.

B is frozen, so it has to contain the directions in which the layers' outputs should change.
``sensitivity`` finds them, by perturbing biases at the outputs in the same manner.

Each number in the u of an example is perturbed in one of the K tangents, by +1 or -1 at random. The
derivative of the example's loss along that tangent, times the sign, is the number's own derivative
plus, with random signs, the derivatives of the other numbers in the same tangent. The estimate is
unbiased and the K directions are orthogonal. With at most K numbers per example it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.data.batch import Batch
from fwdllm.engine.errors import ConfigError, finite
from fwdllm.engine.estimators.lanes import head_gradient, lane_losses
from fwdllm.engine.estimators.plan import plan
from fwdllm.engine.graph import Graph, Tap, Variants

# Seed for choosing contrasts if there are more of them than the rank; its value is arbitrary.
_CONTRASTS = 1


@dataclass(frozen=True)
class Gradient:
    """The result of one step. loss: of the batch, in nats per label.

    values: float32 [n_lora]; ``gradient`` fills A's part, ``sensitivity`` B's, and the rest is
    zero.  head_gradient: float32 [n_head], or None without a head.  n_tokens: rows forwarded,
    summed over lanes.
    """

    loss: float
    values: np.ndarray
    head_gradient: np.ndarray | None
    n_tokens: int


def head_alone(graph: Graph, batch: Batch) -> Gradient:
    """The exact gradient with respect to the head; values are zero.

    Errors: ConfigError, NumericsError.
    """
    nll, features = lane_losses(graph, batch)
    head = head_gradient(graph, batch, features)
    zero = np.zeros(_adapter(graph).n_lora, np.float32)
    return Gradient(finite(float(nll.mean())), zero, head, batch.n_rows)


def gradient(
    graph: Graph, batch: Batch, seed: int, n_tangents: int, targets: Sequence[Target]
) -> Gradient:
    """An unbiased estimate of the gradient with respect to the targets' A.

    Costs 2 + n_tangents lanes: a plain one, the tangents, and a second plain pass for the x of
    the outer products.
    Errors: ConfigError, NumericsError.
    """
    adapter = _adapter(graph)
    rank = adapter.config.rank
    width = rank * len(targets)
    number = batch.positions[:, None] * width + np.arange(width)
    tangent = number % n_tangents
    sign = _signs(adapter, seed, number.shape)
    columns = {t.name: slice(i * rank, (i + 1) * rank) for i, t in enumerate(targets)}

    def inject(first: int, end: int) -> Tap:
        return _Bottlenecks(adapter, targets[0].layer, columns, tangent, sign, first, end)

    found = _slopes(graph, batch, n_tangents, inject)
    du = sign * found.slopes[tangent, _sequence(batch)[:, None]]
    outer = _OuterProducts(columns, du)
    graph.watch(batch, outer)
    values = np.zeros(adapter.n_lora, np.float32)
    for t in targets:
        values[t.offset : t.offset + rank * t.n_in] = outer.sums[t.name].ravel()
    n_tokens = (2 + n_tangents) * batch.n_rows
    return Gradient(found.loss, values, found.head_gradient, n_tokens)


def sensitivity(
    graph: Graph, batch: Batch, seed: int, n_tangents: int, targets: Sequence[Target]
) -> Gradient:
    """Estimated derivatives with respect to biases at the targets' outputs, as columns of B.

    With a head, column r has the derivatives of contrast r, a combination of the head's scores,
    averaged over examples. n classes have n - 1 contrasts; for two classes it is the difference of
    their scores. Without a head the only column has the derivatives of the loss.
    Errors: ConfigError if the rank is more than the number of such columns, NumericsError.
    """
    adapter = _adapter(graph)
    check_rank(adapter)
    rank = adapter.config.rank
    ends = np.cumsum([t.n_out for t in targets])
    columns = {t.name: slice(e - t.n_out, e) for t, e in zip(targets, ends, strict=True)}
    tangent = np.arange(ends[-1]) % n_tangents
    sign = _signs(adapter, seed, (batch.n_sequences, int(ends[-1])))
    sequence = _sequence(batch)

    def inject(first: int, end: int) -> Tap:
        return _Biases(targets[0].layer, columns, tangent, sign, sequence, first, end)

    found = _slopes(graph, batch, n_tangents, inject)
    signals = found.slopes[:, :, None]
    if found.features is not None:
        assert adapter.head_weight is not None
        scores = found.features @ adapter.head_weight.T.astype(np.float64)
        signals = scores @ _contrasts(scores.shape[2], rank).T / batch.n_sequences
    values = np.zeros(adapter.n_lora, np.float32)
    for t in targets:
        at = columns[t.name]
        b = np.einsum("eo,oer->or", sign[:, at], signals[tangent[at]])
        offset = t.offset + rank * t.n_in
        values[offset : offset + b.size] = b.ravel()
    return Gradient(found.loss, values, found.head_gradient, (1 + n_tangents) * batch.n_rows)


def scaled(adapter: Adapter, sensitivities: np.ndarray) -> np.ndarray:
    """B from the sensitivities m of ``sensitivity``: m / |m|^2 / scale, float32 [n_lora].

    A unit of u then changes the contrast, or the loss, by about one. |m|^2 is the mean over a
    target's columns.  sensitivities: float32 [n_lora].
    """
    values = np.zeros_like(sensitivities)
    rank = adapter.config.rank
    for t in adapter.targets:
        at = slice(t.offset + rank * t.n_in, t.offset + t.size(rank))
        square = float(np.square(sensitivities[at], dtype=np.float64).sum()) / rank
        if square > 0:
            values[at] = sensitivities[at] / np.float32(square * adapter.config.scale)
    return values


def check_rank(adapter: Adapter) -> None:
    """ConfigError if the rank is more than the columns of B that ``sensitivity`` can find."""
    head, rank = adapter.head, adapter.config.rank
    most = max(1, len(head.labels) - 1) if head else 1
    if rank > most:
        raise ConfigError(
            f"activation perturbation has a use for rank {most} here, not {rank}: "
            + ("one less than there are labels" if head else "the loss is one number")
        )


@dataclass(frozen=True)
class _Slopes:
    """Derivatives along tangents, with the loss and the head's gradient.

    slopes: of each example's share of the loss, float64 [n_tangents, n_sequences].
    features: of the features a head reads, float32 [n_tangents, n_sequences, width], or None.
    """

    loss: float
    slopes: np.ndarray
    features: np.ndarray | None
    head_gradient: np.ndarray | None


def _slopes(
    graph: Graph, batch: Batch, n_tangents: int, inject: Callable[[int, int], Tap]
) -> _Slopes:
    """Derivatives along tangents. inject(first, end): a tap that perturbs tangents first .. end."""
    p = plan(np.arange(n_tangents, dtype=np.uint64), "forward-ad")
    loss, head = np.nan, None
    slopes: list[np.ndarray] = []
    features: list[np.ndarray] = []
    for lanes in p.parts(graph.max_lanes(batch, len(p.lanes))):
        first, end = int(lanes.seeds[1]), int(lanes.seeds[-1]) + 1
        nll, found = lane_losses(graph, batch, Variants(lanes, tap=inject(first, end)))
        if not slopes:
            loss, head = float(nll[0].mean()), head_gradient(graph, batch, found)
        slopes.append(batch.sums_by_sequence(nll[1:]) / nll.shape[1])
        if found is not None:
            features.append(found.reshape(len(lanes), batch.n_sequences, -1)[1:])
    seen = np.concatenate(features) if features else None
    return _Slopes(finite(loss), np.concatenate(slopes), seen, head)


@dataclass(frozen=True)
class _Bottlenecks:
    """Perturbs each number of u by its sign, in its tangent: adds sign * scale * its column of B
    to the outputs of its row."""

    adapter: Adapter
    layer: int
    columns: dict[str, slice]
    tangent: np.ndarray  # [n_rows, width]
    sign: np.ndarray
    first: int
    end: int

    def __call__(self, target: Target, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        if target.name not in self.columns:
            return
        factors = self.adapter.factors(target)
        n = rows.stop - rows.start
        tangents = y.reshape(-1, n, y.shape[1])[1:]
        at = self.columns[target.name]
        columns = zip(self.tangent[rows, at].T, self.sign[rows, at].T, factors.b.T, strict=True)
        for tangent, sign, b in columns:
            here = np.flatnonzero((self.first <= tangent) & (tangent < self.end))
            step = np.float32(factors.scale) * sign[here, None] * b
            tangents[tangent[here] - self.first, here] += step


@dataclass(frozen=True)
class _Biases:
    """Perturbs a bias at each output by a sign, in the tangent of that output.

    The sign is the same for all rows of an example.
    """

    layer: int
    columns: dict[str, slice]
    tangent: np.ndarray  # [width]
    sign: np.ndarray  # [n_sequences, width]
    sequence: np.ndarray  # [n_rows]
    first: int
    end: int

    def __call__(self, target: Target, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        if target.name not in self.columns:
            return
        at = self.columns[target.name]
        n = rows.stop - rows.start
        tangents = y.reshape(-1, n, y.shape[1])[1:]
        here = np.flatnonzero((self.first <= self.tangent[at]) & (self.tangent[at] < self.end))
        signs = self.sign[self.sequence[rows]][:, at]
        tangents[self.tangent[at][here] - self.first, :, here] += signs[:, here].T


class _OuterProducts:
    """Adds up du^T x of the targets: sums float64 [rank, n_in]."""

    layer = None

    def __init__(self, columns: dict[str, slice], du: np.ndarray) -> None:
        self.columns = columns
        self.du = du
        self.sums: dict[str, np.ndarray] = {}

    def __call__(self, target: Target, rows: slice, x: np.ndarray, y: np.ndarray) -> None:
        at = self.columns.get(target.name)
        if at is None:
            return
        du = self.du[rows, at]
        total = self.sums.get(target.name, np.zeros((du.shape[1], x.shape[1])))
        # Rows are added one after the other, so that the blocks of a memory budget do not change
        # the bits; the products of a few rows at a time stay in the cache.
        for i in range(0, len(x), 16):
            products = du[i : i + 16, :, None] * x[i : i + 16, None, :].astype(np.float64)
            total = np.add.reduce(np.concatenate([total[None], products]), axis=0)
        self.sums[target.name] = total


def _adapter(graph: Graph) -> Adapter:
    if graph.adapter is None:
        raise ConfigError("activations are perturbed where an adapter reads them")
    return graph.adapter


def _sequence(batch: Batch) -> np.ndarray:
    """The sequence of each row: int64 [n_rows]."""
    return np.repeat(np.arange(batch.n_sequences), np.diff(batch.starts))


def _signs(adapter: Adapter, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """Random signs of a seed's stream: float32."""
    signs = np.zeros(int(np.prod(shape)), np.float32)
    one = np.ones(1, np.float32)
    adapter.ops.seeded_axpy(signs, np.array([seed], np.uint64), one, distribution="rademacher")
    return signs.reshape(shape)


def _contrasts(n_classes: int, rank: int) -> np.ndarray:
    """Orthonormal combinations of scores that ignore their sum: float64 [rank, n_classes]."""
    random = np.random.default_rng(_CONTRASTS).normal(size=(n_classes, n_classes - 1))
    q = np.linalg.qr(np.concatenate([np.ones((n_classes, 1)), random], axis=1))[0]
    return q[:, 1 : rank + 1].T
