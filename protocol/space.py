"""The vector space of a federated run: which vector a seed stands for in a scope.

A vector has the coordinates of the directions first, then the head's parameters. A scope is a tuple
of layers, None for all layers of the adapter, or HEAD for the classification head.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NoReturn, TypeAlias

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions import Directions, Sparse, make_directions
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import DirectionsConfig, Scope
from fwdllm.protocol.federation import FederationConfig

Layers: TypeAlias = "tuple[int, ...] | None"

HEAD: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Space:
    """The vectors of a run: float32 [size], coordinates first, the head's parameters last."""

    adapter: Adapter
    config: FederationConfig
    _directions: dict[Layers, Directions] = field(default_factory=dict, repr=False)

    @property
    def size(self) -> int:
        return self.n_coordinates + self.adapter.n_head

    @cached_property
    def n_coordinates(self) -> int:
        return self.directions(None).size

    @property
    def distribution(self) -> str:
        return self.directions(None).distribution

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers that have an adapter, ascending."""
        return tuple(sorted({t.layer for t in self.adapter.targets}))

    def directions(self, layers: Layers) -> Directions:
        """The directions that seeds stand for in a scope; sparse ones have one mask for all."""
        if layers not in self._directions:
            self._directions[layers] = self._made(layers)
        return self._directions[layers]

    def add(
        self, vector: np.ndarray, layers: Layers, seeds: np.ndarray, coefficients: np.ndarray
    ) -> None:
        """vector += sum_k coefficients[k] z(seeds[k]) in a scope, in place."""
        if layers == HEAD:
            self.adapter.ops.seeded_axpy(
                vector[self.n_coordinates :],
                seeds,
                coefficients,
                offset=self.adapter.n_lora,
                distribution=self.distribution,
            )
        else:
            vector[: self.n_coordinates] += self.directions(layers).combine(seeds, coefficients)

    def dot(self, vector: np.ndarray, layers: Layers, seeds: np.ndarray) -> np.ndarray:
        """vector . z(seed) in a scope, for every seed: float64 [k]."""
        if layers == HEAD:
            return self.head_dot(vector[self.n_coordinates :], seeds)
        return self.directions(layers).dot(vector[: self.n_coordinates], seeds)

    def head_dot(self, gradient: np.ndarray, seeds: np.ndarray) -> np.ndarray:
        """gradient . z(seed) for every seed: float64 [k]. gradient: float32 [n_head]."""
        return self.adapter.ops.seeded_dot(
            gradient, seeds, offset=self.adapter.n_lora, distribution=self.distribution
        )

    def units(self) -> list[Layers]:
        """The smallest scopes: disjoint; all other scopes are unions of them. HEAD is the last."""
        parts: list[Layers] = [(layer,) for layer in self.layers] if self.config.split else [None]
        return [*parts, HEAD] if self.adapter.n_head else parts

    def ranges(self, layers: Layers) -> list[tuple[int, int]]:
        """Where a scope lies in a vector: (start, end) pairs."""
        if layers == HEAD:
            return [(self.n_coordinates, self.size)]
        directions = self.directions(layers)
        if isinstance(directions, Sparse):
            directions = directions.dense
        if layers is None or not isinstance(directions, Dense):
            return [(0, self.n_coordinates)]
        return directions.ranges  # in split runs coordinates are parameters

    def pack(self, vector: np.ndarray, layers: Layers) -> np.ndarray:
        """The part of a vector that a client with a scope uploads: the scope's, then the head's."""
        return np.concatenate([vector[start:end] for start, end in self._ranges(layers)])

    def unpack(self, packed: np.ndarray, layers: Layers) -> np.ndarray:
        """The inverse of ``pack``; elements that ``pack`` left out are zero."""
        out, at = np.zeros(self.size, np.float32), 0
        for start, end in self._ranges(layers):
            out[start:end] = packed[at : at + end - start]
            at += end - start
        return out

    def packed_size(self, layers: Layers) -> int:
        """Number of elements that ``pack`` returns."""
        return sum(end - start for start, end in self._ranges(layers))

    def _made(self, layers: Layers) -> Directions:
        c, scope = self.config, Scope(layers)
        whole = None if layers is None else self.directions(None)
        if isinstance(whole, Sparse):
            return replace(whole, dense=replace(whole.dense, scope=scope))
        config = DirectionsConfig(c.directions, c.dimension, c.keep, c.reselect, scope)
        return make_directions(config, self.adapter, c.seed, None, _no_weights)

    def _ranges(self, layers: Layers) -> list[tuple[int, int]]:
        return [*self.ranges(layers), *self.ranges(HEAD)]


def covers(layers: Layers, unit: Layers) -> bool:
    """Whether a scope includes a unit of ``Space.units``."""
    if HEAD in (layers, unit):
        return layers == unit
    return layers is None or (unit is not None and unit[0] in layers)


def _no_weights(*_: object) -> NoReturn:
    raise ConfigError("these directions need the model's weights, which a server does not have")
