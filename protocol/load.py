"""Load to match: with ``adaptive``, clients of a part are expected to take about equally long.

Work is counted in passes: one lane of a client's batches through all layers. How long a client
takes for one is known from its answers (``protocol.speeds``). A slow client gets fewer
perturbations and, where layers are split, later layers: those before the first perturbed one cost
a single lane.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

from fwdllm.engine.estimators.plan import n_lanes
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.space import Layers, Space

# A client gets at most this many times the run's perturbations, and at least this part of them. All
# clients count alike, so the noise of an update is that of the few directions of slow ones: at most
# this many times the usual. Of fast ones, more lanes would take memory for little.
_RANGE = 4


def most_perturbations(config: FederationConfig) -> int:
    """The most perturbations that a client can get for a batch."""
    return config.perturbations * (_RANGE if config.adaptive else 1)


def passes(space: Space, layers: Layers, perturbations: int) -> float:
    """The work of a client with ``perturbations`` directions in a scope, in passes.

    Layers are counted up to the last one with an adapter: a server does not know the model.
    """
    lanes = n_lanes(space.config.method, perturbations, plain=space.adapter.n_head > 0)
    n_layers = space.layers[-1] + 1
    before = (space.layers if layers is None else layers)[0]
    return (before + lanes * (n_layers - before)) / n_layers


def known_or_slowest(pass_seconds: Mapping[int, float], clients: Sequence[int]) -> list[float]:
    """Seconds of a pass for each client; who is not known yet may be as slow as any that is.

    The first answer tells more, and a part need not wait for it. All are 1 if nobody is known.
    """
    slowest = max(pass_seconds.values(), default=1.0)
    return [pass_seconds.get(client, slowest) for client in clients]


def deal_by_speed(
    scopes: Sequence[Layers], pass_seconds: Sequence[float], ties: Sequence[int]
) -> list[Layers]:
    """Scopes of the same sizes with the same layers in all, the last layers for the slowest client.

    scopes: of each client, as dealt without a look at it.  ties: numbers that order clients of the
    same speed.
    """
    layers = sorted(layer for scope in scopes for layer in scope or ())
    found: list[Layers] = [None] * len(scopes)
    at = 0
    for i in sorted(range(len(scopes)), key=lambda i: (pass_seconds[i], ties[i])):
        size = len(scopes[i] or ())
        found[i] = tuple(layers[at : at + size])
        at += size
    return found


def spread(space: Space, scopes: Sequence[Layers], pass_seconds: Sequence[float]) -> list[int]:
    """Perturbations of each client: as many in all as without ``adaptive``, the last done soonest.

    Everybody gets the least there may be, and each further one goes to the client that would be
    done first with it and has not got the most.
    """
    config = space.config
    least = -(-config.perturbations // _RANGE)  # rounded up
    counts = [least] * len(scopes)
    work = [(passes(space, layers, 1), passes(space, layers, 2)) for layers in scopes]

    def done_with_another(i: int) -> tuple[float, int]:
        one, two = work[i]
        return pass_seconds[i] * (one + counts[i] * (two - one)), i

    waiting = [done_with_another(i) for i in range(len(scopes))]
    heapq.heapify(waiting)
    for _ in range((config.perturbations - least) * len(scopes)):
        _, i = heapq.heappop(waiting)
        counts[i] += 1
        if counts[i] < most_perturbations(config):
            heapq.heappush(waiting, done_with_another(i))
    return counts
