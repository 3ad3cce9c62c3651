"""Simulated devices: how fast they are, which fail, and which lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol import wire
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.report import Report

ATTACKS = ("nan", "huge", "flip", "garbage", "replay", "claim")


@dataclass(frozen=True)
class Fleet:
    """Devices of a simulation. Shares are from 0 to 1.

    tokens_per_s: tokens, counted in every lane, that a median device forwards; devices differ by a
    factor of about ``spread`` (exp of a log-normal's sigma).  dropout: the share of assignments
    never answered.  stragglers: the share of clients that take ``slowdown`` times as long.
    hostile: the share of clients that attack, each in one way of ATTACKS, drawn at random.
    """

    tokens_per_s: float = 1000.0
    spread: float = 1.5
    dropout: float = 0.0
    stragglers: float = 0.0
    slowdown: float = 20.0
    hostile: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dropout", "stragglers", "hostile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")
        if not (self.tokens_per_s > 0 and self.spread >= 1 and self.slowdown >= 1):
            raise ConfigError("devices' speed must be above 0, spread and slowdown at least 1")

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

    def attack(self, seed: int, client: int) -> str | None:
        """A hostile client's attack, one of ATTACKS; None for an honest client."""
        random = _random(seed, client, 0xA77AC)
        return str(random.choice(ATTACKS)) if random.random() < self.hostile else None


def attacked(kind: str, report: Report, before: bytes | None) -> bytes:
    """The message a hostile client sends for its report. before: its first accepted one or None."""
    r = report
    slopes = r.derivatives.copy()
    if kind == "nan":
        slopes[...] = np.nan
    elif kind == "huge":
        slopes[...] = 1e30
    elif kind == "flip":
        slopes *= -10
    elif kind == "garbage":
        return b"\x01\x02" + bytes(range(200))
    elif kind == "replay" and before is not None:
        return before
    n_examples = 2**32 - 1 if kind == "claim" else r.n_examples
    vector = r.vector
    if vector is not None and slopes.size == 0:
        vector = {"nan": vector * np.nan, "huge": vector + 1e30, "flip": vector * -10}.get(
            kind, vector
        ).astype(np.float32)
    return wire.encode_report(
        Report(
            r.round,
            r.part,
            n_examples,
            r.n_tokens,
            r.seconds,
            r.loss,
            slopes,
            r.head_derivatives,
            vector,
        )
    )


def _random(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(numbers)))
