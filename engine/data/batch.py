"""A batch: token rows of several sequences, and the tokens or classes that the loss counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from fwdllm.kernels.types import Lanes


@dataclass(frozen=True)
class Tokens:
    """One tokenized sequence. labels[i]: whether token i counts in the loss (i >= 1)."""

    ids: list[int]
    labels: list[bool]
    label_class: int | None = None


@dataclass(frozen=True)
class Batch:
    """Sequences packed row after row, without padding.

    ids, positions: int32 [rows].  starts: int32 [n_sequences + 1], the rows of each sequence.
    label_rows: int32 [n_labels], rows whose output predicts the next token; label_ids: int32
    [n_labels], that token; label_sequence: int32 [n_labels], its sequence.
    classes: int32 [n_sequences] for classification by a head, else None.
    first, first_row: index of the first sequence, and of its first row, in the batch that this one
    was split from.
    """

    ids: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    label_rows: np.ndarray
    label_ids: np.ndarray
    label_sequence: np.ndarray
    classes: np.ndarray | None = None
    first: int = 0
    first_row: int = 0

    @property
    def n_rows(self) -> int:
        return len(self.ids)

    @property
    def n_sequences(self) -> int:
        return len(self.starts) - 1

    @property
    def n_labels(self) -> int:
        """Number of losses that the mean is over: label tokens, or sequences with classes."""
        return len(self.label_ids) if self.classes is None else len(self.classes)

    def sums_by_sequence(self, values: np.ndarray) -> np.ndarray:
        """Sum values of labels by sequence: float64 [n, n_labels] to [n, n_sequences]."""
        if self.classes is not None:
            return values
        sums = np.zeros((len(values), self.n_sequences))
        np.add.at(sums.T, self.label_sequence, values.T)
        return sums

    def lanes(self, lanes: Lanes) -> Lanes:
        """The lanes of the whole batch, restricted to the sequences of this one.

        Only seeds per sequence ([n_lanes, n_sequences]) need it. Adjacent sequences with equal
        seeds become one part, so that their direction is generated once.
        """
        if lanes.seeds.ndim == 1:
            return lanes
        seeds = lanes.seeds[:, self.first : self.first + self.n_sequences]
        first = np.flatnonzero([True, *(seeds[:, 1:] != seeds[:, :-1]).any(axis=0)])
        starts = self.starts[[*first, -1]]
        return replace(lanes, seeds=seeds[:, first], starts=starts)

    def sequences(self, first: int, end: int) -> Batch:
        """Sequences first .. end as a batch that refers to this one by first and first_row."""
        rows = slice(self.starts[first], self.starts[end])
        labels = (self.label_sequence >= first) & (self.label_sequence < end)
        return Batch(
            ids=self.ids[rows],
            positions=self.positions[rows],
            starts=self.starts[first : end + 1] - self.starts[first],
            label_rows=self.label_rows[labels] - self.starts[first],
            label_ids=self.label_ids[labels],
            label_sequence=self.label_sequence[labels] - np.int32(first),
            classes=None if self.classes is None else self.classes[first:end],
            first=first,
            first_row=int(self.starts[first]),
        )


def pack(sequences: Sequence[Tokens]) -> Batch:
    """Pack tokenized sequences into one batch."""
    lengths = [len(s.ids) for s in sequences]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    ids = np.concatenate([np.array(s.ids, np.int32) for s in sequences])
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in lengths])
    labels = np.concatenate([np.array(s.labels, bool) for s in sequences])
    labels[starts[:-1]] = False  # nothing predicts a first token
    at = np.flatnonzero(labels).astype(np.int32)
    classes = [s.label_class for s in sequences]
    return Batch(
        ids=ids,
        positions=positions,
        starts=starts,
        label_rows=at - np.int32(1),
        label_ids=ids[at],
        label_sequence=(np.searchsorted(starts, at, side="right") - 1).astype(np.int32),
        classes=None if None in classes else np.array(classes, np.int32),
    )


def pack_many(sequences: Sequence[Tokens], max_rows: int) -> list[Batch]:
    """Pack sequences, in order, into batches of at most ``max_rows`` rows.

    A sequence longer than that is a batch alone.
    """
    batches, start, rows = [], 0, 0
    for i, t in enumerate(sequences):
        if rows + len(t.ids) > max_rows and i > start:
            batches.append(pack(sequences[start:i]))
            start, rows = i, 0
        rows += len(t.ids)
    batches.append(pack(sequences[start:]))
    return batches


def split(batch: Batch, max_rows: int) -> list[Batch]:
    """Split a batch, in order, into batches of at most ``max_rows`` rows.

    A sequence longer than that is a batch alone.
    """
    bounds = [0]
    for i in range(1, batch.n_sequences):
        if batch.starts[i + 1] - batch.starts[bounds[-1]] > max_rows:
            bounds.append(i)
    bounds.append(batch.n_sequences)
    return [batch.sequences(first, end) for first, end in pairwise(bounds)]
