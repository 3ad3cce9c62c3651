"""LoRA adapters: which linear layers are tuned, and one flat vector that holds every factor.

The order of that vector is part of the protocol: a seed names a direction only together with
the position of each parameter. ``layout`` is the one place that decides it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from fwdllm.engine.errors import ConfigError, NumericsError
from fwdllm.engine.settings import LoRAConfig, is_whole
from fwdllm.kernels.api import Array, Kernels
from fwdllm.kernels.types import LoRA

# Incremented whenever ``layout`` or the place of the head in theta changes; it is stored in ledgers
# and adapter files.
LAYOUT_VERSION = 1

_BLOCK = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.(.+)")


class Map(Protocol):
    """The part of ``engine.directions.Directions`` that an update needs."""

    def combine(self, seeds: np.ndarray, coefficients: np.ndarray) -> np.ndarray: ...

    def expand(self, coordinates: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Target:
    """One adapted linear layer.

    name: the GGUF tensor name without ".weight".  layer: its block number.  n_in, n_out: the
    weight is [n_out, n_in].  offset: position in theta of the first element of A
    [rank, n_in]; B [n_out, rank] follows A.
    """

    name: str
    layer: int
    n_in: int
    n_out: int
    offset: int

    def size(self, rank: int) -> int:
        """Parameters of A and B together."""
        return rank * (self.n_in + self.n_out)


@dataclass(frozen=True)
class Head:
    """A linear classification head on n_in features; one output per label.

    Its weight [n_labels, n_in] and then its bias [n_labels] are the end of theta.
    Errors: ConfigError for labels that are missing, repeated, empty or not valid Unicode.
    """

    labels: tuple[str, ...]
    n_in: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", tuple(self.labels))
        if not all(isinstance(label, str) and _is_text(label) for label in self.labels):
            raise ConfigError("Every label must be non-empty text that can be written as UTF-8")
        if not self.labels or len(set(self.labels)) != len(self.labels):
            raise ConfigError("A classification head needs at least one label and no label twice")
        if not is_whole(self.n_in) or self.n_in < 1:
            raise ConfigError(f"A classification head needs features to read, not {self.n_in!r}")

    @property
    def n_weight(self) -> int:
        """Elements of the weight matrix."""
        return len(self.labels) * self.n_in

    @property
    def size(self) -> int:
        """Elements of weight and bias together."""
        return self.n_weight + len(self.labels)


def layout(shapes: Mapping[str, tuple[int, int]], config: LoRAConfig) -> tuple[Target, ...]:
    """Where each factor lives in theta: layers ascending, then targets by tensor name, A then B.

    shapes: GGUF tensor name without ".weight" -> (n_out, n_in) of every tunable linear layer;
    names outside "blk.N." are ignored. A layer that lacks one of the targets (models that mix
    block kinds) has the others only.
    Errors: ConfigError for a target or layer that matches nothing, naming those that exist.
    """
    blocks = by_layer(shapes)
    _check_matches(blocks, config)
    targets = []
    offset = 0
    for layer in sorted(blocks) if config.layers is None else config.layers:
        for suffix in config.targets:
            if suffix not in blocks[layer]:
                continue
            n_out, n_in = blocks[layer][suffix]
            targets.append(Target(f"blk.{layer}.{suffix}", layer, n_in, n_out, offset))
            offset += targets[-1].size(config.rank)
    return tuple(targets)


def by_layer(shapes: Mapping[str, tuple[int, int]]) -> dict[int, dict[str, tuple[int, int]]]:
    """Sort "blk.N.suffix" -> shape into {N: {suffix: shape}}; other names are left out."""
    blocks: dict[int, dict[str, tuple[int, int]]] = {}
    for name, shape in shapes.items():
        match = _BLOCK.fullmatch(name)
        if match:
            blocks.setdefault(int(match[1]), {})[match[2]] = shape
    return blocks


@dataclass(frozen=True, eq=False)
class Adapter:
    """The trainable parameters of one model.

    theta: float32 [n_lora + n_head], changed in place and never replaced, so that views of it
    stay valid.  ops: the kernels.
    """

    architecture: str
    config: LoRAConfig
    targets: tuple[Target, ...]
    theta: np.ndarray
    ops: Kernels
    head: Head | None = None

    def __post_init__(self) -> None:
        want = (self.n_lora + self.n_head,)
        if self.theta.dtype != np.float32 or self.theta.shape != want:
            raise ValueError(f"theta is {self.theta.dtype} {self.theta.shape}, not float32 {want}")
        if not self.theta.flags.c_contiguous or not self.theta.flags.writeable:
            raise ValueError("theta must be contiguous and writable")

    @classmethod
    def create(
        cls,
        architecture: str,
        shapes: Mapping[str, tuple[int, int]],
        config: LoRAConfig,
        seed: int,
        ops: Kernels,
        head: Head | None = None,
    ) -> Adapter:
        """A new adapter that leaves the model as it is: B and the head are zero.

        Element i of theta inside an A is element i of the normal stream of ``seed`` (a 64-bit
        integer) divided by sqrt(n_in), so that equal seeds give equal adapters everywhere.
        Errors: ConfigError as ``layout``, and for a rank that no target has.
        """
        targets = layout(shapes, config)
        most = max(min(target.n_in, target.n_out) for target in targets)
        if config.rank > most:
            raise ConfigError(
                f"rank {config.rank} is more than {most}, the smaller side of the largest target: "
                "a higher rank adds nothing that B A can express"
            )
        return cls.empty(architecture, targets, config, seed, ops, head)

    @classmethod
    def empty(
        cls,
        architecture: str,
        targets: tuple[Target, ...],
        config: LoRAConfig,
        seed: int,
        ops: Kernels,
        head: Head | None = None,
    ) -> Adapter:
        """As ``create``, for targets that are laid out already."""
        n_lora = sum(target.size(config.rank) for target in targets)
        theta = np.zeros(n_lora + (head.size if head else 0), np.float32)
        for target in targets:
            count = config.rank * target.n_in
            stream = ops.normal(seed, target.offset, count)
            scale = np.float32(1 / math.sqrt(target.n_in))
            theta[target.offset : target.offset + count] = stream * scale
        return cls(architecture, config, targets, theta, ops, head)

    @property
    def n_lora(self) -> int:
        """Elements of theta that are LoRA factors; they come first."""
        return sum(target.size(self.config.rank) for target in self.targets)

    @property
    def n_head(self) -> int:
        """Elements of theta that are the classification head; 0 without one."""
        return self.head.size if self.head else 0

    def target(self, name: str) -> Target | None:
        """The target that is the linear layer ``name`` (without ".weight"), or None."""
        return self._by_name.get(name)

    def factors(self, target: Target, theta: Array | None = None) -> LoRA:
        """Views of the factors of a target. theta: the kernels' copy of theta to view instead."""
        theta = self.theta if theta is None else theta
        rank = self.config.rank
        b_offset = target.offset + rank * target.n_in
        a = theta[target.offset : b_offset].reshape(rank, target.n_in)
        b = theta[b_offset : b_offset + target.n_out * rank].reshape(target.n_out, rank)
        return LoRA(a=a, b=b, scale=self.config.scale, offset=target.offset)

    @property
    def head_weight(self) -> np.ndarray | None:
        """View [n_labels, n_in] of the head's weight, or None."""
        if self.head is None:
            return None
        weight = self.theta[self.n_lora : self.n_lora + self.head.n_weight]
        return weight.reshape(len(self.head.labels), self.head.n_in)

    @property
    def head_bias(self) -> np.ndarray | None:
        """View [n_labels] of the head's bias, or None."""
        return self.theta[self.n_lora + self.head.n_weight :] if self.head else None

    def add(
        self,
        seeds: Sequence[int] | np.ndarray,
        coefficients: Sequence[float] | np.ndarray,
        directions: Map | None = None,
    ) -> None:
        """theta[:n_lora] += sum_k coefficients[k] * v(seeds[k]), in place; the head is unchanged.

        seeds: uint64 [k].  coefficients: float32 [k].  directions: what v is, by default normal
        numbers for all of theta.  Errors: NumericsError for a coefficient that is not finite,
        ConfigError for lengths that differ.
        """
        seeds = np.asarray(seeds, np.uint64)
        coefficients = np.asarray(coefficients, np.float32)
        if seeds.ndim != 1 or seeds.shape != coefficients.shape:
            raise ConfigError("An update needs as many coefficients as seeds")
        if not np.isfinite(coefficients).all():
            raise NumericsError("An update has a coefficient that is not finite")
        lora = self.theta[: self.n_lora]
        if directions is None:
            self.ops.seeded_axpy(lora, seeds, coefficients)
        else:
            lora += directions.expand(directions.combine(seeds, coefficients))

    @cached_property
    def _by_name(self) -> dict[str, Target]:
        return {target.name: target for target in self.targets}


def _is_text(label: str) -> bool:
    # JSON can carry lone surrogates, which no GGUF string can hold.
    return bool(label) and not any("\ud800" <= c <= "\udfff" for c in label)


def _check_matches(blocks: Mapping[int, Mapping[str, object]], config: LoRAConfig) -> None:
    missing = [layer for layer in config.layers or () if layer not in blocks]
    if missing:
        have = f"{min(blocks)} to {max(blocks)}" if blocks else "none"
        raise ConfigError(f"The model has no layer {missing[0]}; it has {have}")
    chosen = sorted(blocks) if config.layers is None else config.layers
    known = sorted({suffix for layer in chosen for suffix in blocks[layer]})
    for suffix in config.targets:
        if suffix not in known:
            have = ", ".join(known) or "none"
            raise ConfigError(f"No layer has a target {suffix!r}; the targets are {have}")
    for layer in config.layers or ():
        if not set(config.targets) & set(blocks[layer]):
            have = ", ".join(sorted(blocks[layer]))
            raise ConfigError(f"Layer {layer} has none of the targets; it has {have}")
