"""Which seeds, examples and clients a step uses: pure functions of (run seed, step).

All come from one Philox stream keyed by the run seed. Its 64-bit counter is split into
purpose (2 bits), round or epoch (32 bits) and index (28 bits), so no two draws of a run ever
share a counter.
"""

from __future__ import annotations

import numpy as np

from fwdllm.kernels.cpu import philox
from fwdllm.protocol.settings import MAX_INDEX, MAX_ROUNDS, MAX_RUN_SEED

_PERTURBATIONS, _SHUFFLE, _CLIENTS, _HEAD = range(4)


def derive_seeds(run_seed: int, round: int, count: int, first: int = 0) -> np.ndarray:
    """The perturbation seeds first .. first + count of one round: uint64 [count].

    For more perturbations of the same round, raise ``first`` by the count drawn so far.
    ValueError outside 0 <= run_seed < 2**64, 0 <= round < 2**32, 0 <= first + count <= 2**28.
    """
    return _draw(run_seed, _PERTURBATIONS, round, count, first)


def head_seeds(run_seed: int, round: int, count: int, first: int = 0) -> np.ndarray:
    """As ``derive_seeds``, for directions of a classification head."""
    return _draw(run_seed, _HEAD, round, count, first)


def client_keys(run_seed: int, round: int, count: int, first: int = 0) -> np.ndarray:
    """One random number for each client of a round: uint64 [count].

    Errors: as ``derive_seeds``.
    """
    return _draw(run_seed, _CLIENTS, round, count, first)


def entry_keys(run_seed: int, count: int) -> np.ndarray:
    """One random number for each entry of a sparse adapter: uint64 [count].

    Errors: as ``derive_seeds``.
    """
    return _draw(run_seed, _CLIENTS, MAX_ROUNDS - 1, count)  # a round that no run has


def batch_indices(run_seed: int, step: int, n_examples: int, batch_size: int) -> np.ndarray:
    """The examples of step ``step``: int64 [min(batch_size, n_examples)].

    Each epoch is its own permutation of all examples; epochs follow each other without a gap,
    so every batch is full and every example is used exactly once per epoch. A batch across the
    border of two epochs may hold an example twice. ValueError if n_examples or batch_size is below
    1 or step below 0.
    """
    if n_examples < 1 or batch_size < 1 or step < 0:
        raise ValueError(
            f"no batch of {batch_size} from {n_examples} examples at step {step}; "
            "batch size and examples start at 1, steps at 0"
        )
    size = min(batch_size, n_examples)
    start = step * size
    first, last = start // n_examples, (start + size - 1) // n_examples
    order = np.concatenate([_epoch(run_seed, e, n_examples) for e in range(first, last + 1)])
    begin = start - first * n_examples
    return order[begin : begin + size]


def _epoch(run_seed: int, epoch: int, n_examples: int) -> np.ndarray:
    keys = _draw(run_seed, _SHUFFLE, epoch, n_examples)
    return np.argsort(keys, kind="stable").astype(np.int64)


def _draw(run_seed: int, purpose: int, round: int, count: int, first: int = 0) -> np.ndarray:
    fits = min(first, count) >= 0 and first + count <= MAX_INDEX
    if not (0 <= run_seed <= MAX_RUN_SEED and 0 <= round < MAX_ROUNDS and fits):
        raise ValueError(
            f"no seeds for run seed {run_seed}, round {round}, {first} .. {first + count}"
        )
    words = philox(run_seed, (purpose << 60 | round << 28) + first, count).astype(np.uint64)
    return words[:, 0] | words[:, 1] << np.uint64(32)
