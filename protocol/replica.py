"""The state that updates change: on the server, in a client's copy, or in a replay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.errors import NumericsError
from fwdllm.protocol.aggregate import Sums, Term
from fwdllm.protocol.descent import descend
from fwdllm.protocol.federation import WEIGHTED_POOL, FederationConfig
from fwdllm.protocol.optimizers import OptimizerState
from fwdllm.protocol.pool import WeightedPool
from fwdllm.protocol.robust import Standing
from fwdllm.protocol.schedule import lr_factor
from fwdllm.protocol.selection import Selection
from fwdllm.protocol.space import HEAD, Space

# A seed and its coefficient in a message.
_SEED_BYTES = 12


@dataclass(frozen=True, eq=False)
class Update:
    """What a round does to the adapter, given the state before the round.

    terms: of the round's gradient, in order.  head: the head's part of the gradient, float32
    [n_head], if that takes fewer bytes than the head's terms, which are then left out.
    vector: the whole gradient, float32 [space.size], where clients upload weights. Without terms,
    head and vector the round changed nothing.
    """

    round: int
    terms: tuple[Term, ...] = ()
    head: np.ndarray | None = None
    vector: np.ndarray | None = None

    @staticmethod
    def of(round: int, terms: Sequence[Term], gradient: np.ndarray, n_head: int) -> Update:
        """The update in whichever form is smaller. gradient: the gradient that the terms give."""
        n_seeds = sum(len(term.seeds) for term in terms if term.layers == HEAD)
        if n_seeds * _SEED_BYTES <= 4 * n_head:
            return Update(round, tuple(terms))
        kept = tuple(term for term in terms if term.layers != HEAD)
        return Update(round, kept, gradient[-n_head:].copy())

    @property
    def empty(self) -> bool:
        return not self.terms and self.head is None and self.vector is None


class Replica:
    """An adapter after ``round`` rounds.

    theta: the adapter's parameters, changed in place.  optimizer: state of the server's optimizer.
    selection: what of a sparse adapter is trained, None of others.  gradient: of the last round
    that had one, or None.  pool: what the rounds told of the seeds of a weighted pool, None in runs
    without one.  standing: what earlier answers say about clients, None where that does not matter,
    and on clients.
    """

    def __init__(self, config: FederationConfig, adapter: Adapter) -> None:
        self.config = config
        self.space = Space(adapter, config)
        self.round = 0
        self.optimizer = OptimizerState.initial(config, self.space.size)
        self.selection = Selection.of(self.space.directions(None), config.rounds, config.seed)
        self.gradient: np.ndarray | None = None
        self.pool = WeightedPool.of(config) if config.seeds == WEIGHTED_POOL else None
        self.standing: Standing | None = None

    @property
    def theta(self) -> np.ndarray:
        return self.space.adapter.theta

    def apply(
        self,
        update: Update,
        gradient: np.ndarray | None = None,
        standing: Standing | None = None,
    ) -> None:
        """Step to the state after ``update``.

        gradient: of the update, if it is known already.  standing: of clients after the round.
        ValueError for an update of another round; NumericsError, with the state unchanged, if the
        step is not finite.
        """
        if update.round != self.round:
            raise ValueError(f"an update of round {update.round} does not follow {self.round}")
        if update.empty:
            gradient = None
        else:
            gradient = self.gradient_of(update) if gradient is None else gradient
            self._step(gradient)
            if self.pool is not None:
                for term in update.terms:
                    if term.layers != HEAD:  # a head's seeds are of no pool
                        self.pool.count(term.seeds, term.coefficients)
        if self.selection is not None:
            self.selection.advance(self.round, gradient, self.theta, self.optimizer)
        self.standing = standing
        self.round += 1

    def gradient_of(self, update: Update) -> np.ndarray:
        """The update's gradient: float32 [space.size]."""
        if update.vector is not None:
            return update.vector
        sums = Sums(self.space)
        sums.add(update.terms)
        gradient = sums.gradient()
        if update.head is not None:
            gradient[self.space.n_coordinates :] = update.head
        return gradient

    def rates(self) -> tuple[float, float]:
        """Learning rates of the next update: the adapter's and the head's."""
        config = self.config
        factor = lr_factor(self.round, config.rounds, config.warmup, config.schedule)
        base = config.learning_rate
        head = base if config.head_learning_rate is None else config.head_learning_rate
        return base * factor, head * factor

    def to_arrays(self, *, public: bool = False) -> dict[str, np.ndarray]:
        """The state as plain arrays.

        public: without what only the server needs, to choose seeds and to judge clients.
        """
        optimizer = {f"optimizer.{k}": v for k, v in self.optimizer.to_arrays().items()}
        arrays = {"round": np.array(self.round, np.int64), "theta": self.theta, **optimizer}
        if self.selection is not None:
            arrays |= self.selection.to_arrays()
        if self.pool is not None and not public:
            arrays |= {"amplitudes": self.pool.amplitudes, "draws": self.pool.draws}
        if self.gradient is not None and not public:
            arrays["gradient"] = self.gradient
        if self.standing is not None and not public:
            arrays |= {f"standing.{k}": v for k, v in self.standing.to_arrays().items()}
        return arrays

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Load a state from ``to_arrays``; ValueError if its arrays do not fit this run."""
        missing = {"theta", "round"} - set(arrays)
        if missing:
            raise ValueError(f"a state has no {min(missing)}")
        theta, gradient = arrays["theta"], arrays.get("gradient")
        if theta.shape != self.theta.shape or theta.dtype != np.float32:
            raise ValueError(f"{theta.size} adapter weights are not {self.theta.size}")
        if gradient is not None and gradient.shape != (self.space.size,):
            raise ValueError(f"a gradient of {gradient.size} is not {self.space.size}")
        of_optimizer, of_standing = _named("optimizer.", arrays), _named("standing.", arrays)
        standing = Standing.from_arrays(of_standing, self.space.size) if of_standing else None
        config = self.config
        optimizer = OptimizerState.from_arrays(config, self.space.size, of_optimizer)
        if self.selection is not None:
            self.selection.load_arrays(int(arrays["round"]), arrays)
        self.optimizer = optimizer
        self.standing = standing
        self.gradient = None if gradient is None else gradient.copy()
        if self.pool is not None:
            self.pool.load(arrays.get("amplitudes"), arrays.get("draws"))
        self.theta[:] = theta
        self.round = int(arrays["round"])

    def _step(self, gradient: np.ndarray) -> None:
        before = self.theta.copy(), self.optimizer
        self.optimizer = OptimizerState(
            self.optimizer.step, {k: v.copy() for k, v in self.optimizer.slots.items()}
        )
        directions = self.space.directions(None)
        moving = gradient if self.selection is None else self.selection.of_trained(gradient)
        with np.errstate(over="ignore", invalid="ignore"):
            descend(
                self.space.adapter,
                directions,
                self.config,
                self.optimizer,
                moving,
                *self.rates(),
            )
        if not np.isfinite(self.theta).all():
            self.theta[:], self.optimizer = before
            raise NumericsError(
                f"round {self.round + 1} made adapter weights infinite; lower the learning rate"
            )
        self.gradient = gradient


def _named(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin with a prefix, without it."""
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}
