"""Who does what in a part of a round: a pure function of the settings and the server's state.

All perturbations of a round are at the same state of the adapter. A round has one part, or several
if pacing wants more perturbations; clients are chosen again for each part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol.federation import MAX_CLIENTS, POOLS, FederationConfig
from fwdllm.protocol.load import deal_by_speed, known_or_slowest, spread
from fwdllm.protocol.pool import WeightedPool, pool_seeds
from fwdllm.protocol.seeds import client_keys, derive_seeds, head_seeds
from fwdllm.protocol.space import Layers, Space

# Seed indices reserved for each part: part p starts at p * 2^22. 64 parts fit a round's 2^28.
_PART_SEEDS = 1 << 22


@dataclass(frozen=True, eq=False)
class Assignment:
    """What one client is asked for in a part of a round.

    layers: its scope.  seeds: uint64 [seed_steps, its perturbations], of which all clients have
    the same number unless ``adaptive``.  head_seeds: uint64 [seed_steps, head_perturbations],
    without columns where there is no head.
    batch_seed, first_step: the batch of local step i is
    ``batch_indices(batch_seed, first_step + i, ...)`` of the client's own examples.
    """

    round: int
    part: int
    client: int
    layers: Layers
    seeds: np.ndarray
    head_seeds: np.ndarray
    batch_seed: int
    first_step: int


def plan_part(
    config: FederationConfig,
    space: Space,
    round: int,
    part: int,
    clients: Sequence[int],
    gradient: np.ndarray | None,
    asked: Mapping[int, int],
    secret: int,
    pass_seconds: Mapping[int, float] | None = None,
    pool: WeightedPool | None = None,
) -> list[Assignment]:
    """Assignments of a part, by client; none if no client is chosen.

    clients: numbers of the clients that can be asked, below 2^22.  gradient: of the last update,
    float32 [space.size], or None before the first update.  asked, secret: see ``choose``.
    pass_seconds: of the clients known, see ``speeds``; for ``adaptive`` alone.
    pool: what the updates so far told of a weighted pool, None of any other.
    """
    chosen = choose(config, round, part, clients, asked, secret)
    if not chosen:
        return []
    keys = client_keys(config.seed, round, max(chosen) + 1)
    scopes = deal(space.layers, len(chosen), round) if config.split else [None] * len(chosen)
    counts = [config.perturbations] * len(chosen)
    if config.adaptive:
        seconds = known_or_slowest(pass_seconds or {}, chosen)
        if config.split:
            scopes = deal_by_speed(scopes, seconds, [int(keys[client]) for client in chosen])
        counts = spread(space, scopes, seconds)
    seeds = _seeds(config, space, round, part, scopes, counts, gradient, pool)
    of_head = _head_seeds(config, space, round, part, len(chosen))
    first = part * config.local_steps
    return [
        Assignment(round, part, client, layers, own, head, int(keys[client]), first)
        for client, layers, own, head in zip(chosen, scopes, seeds, of_head, strict=True)
    ]


def choose(
    config: FederationConfig,
    round: int,
    part: int,
    clients: Sequence[int],
    asked: Mapping[int, int],
    secret: int,
) -> list[int]:
    """Clients of a part, ascending: per_round of them at random, those least asked first.

    asked: how often each client has been asked in this round.
    Under differential privacy each client takes part with probability per_round / len(clients), as
    the accountant assumes. The draw uses the seed ``secret``: nobody else may know who took part.
    """
    if not len(clients):
        return []
    numbers = np.sort(np.array(clients, np.int64))
    if not 0 <= numbers[0] <= numbers[-1] < MAX_CLIENTS:
        raise ConfigError(f"clients are numbered from 0 to {MAX_CLIENTS - 1}")
    n = int(numbers[-1]) + 1
    if config.sigma > 0:
        if config.per_round < len(numbers):
            limit = np.uint64(config.per_round / len(numbers) * 2.0**64)
            keys = client_keys(secret, round, n, part * MAX_CLIENTS)
            numbers = numbers[keys[numbers] < limit]
        return [int(client) for client in numbers]
    keys = client_keys(config.seed, round, n)
    times = np.zeros(n, np.int64)
    for client, count in asked.items():
        if client < n:
            times[client] = count
    order = np.lexsort((keys[numbers], times[numbers]))[: config.per_round]
    return [int(client) for client in numbers[np.sort(order)]]


def deal(layers: Sequence[int], n_clients: int, round: int) -> list[Layers]:
    """Scopes of clients that cover all layers (Spry, arXiv 2405.15551, section 3.1).

    Layers are dealt in turn: with fewer clients than layers, a client gets several layers; with
    more, several clients share a layer.
    """
    n = len(layers)
    if n_clients <= n:
        return [tuple(layers[i::n_clients]) for i in range(n_clients)]
    return [(layers[(i + round * n_clients) % n],) for i in range(n_clients)]


def shared_seeds(config: FederationConfig, round: int, part: int) -> np.ndarray:
    """The seeds common to all clients of a part: uint64 [seed_steps, perturbations]."""
    shape = (config.seed_steps, config.perturbations)
    drawn = derive_seeds(config.seed, round, shape[0] * shape[1], part * _PART_SEEDS)
    return drawn.reshape(shape)


def shared_head_seeds(config: FederationConfig, space: Space, round: int, part: int) -> np.ndarray:
    """As ``shared_seeds``, for a head: uint64 [seed_steps, head_perturbations or 0]."""
    shape = (config.seed_steps, config.head_perturbations if space.adapter.n_head else 0)
    drawn = head_seeds(config.seed, round, shape[0] * shape[1], part * _PART_SEEDS)
    return drawn.reshape(shape)


def _seeds(
    config: FederationConfig,
    space: Space,
    round: int,
    part: int,
    scopes: Sequence[Layers],
    counts: Sequence[int],
    gradient: np.ndarray | None,
    pool: WeightedPool | None,
) -> list[np.ndarray]:
    """Of each client uint64 [seed_steps, its count]."""
    steps, first = config.seed_steps, part * _PART_SEEDS
    n = steps * sum(counts)
    if (steps * counts[0] if config.seeds == "shared" else n * config.candidates) > _PART_SEEDS:
        raise ConfigError(f"a part of a round has at most {_PART_SEEDS} seeds and candidates")
    if config.seeds == "shared":
        return [shared_seeds(config, round, part)] * len(scopes)
    if config.seeds in POOLS:
        numbers = derive_seeds(config.seed, round + 1, n, first)
        if pool is None:
            drawn = pool_seeds(config)[numbers % np.uint64(config.pool_size)]
        else:
            drawn = pool.pick(numbers)
        return [own.reshape(steps, -1) for own in _shares(drawn, counts, steps)]
    m = config.candidates if gradient is not None else 1
    drawn = derive_seeds(config.seed, round, n * m, first)
    own = _shares(drawn, counts, steps * m)
    if gradient is not None and m > 1:
        own = _discriminate(space, own, [steps * count for count in counts], scopes, gradient)
    return [seeds.reshape(steps, -1) for seeds in own]


def _shares(drawn: np.ndarray, counts: Sequence[int], times: int) -> list[np.ndarray]:
    """Of each client, in turn, its next ``times * count`` seeds."""
    return np.split(drawn, np.cumsum(counts)[:-1] * times)


def _discriminate(
    space: Space,
    own: Sequence[np.ndarray],
    wanted: Sequence[int],
    scopes: Sequence[Layers],
    gradient: np.ndarray,
) -> list[np.ndarray]:
    """For each scope, keep the seeds whose directions fit the last gradient best.

    own, wanted: of each client its candidates, and how many it is to get.
    FwdLLM, section 3.3. All directions have about the same length, so dot products give the same
    order as cosines.
    """
    found: list[np.ndarray] = [np.empty(0)] * len(scopes)
    for layers in dict.fromkeys(scopes):
        members = [i for i, scope in enumerate(scopes) if scope == layers]
        seeds = np.concatenate([own[i] for i in members])
        best = seeds[np.argsort(-space.dot(gradient, layers, seeds), kind="stable")]
        # Seeds are dealt to clients in turn, best first, so that every client gets good ones.
        turns = np.concatenate([np.arange(wanted[i]) for i in members])
        owners = np.repeat(members, [wanted[i] for i in members])
        owners = owners[np.argsort(turns, kind="stable")]
        for i in members:
            found[i] = best[: len(owners)][owners == i]
    return found


def _head_seeds(
    config: FederationConfig, space: Space, round: int, part: int, n: int
) -> list[np.ndarray]:
    shape = (config.seed_steps, config.head_perturbations if space.adapter.n_head else 0)
    each, first = shape[0] * shape[1], part * _PART_SEEDS
    if each * (1 if config.seeds == "shared" else n) > _PART_SEEDS:
        raise ConfigError(f"a part of a round has at most {_PART_SEEDS} seeds of a head")
    if config.seeds == "shared":
        return [shared_head_seeds(config, space, round, part)] * n
    return list(head_seeds(config.seed, round, n * each, first).reshape(n, *shape))
