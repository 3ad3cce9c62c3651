"""A wireless channel in which clients' scalars add up in the air, for simulations.

Over-the-air computation after Sonee, Rini and Huang (arXiv 2106.00564): slopes along shared seeds
are the random projection that makes an update short, and a Gaussian multiple-access channel carries
them. All clients of a part send at once, each scalar as one analog value, so that the server hears
their sum alone, under its receiver's noise. With n clients and d scalars x_i of each, clipped to L2
norm C = ``clip``:

    sent      s_i = a (x_i + w_i)           w_i ~ N(0, t^2): the client's own noise
    heard     y = s_1 + ... + s_n + z       z ~ N(0, N0), in each of d uses of the channel
    estimate  y / a = x_1 + ... + x_n + noise of variance n t^2 + N0 / a^2

A client's mean power in a use is a^2 (C^2 / d + t^2) at most and must not exceed P; a is the
largest gain that ensures it, and the same for all clients, as nothing fades. The signal-to-noise
ratio SNR is P / N0: of one client in one use of the channel, not of the sum.

Wanted is noise of deviation sigma C in the estimate. The channel alone has C / sqrt(d SNR). Where
that is less, clients give some of their power for the rest:
t^2 = (sigma^2 - 1 / (d SNR)) C^2 / (n + 1 / SNR) solves n t^2 + N0 / a^2 = sigma^2 C^2. Either
way the estimate is the Gaussian mechanism of the sum, against a server that hears nothing else; it
knows n and who they are, which pass by other ways. Noise is drawn in floats from the run's seed, so
that runs repeat: it models a mechanism, and protects nobody.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.privacy import clipped
from fwdllm.protocol.secure import sums

KINDS = ("awgn",)
MOST_DB = 100.0

# Sets the channel's stream apart from those of a fleet.
_STREAM = 0xA17


@dataclass(frozen=True)
class Channel:
    """A channel to the server. ConfigError for what there is not.

    kind: "awgn", additive white Gaussian noise and the same gain for all.  snr_db: P / N0, the mean
    power that one client may have in a use of the channel over the noise's variance, in decibels.
    """

    kind: str
    snr_db: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"channels are {', '.join(KINDS)}; there is no {self.kind!r}")
        if not abs(self.snr_db) <= MOST_DB:
            raise ConfigError(
                f"snr_db is from {-MOST_DB:g} to {MOST_DB:g} decibels, not {self.snr_db}"
            )

    @property
    def snr(self) -> float:
        """P / N0."""
        return float(10.0 ** (self.snr_db / 10))

    def sigma(self, n_uses: int) -> float:
        """The channel's own noise in a sum of n_uses scalars, in clips."""
        return 1 / math.sqrt(n_uses * self.snr)

    def settings(self, config: FederationConfig, has_head: bool) -> FederationConfig:
        """A run's settings over this channel: sums alone are seen, sigma is all of their noise.

        Errors: ConfigError for settings that need more than sums.
        """
        n_uses = config.perturbations + (config.head_perturbations if has_head else 0)
        sigma = max(config.sigma, self.sigma(n_uses))
        try:
            return dataclasses.replace(config, secure=True, sigma=sigma)
        except ConfigError as error:
            raise ConfigError(f"a channel adds clients' scalars, and noise: {error}") from None

    def transmission(
        self, config: FederationConfig, n_clients: int, n_uses: int
    ) -> tuple[float, float]:
        """Deviation t of each client's own noise, and the gain a. N0 is 1, so P is the SNR."""
        missing = config.sigma**2 - self.sigma(n_uses) ** 2
        variance = missing * config.clip**2 / (n_clients + 1 / self.snr)
        return math.sqrt(variance), math.sqrt(self.snr / (config.clip**2 / n_uses + variance))

    def sent(
        self, config: FederationConfig, scalars: np.ndarray, random: np.random.Generator
    ) -> np.ndarray:
        """What clients send for their scalars [n, d]: float64 [n, d]."""
        deviation, gain = self.transmission(config, *scalars.shape)
        own = deviation * random.standard_normal(scalars.shape)
        return np.asarray(gain * (clipped(scalars, config.clip) + own))

    def total(
        self, config: FederationConfig, scalars: np.ndarray, round: int, part: int
    ) -> np.ndarray:
        """The estimate of the sum of clients' scalars [n, d], as ``sums`` has it: uint64 [d]."""
        random = np.random.Generator(
            np.random.PCG64(np.random.SeedSequence((config.seed, round, part, _STREAM)))
        )
        heard = self.sent(config, scalars, random).sum(axis=0)
        heard += random.standard_normal(len(heard))
        estimate = heard / self.transmission(config, *scalars.shape)[1]
        return np.round(estimate * sums.SCALE).astype(np.int64).view(np.uint64)
