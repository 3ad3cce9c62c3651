"""Simulated devices: how fast they are, which fail, and which lie."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol import wire
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.report import Report
from fwdllm.protocol.space import HEAD, Layers, Space

# Attacks that are drawn at random unless one is named, and those that pass all checks of a report.
MIXED = ("nan", "huge", "reverse", "garbage", "replay", "claim")
ATTACKS = (*MIXED, "flip", "scale", "constant", "collude")


@dataclass(frozen=True)
class Fleet:
    """Devices of a simulation. Shares are from 0 to 1.

    tokens_per_s: tokens, counted in every lane, that a median device forwards; devices differ by a
    factor of about ``spread`` (exp of a log-normal's sigma).  dropout: the share of assignments
    never answered.  stragglers: the share of clients that take ``slowdown`` times as long.
    hostile: the share of clients that attack.  attack: in which way of ATTACKS; None: each in one
    way of MIXED, drawn at random.
    "flip", "scale", "constant" and "collude" send as many numbers as they were asked for, within
    max_derivative: the negative ones; a hundred times the negative ones; ones; and slopes along the
    random target that all of them have in common, ten times a vector of norm one. "reverse" sends
    ten times the negative slopes of the adapter, and the head's own.
    """

    tokens_per_s: float = 1000.0
    spread: float = 1.5
    dropout: float = 0.0
    stragglers: float = 0.0
    slowdown: float = 20.0
    hostile: float = 0.0
    attack: str | None = None

    def __post_init__(self) -> None:
        for name in ("dropout", "stragglers", "hostile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        if not (self.tokens_per_s > 0 and self.spread >= 1 and self.slowdown >= 1):
            raise ConfigError("devices' speed must be above 0, spread and slowdown at least 1")
        if self.attack not in (None, *ATTACKS):
            raise ConfigError(f"attacks are {', '.join(ATTACKS)}, not {self.attack!r}")

    def recorded(self) -> dict[str, Any]:
        """As JSON values; without ``attack`` if there is none: older versions had no such field."""
        fields = dataclasses.asdict(self)
        return {name: x for name, x in fields.items() if name != "attack" or x is not None}

    def seconds(self, seed: int, client: int, n_tokens: int) -> float:
        """Seconds a client takes to forward n_tokens, counted in every lane."""
        random = _random(seed, client)
        speed = self.tokens_per_s * self.spread ** random.standard_normal()
        is_slow = random.random() < self.stragglers
        return n_tokens / speed * (self.slowdown if is_slow else 1)

    def answers(self, seed: int, assignment: Assignment) -> bool:
        """Whether a client answers an assignment at all."""
        a = assignment
        return _random(seed, a.client, a.round, a.part).random() >= self.dropout

    def attack_of(self, seed: int, client: int) -> str | None:
        """A hostile client's attack, one of ATTACKS; None for an honest client."""
        random = _random(seed, client, 0xA77AC)
        if random.random() >= self.hostile:
            return None
        return self.attack or str(random.choice(MIXED))


def attacked(
    kind: str, report: Report, before: bytes | None, assignment: Assignment, space: Space
) -> bytes:
    """The message a hostile client sends for its report. before: its first accepted one or None."""
    r = report
    if kind == "garbage":
        return b"\x01\x02" + bytes(range(200))
    if kind == "replay":
        return wire.encode_report(r) if before is None else before
    if kind == "claim":
        return wire.encode_report(dataclasses.replace(r, n_examples=2**32 - 1))
    slopes, heads, vector = r.derivatives, r.head_derivatives, r.vector
    if kind == "collude":
        target = _target(space)
        slopes = _along(space, target, assignment.layers, assignment.seeds, slopes)
        heads = _along(space, target, HEAD, assignment.head_seeds, heads)
        vector = None if vector is None else space.pack(target, assignment.layers)
    else:
        most = space.config.max_derivative
        slopes = _lie(kind, slopes, most)
        heads = heads if kind in ("nan", "huge", "reverse") else _lie(kind, heads, most)
        vector = None if vector is None else _lie(kind, vector, most)
    lie = dataclasses.replace(
        r,
        derivatives=slopes.astype(np.float32),
        head_derivatives=heads.astype(np.float32),
        vector=None if vector is None else vector.astype(np.float32),
    )
    return wire.encode_report(lie)


def _lie(kind: str, values: np.ndarray, most: float) -> np.ndarray:
    """Numbers in place of the true ones. most: the largest that are accepted."""
    if kind in ("nan", "huge", "constant"):
        return np.full_like(values, {"nan": np.nan, "huge": 1e30, "constant": 1.0}[kind])
    if kind == "reverse":
        return values * -10
    return np.clip(values * {"flip": -1, "scale": -100}[kind], -most, most)


def _along(
    space: Space, target: np.ndarray, layers: Layers, seeds: np.ndarray, slopes: np.ndarray
) -> np.ndarray:
    """Slopes of the target in place of a report's own; none where clients upload weights."""
    if not slopes.size:
        return slopes
    return space.dot(target, layers, seeds.ravel()).reshape(slopes.shape)


def _target(space: Space) -> np.ndarray:
    """What colluding clients pretend the gradient is: float32 [space.size], of norm 10."""
    drawn = _random(space.config.seed, 0xC0117DE).standard_normal(space.size)
    return (drawn * (10 / np.linalg.norm(drawn))).astype(np.float32)


def _random(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))
