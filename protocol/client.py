"""A client's side of a round: an assignment and examples in, a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.directions import Directions
from fwdllm.engine.estimators.plan import Probe
from fwdllm.engine.settings import EXACT_METHODS
from fwdllm.protocol.descent import descend
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.optimizers import OptimizerState
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.report import Report
from fwdllm.protocol.seeds import batch_indices
from fwdllm.protocol.space import HEAD, Layers, Space

if TYPE_CHECKING:
    from fwdllm.engine.data.jsonl import Example

# Rows of all lanes in one shared forward pass over several clients: enough to amortize decoding the
# weights, and a few hundred MB of activations at a width of 1,000.
_LANE_ROWS = 1 << 15

Examples: TypeAlias = "Sequence[Example]"

# An assignment and its tokenized batch.
_Work: TypeAlias = "tuple[Assignment, list[Tokens]]"


class ClientEngine(Protocol):
    """What a client needs from an engine; see ``fwdllm.engine.Engine``.

    adapter: an ``Adapter``; must not be None, although an ``Engine``'s may be.
    """

    @property
    def adapter(self) -> Any: ...

    def tokenize(self, example: Example, max_tokens: int | None) -> Tokens: ...

    def group_derivatives(
        self,
        batch: Batch,
        sizes: Sequence[int],
        seeds: np.ndarray,
        method: str = ...,
        epsilon: float = ...,
        directions: Directions | None = ...,
    ) -> list[Probe]: ...


def answer(
    engine: ClientEngine, space: Space, assignment: Assignment, examples: Examples
) -> Report:
    """The report of one client; its ``seconds`` is 0. Errors: DataError.

    The engine's adapter must equal the server's; it is restored before this returns.
    """
    return next(answer_all(engine, space, [assignment], lambda client: examples))


def answer_all(
    engine: ClientEngine,
    space: Space,
    assignments: Sequence[Assignment],
    examples_of: Callable[[int], Examples],
) -> Iterator[Report]:
    """Reports of many clients, in order, each bit for bit as if the client ran alone.

    examples_of: gives a client's examples.  Clients that upload scalars share forward passes.
    """
    if space.config.upload == "scalars":
        yield from _scalars(engine, space, assignments, examples_of)
        return
    for assignment in assignments:
        yield _local_training(engine, space, assignment, examples_of(assignment.client))


def _scalars(
    engine: ClientEngine,
    space: Space,
    assignments: Sequence[Assignment],
    examples_of: Callable[[int], Examples],
) -> Iterator[Report]:
    found: dict[int, Report] = {}
    # Lanes of a pass are the same for all: adaptive runs have clients with fewer perturbations.
    for layers, count in dict.fromkeys((a.layers, a.seeds.shape[1]) for a in assignments):
        members = [a for a in assignments if (a.layers, a.seeds.shape[1]) == (layers, count)]
        work = [(a, _batch(engine, space, a, examples_of(a.client), 0)) for a in members]
        for group in _groups(space.config, work, count):
            seeds = np.stack([a.seeds[0] for a, _ in group])
            probes = _probes(engine, space, layers, [batch for _, batch in group], seeds)
            for (assignment, batch), probe in zip(group, probes, strict=True):
                slopes, head = _slopes(space, probe, assignment.head_seeds[0])
                found[id(assignment)] = Report(
                    assignment.round,
                    assignment.part,
                    len(batch),
                    probe.n_tokens,
                    0.0,
                    probe.loss,
                    slopes[None],
                    head[None],
                )
    for assignment in assignments:
        yield found[id(assignment)]


def _local_training(
    engine: ClientEngine, space: Space, assignment: Assignment, examples: Examples
) -> Report:
    """Local steps on the client's scope from the server's adapter, which is restored after."""
    config, theta = space.config, engine.adapter.theta
    # Only steps that the server repeats have to be along seeds.
    takes_gradients = config.upload != "steps"
    before = theta.copy()
    optimizer = config.client_optimizer_config()
    state = OptimizerState.initial(optimizer, space.size)
    rate = config.client_learning_rate
    slopes, heads, losses = [], [], []
    n_examples = n_tokens = 0
    try:
        for step in range(config.local_steps):
            batch = _batch(engine, space, assignment, examples, step)
            seeds, head_seeds = _seeds_of_step(config, assignment, step)
            probe = _probes(engine, space, assignment.layers, [batch], seeds[None])[0]
            own, head = _slopes(space, probe, head_seeds)
            directions = space.directions(assignment.layers)
            gradient = np.zeros(space.size, np.float32)
            if takes_gradients and probe.gradient is not None:
                gradient[: space.n_coordinates] = directions.project(probe.gradient)
            else:
                space.add(gradient, assignment.layers, seeds, own / np.float32(len(seeds)))
            if takes_gradients and probe.head_gradient is not None:
                gradient[space.n_coordinates :] = probe.head_gradient
            elif len(head):
                shares = head / np.float32(len(head))
                space.add(gradient, HEAD, head_seeds, shares)
            descend(engine.adapter, directions, optimizer, state, gradient, rate, rate)
            slopes.append(own)
            heads.append(head)
            losses.append(probe.loss)
            n_examples += len(batch)
            n_tokens += probe.n_tokens
        moved = _coordinates(space, before) - _coordinates(space, theta)
    finally:
        theta[:] = before
    of_seeds, of_head, vector = np.stack(slopes), np.stack(heads), None
    if config.upload == "projection":
        of_seeds, of_head = _projection(space, moved, assignment)
    elif config.upload == "weights":
        of_seeds = of_head = np.zeros((0, 0), np.float32)
        vector = space.pack(moved, assignment.layers)
    return Report(
        assignment.round,
        assignment.part,
        n_examples,
        n_tokens,
        0.0,
        float(np.mean(losses)),
        of_seeds,
        of_head,
        vector,
    )


def _seeds_of_step(
    config: FederationConfig, assignment: Assignment, step: int
) -> tuple[np.ndarray, np.ndarray]:
    """The seeds whose slopes a local step measures; a projection's are for all steps together."""
    if config.upload == "projection":
        return assignment.seeds[0, :0], assignment.head_seeds[0, :0]
    return assignment.seeds[step], assignment.head_seeds[step]


def _projection(
    space: Space, moved: np.ndarray, assignment: Assignment
) -> tuple[np.ndarray, np.ndarray]:
    """moved . z(seed) for the seeds of the adapter and of the head: float32 [1, n] each."""
    of_seeds = space.dot(moved, assignment.layers, assignment.seeds[0])
    of_head = np.zeros(0)
    if space.adapter.n_head:
        of_head = space.dot(moved, HEAD, assignment.head_seeds[0])
    with np.errstate(over="ignore"):  # becomes infinite, which the server refuses
        return of_seeds[None].astype(np.float32), of_head[None].astype(np.float32)


def _coordinates(space: Space, theta: np.ndarray) -> np.ndarray:
    n_lora = space.adapter.n_lora
    return np.concatenate([space.directions(None).project(theta[:n_lora]), theta[n_lora:]])


def _batch(
    engine: ClientEngine, space: Space, assignment: Assignment, examples: Examples, step: int
) -> list[Tokens]:
    """The tokenized batch of a client's local step."""
    config: FederationConfig = space.config
    at = assignment.first_step + step
    chosen = batch_indices(assignment.batch_seed, at, len(examples), config.batch_size)
    return [engine.tokenize(examples[i], config.max_tokens) for i in chosen]


def _groups(
    config: FederationConfig, work: Sequence[_Work], perturbations: int
) -> Iterator[list[_Work]]:
    """Clients whose batches go through the model together."""
    lanes = 1 + perturbations * (2 if config.method == "central" else 1)
    # An exact gradient is a client's own: together they save nothing, and all need memory at once.
    most = 0 if config.method in EXACT_METHODS else _LANE_ROWS
    group: list[_Work] = []
    rows = 0
    for assignment, batch in work:
        mine = lanes * sum(len(tokens.ids) for tokens in batch)
        if group and rows + mine > most:
            yield group
            group, rows = [], 0
        group.append((assignment, batch))
        rows += mine
    if group:
        yield group


def _probes(
    engine: ClientEngine,
    space: Space,
    layers: Layers,
    batches: Sequence[list[Tokens]],
    seeds: np.ndarray,
) -> list[Probe]:
    config = space.config
    return engine.group_derivatives(
        pack([tokens for batch in batches for tokens in batch]),
        [len(batch) for batch in batches],
        seeds,
        config.method,
        config.epsilon,
        space.directions(layers),
    )


def _slopes(space: Space, probe: Probe, head_seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives along the probe's seeds and along head_seeds, as uploaded: float32."""
    head = np.zeros(0)
    if probe.head_gradient is not None:
        head = space.head_dot(probe.head_gradient, head_seeds)
    with np.errstate(over="ignore"):  # becomes infinite, which the server refuses
        return probe.derivative.astype(np.float32), head.astype(np.float32)
