"""Clients' reports as vectors of integers, which may be added modulo 2^64, and the sum as a report.

A vector has the client's weight, its loss times the weight, its tokens and its seconds, then its
scalars times the weight; what is no integer is in units of 2^-24. With differential privacy it has
the scalars alone, clipped, with the client's share of the noise and a weight of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.report import Report, fault
from fwdllm.protocol.secure.noise import discrete_gaussian

# Half of float32's own step at 1; ``FederationConfig`` keeps sums below 2^38 units.
SCALE = 1 << 24

# So that sums of ``MAX_CLIENTS`` stay below 2^63, too.
_MOST_SECONDS, _MOST_TOKENS = 1e5, 1 << 40

# Clients of a sum: of one or two each would know the other's.
LEAST = 3

# What precedes the scalars without differential privacy.
_FIGURES = 4

# The stream of ``random.Random.randrange`` or ``secrets.randbelow``: an integer below n.
Below = Callable[[int], int]


def threshold(config: FederationConfig, n_clients: int) -> int:
    """How many of a part's clients have to stay until its sum is known.

    More than half would be enough to keep both of a client's secrets from being asked for. More
    than two thirds, as a server that tells everybody another story of who has left would get the
    keys of all with whom a client shares masks: n clients give n - threshold shares of keys each at
    most, which makes n (n - threshold) / threshold keys, so that threshold minus as many clients,
    three at least, stay under masks that only their sum is without.
    """
    # The 1e-9 is for rounding errors: 0.28 * 25 is slightly above 7.
    by_quorum = math.ceil(config.quorum * n_clients - 1e-9)
    return max(LEAST, 2 * n_clients // 3 + 1, by_quorum)


def size(config: FederationConfig, assignment: Assignment) -> int:
    """Number of integers in a client's vector."""
    scalars = assignment.seeds.shape[1] + assignment.head_seeds.shape[1]
    return scalars + (0 if config.sigma else _FIGURES)


def encode(config: FederationConfig, report: Report, n_members: int, below: Below) -> np.ndarray:
    """A client's vector: uint64 [size].

    n_members: of the part, which share the noise.  below: where the noise comes from.
    ConfigError for a report that the server would refuse, as it will not see it.
    """
    scalars = scalars_of(config, report)
    if config.sigma:
        values = clipped(scalars, config.clip)
        share = noise_variance(config, n_members)
        values += np.array([discrete_gaussian(share, below) for _ in values], np.int64)
        return values.view(np.uint64)
    examples, tokens = np.array([report.n_examples]), np.array([report.n_tokens])
    seconds, loss = np.array([report.seconds]), np.array([report.loss])
    return vectors(config, examples, tokens, seconds, loss, scalars[None])[0]


def vectors(
    config: FederationConfig,
    n_examples: np.ndarray,
    n_tokens: np.ndarray,
    seconds: np.ndarray,
    loss: np.ndarray,
    scalars: np.ndarray,
) -> np.ndarray:
    """The vectors of n reports that were checked, without privacy: uint64 [n, size].

    n_examples, n_tokens, seconds, loss: of each report, [n].  scalars: [n, k].
    """
    weight = n_examples.astype(np.int64) if config.weighted else np.ones(len(loss), np.int64)
    tokens = np.minimum(n_tokens.astype(np.int64), _MOST_TOKENS)
    time = np.rint(np.minimum(seconds.astype(np.float64), _MOST_SECONDS) * SCALE)
    means = np.column_stack([loss, scalars]).astype(np.float64)
    products = np.rint(means * weight[:, None] * SCALE).astype(np.int64)
    found = np.column_stack([weight, tokens, time.astype(np.int64), products])
    return found.view(np.uint64)


def scalars_of(config: FederationConfig, report: Report) -> np.ndarray:
    """What a client adds to those of others, not clipped yet: float64 [n].

    ConfigError for a report that the server would refuse, as it will not see it. The error goes to
    the server, which sets max_derivative: it must not have a number of the client's.
    """
    if fault(config, report) is not None:
        raise ConfigError(
            "the answer cannot be added to others: a number of it is not finite, or out of the "
            "run's range"
        )
    return np.concatenate([report.derivatives[0], report.head_derivatives[0]]).astype(np.float64)


def clipped(scalars: np.ndarray, clip: float) -> np.ndarray:
    """Scalars in units of 1 / SCALE, together of L2 norm clip at most: int64 [n]."""
    norm = float(np.linalg.norm(scalars))
    # Towards zero, so that rounding makes the vector no longer than the clip.
    return np.trunc(scalars * (min(1.0, clip / norm) if norm else 1.0) * SCALE).astype(np.int64)


def noise_variance(config: FederationConfig, n_members: int) -> int:
    """Variance of a client's share of the noise, in squared units of 1 / SCALE.

    As many shares as the threshold make up the whole: sigma * clip squared.
    """
    deviation = config.sigma * config.clip * SCALE
    return math.ceil(deviation**2 / threshold(config, n_members))


def decode(
    config: FederationConfig, assignment: Assignment, total: np.ndarray, n_clients: int
) -> Report:
    """The sum of n_clients vectors as the report of one client that stands for all of them.

    n_examples: the sum of their weights; the scalars and the loss are means by weight. With
    differential privacy nothing is known but the scalars: the loss is NaN.
    """
    values = total.view(np.int64).astype(np.float64)
    n_slopes = assignment.seeds.shape[1]
    if config.sigma:
        weight, n_tokens, seconds, loss = float(n_clients), 0.0, 0.0, math.nan
        means = values / SCALE / n_clients
    else:
        weight, n_tokens, seconds = values[0], values[1], values[2] / SCALE
        means = values[_FIGURES - 1 :] / SCALE / max(weight, 1.0)
        loss, means = float(means[0]), means[1:]
    slopes, head = np.split(means.astype(np.float32)[None], [n_slopes], axis=1)
    a = assignment
    # A hostile client can make a sum anything; ``report.fault`` refuses what is out of range.
    n_examples = int(min(max(weight, 0), 2**32 - 1))
    return Report(a.round, a.part, n_examples, max(int(n_tokens), 0), seconds, loss, slopes, head)
