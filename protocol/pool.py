"""The seeds of a pool that is fixed for a run, and those of them that are worth more.

FedKSeed (arXiv 2312.06353) draws from a pool evenly. Its FedKSeed-Pro draws those seeds more often
along which the slopes were large: the probabilities are the softmax of the seeds' mean amplitudes,
scaled to 0 for the smallest and 1 for the largest, so none is more than e times as likely as
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.seeds import derive_seeds

# Keeps a pool of equal amplitudes from a division by zero.
_TINY = 1e-10


def pool_seeds(config: FederationConfig) -> np.ndarray:
    """The seeds of a run's pool: uint64 [pool_size]."""
    return derive_seeds(config.seed, 0, config.pool_size)


@dataclass(eq=False)
class WeightedPool:
    """What the updates so far have told of the seeds of a pool.

    seeds: uint64 [n].  amplitudes: float64 [n], the sum of the sizes of each seed's coefficients in
    the updates.  draws: int64 [n], how many coefficients it had.
    """

    seeds: np.ndarray
    amplitudes: np.ndarray
    draws: np.ndarray

    @staticmethod
    def of(config: FederationConfig) -> WeightedPool:
        """The pool before the first update."""
        n = config.pool_size
        return WeightedPool(pool_seeds(config), np.zeros(n), np.zeros(n, np.int64))

    def count(self, seeds: np.ndarray, coefficients: np.ndarray) -> None:
        """Take in coefficients of an update, float32 [k], with their seeds, uint64 [k].

        A coefficient is a slope by the client's weight, so clients of more examples count for more.
        ValueError for a seed of another pool.
        """
        n, places = len(self.seeds), self._places(seeds)
        self.amplitudes += np.bincount(places, np.abs(coefficients).astype(np.float64), n)
        self.draws += np.bincount(places, minlength=n)

    def probabilities(self) -> np.ndarray:
        """How likely each seed is: float64 [n], above 0, with a sum of 1.

        Every seed counts as if it had been drawn once more, with a slope of zero.
        """
        means = self.amplitudes / (self.draws + 1)
        scaled = np.exp((means - means.min()) / (means.max() - means.min() + _TINY))
        found: np.ndarray = scaled / scaled.sum()
        return found

    def pick(self, numbers: np.ndarray) -> np.ndarray:
        """A seed of the pool for each number of 64 random bits: uint64, in the numbers' shape."""
        ends = np.cumsum(self.probabilities())
        # The upper 53 bits are what a float64 holds, so the share is below 1.
        shares = (numbers >> np.uint64(11)).astype(np.float64) / 2.0**53
        picked: np.ndarray = self.seeds[np.searchsorted(ends / ends[-1], shares, side="right")]
        return picked

    def load(self, amplitudes: np.ndarray | None, draws: np.ndarray | None) -> None:
        """Take over what a state holds; ValueError if it is of another pool.

        None, as in the states that clients get: as before the first update.
        """
        n = len(self.seeds)
        amplitudes = np.zeros(n) if amplitudes is None else amplitudes
        draws = np.zeros(n, np.int64) if draws is None else draws
        for found, dtype in ((amplitudes, np.float64), (draws, np.int64)):
            if found.shape != (n,) or found.dtype != dtype:
                raise ValueError(f"{found.size} figures are not of a pool of {n} seeds")
        self.amplitudes, self.draws = amplitudes.copy(), draws.copy()

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.seeds, kind="stable")

    def _places(self, seeds: np.ndarray) -> np.ndarray:
        """Where seeds stand in the pool: int64, in their shape."""
        at = np.searchsorted(self.seeds, seeds, sorter=self._order)
        places: np.ndarray = self._order[np.minimum(at, len(self.seeds) - 1)]
        if not np.array_equal(self.seeds[places], seeds):
            raise ValueError("an update has a seed that is not of the pool")
        return places
