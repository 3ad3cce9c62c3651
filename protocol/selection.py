"""Which entries of a sparse adapter are trained: a function of the run's gradients alone.

Forward passes tell nothing about an entry that is not perturbed. So some updates before each choice
estimate the gradient of all candidates, of which only the trained ones move. The estimates are
added up, and the candidates with the largest sums are taken: at first as many as are to be trained
(foresight pruning: before that nothing moves but a head), later in place of those trained entries
that have moved least since they were taken (SpIEL, arXiv 2401.16405). Server, clients and replays
have the same gradients, so they choose the same entries.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fwdllm.engine.directions import Directions, Sparse
from fwdllm.engine.directions.sparse import Choice
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import estimating
from fwdllm.protocol.optimizers import OptimizerState
from fwdllm.protocol.seeds import entry_keys

# Share of the trained entries that is replaced; falls linearly to zero at the end of the run, as in
# SpIEL's code.
_REPLACED = 0.2


class Selection:
    """The entries that are trained, between two updates.

    Changes the directions' mask in place: it has the candidates where the next update estimates
    all of them, else the trained entries.  steps: updates of the run.  seed: decides between
    candidates of equal sums.
    """

    def __init__(self, directions: Sparse, choice: Choice, steps: int, seed: int) -> None:
        self._directions, self._choice, self._steps = directions, choice, steps
        self._window = estimating(choice.reselect)
        if steps <= self._window:
            raise ConfigError(too_short(steps, choice.reselect))
        n = len(choice.candidates)
        self._keys = entry_keys(seed, n)
        self._trained = np.zeros(n, bool)
        self._sums = np.zeros(n, np.float32)
        self._prepare(0)

    @staticmethod
    def of(directions: Directions, steps: int, seed: int) -> Selection | None:
        """The selection of a run that starts, None if its directions leave nothing to choose.

        Errors: ConfigError if the run ends before the first choice.
        """
        if not isinstance(directions, Sparse) or directions.choice is None:
            return None
        return Selection(directions, directions.choice, steps, seed)

    def of_trained(self, gradient: np.ndarray) -> np.ndarray:
        """A gradient by coordinates, and perhaps a head's, with zeros where nothing is trained."""
        found = np.zeros_like(gradient)
        found[self._directions.size :] = gradient[self._directions.size :]
        trained = self._choice.candidates[self._trained]
        found[trained] = gradient[trained]
        return found

    def advance(
        self, step: int, gradient: np.ndarray | None, theta: np.ndarray, optimizer: OptimizerState
    ) -> None:
        """Go from ``step`` updates to one more, of which the last has been made.

        gradient: the last update's by all perturbed coordinates, None if it had none.  theta:
        the adapter's. Entries that are dropped are set to zero in it, and in the optimizer's state.
        """
        if gradient is not None and self._estimates(step):
            self._sums += gradient[self._choice.candidates]
        if step + 1 == self._window:
            self._trained[self._best(self._sums, self._choice.n_trained)] = True
            self._sums[:] = 0
        elif self._replaces(step) and (step + 1) % self._choice.reselect == 0:
            self._replace(step, theta, optimizer)
            self._sums[:] = 0
        self._prepare(step + 1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """The state as plain arrays: a bit for each candidate, in words of 64, and the sums."""
        bits = np.packbits(np.pad(self._trained, (0, -len(self._trained) % 64)), bitorder="little")
        return {"trained": bits.view("<u8").astype(np.uint64), "sums": self._sums}

    def load_arrays(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Load a state from ``to_arrays`` after ``step`` updates; ValueError if it does not fit."""
        own = self.to_arrays()
        for name, array in own.items():
            if name not in arrays:
                raise ValueError(f"a state of a sparse run has no {name}")
            found = arrays[name]
            if (found.shape, found.dtype) != (array.shape, array.dtype):
                raise ValueError(f"{found.size} numbers of {name} are not {array.size}")
        bits = np.unpackbits(arrays["trained"].astype("<u8").view(np.uint8), bitorder="little")
        self._trained[:] = bits[: len(self._trained)]
        self._sums[:] = arrays["sums"]
        self._prepare(step)

    def _estimates(self, step: int) -> bool:
        """Whether the update after ``step`` updates is along all candidates."""
        left = self._choice.reselect - 1 - step % self._choice.reselect  # until the choice
        return step < self._window or (self._replaces(step) and left < self._window)

    def _replaces(self, step: int) -> bool:
        """Whether a choice follows that an equal number of updates can still make use of."""
        every = self._choice.reselect
        return self._choice.again and (step // every + 2) * every <= self._steps

    def _prepare(self, step: int) -> None:
        mask, candidates = self._directions.mask, self._choice.candidates
        mask[candidates] = 1 if self._estimates(step) else self._trained

    def _best(self, score: np.ndarray, n: int) -> np.ndarray:
        """The n candidates with the largest scores, in absolute value."""
        return np.lexsort((self._keys, -np.abs(score)))[:n]

    def _replace(self, step: int, theta: np.ndarray, optimizer: OptimizerState) -> None:
        trained, candidates = self._trained, self._choice.candidates
        share = _REPLACED * (1 - (step + 1) / self._steps)
        n = min(int(share * self._choice.n_trained), len(trained) - self._choice.n_trained)
        # An entry was zero when it was taken, so its value is what it has moved.
        moved = np.where(trained, theta[candidates], np.inf)
        dropped = np.lexsort((self._keys, np.abs(moved)))[:n]
        taken = self._best(np.where(trained, 0, self._sums), n + self._choice.n_trained)
        taken = taken[~trained[taken]][:n]
        trained[dropped], trained[taken] = False, True
        theta[candidates[dropped]] = 0
        for name, slot in optimizer.slots.items():
            slot[candidates[dropped]] = 0
            if name == "square":
                # From zero, which is long ago for its bias correction, first steps were too long.
                kept = slot[candidates[trained]]
                slot[candidates[taken]] = kept.sum(dtype=np.float64) / max(1, len(kept) - n)


def too_short(steps: int, reselect: int) -> str:
    """The sentence for a run that ends before its entries are chosen."""
    return (
        f"{steps} updates are over before what is trained has been chosen, after "
        f"{estimating(reselect)}: make more of them, or choose a lower reselect"
    )
