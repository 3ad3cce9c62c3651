"""Whether a report may be taken: the checks of a server and of a shard."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeAlias

from fwdllm.protocol import wire
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.load import most_perturbations
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.report import fault
from fwdllm.protocol.space import Space
from fwdllm.protocol.wire import WireError

# As ``report.expected_shapes`` gives them.
Shapes: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], int]"


class Record(Protocol):
    """What is known of who was asked and has answered; a ledger, for one."""

    def assignment(self, round: int, part: int, client: int) -> bytes | None:
        """The message of one assignment, if there is one."""

    def has_contribution(self, round: int, part: int, client: int) -> bool:
        """Whether a client's contribution has been accepted."""


def largest_report(config: FederationConfig, space: Space) -> int:
    """Size in bytes of the largest valid report."""
    if config.upload == "weights":
        return wire.report_size(((0, 0), (0, 0), space.size))
    slopes = config.seed_steps, most_perturbations(config)
    head = config.seed_steps, config.head_perturbations if space.adapter.n_head else 0
    return wire.report_size((slopes, head, 0))


def examine(
    config: FederationConfig,
    record: Record,
    here: tuple[int, int],
    is_open: bool,
    shapes_of: Callable[[Assignment], Shapes],
    most: int,
    client: int,
    data: bytes,
) -> tuple[str | None, int, int]:
    """Why a report is rejected, or None, and its round and part.

    Reports that cannot be decoded, were not asked for or came before: the round and part ``here``.
    here, is_open: the last part, and whether it takes answers.  shapes_of: of the answer to an
    assignment.  most: bytes of the largest report.
    """
    version = wire.version_of_report(data)
    if version is not None:
        return wire.why_left_out(version), *here
    if len(data) > most:
        return f"malformed: {len(data)} bytes instead of at most {most}", *here
    try:
        report = wire.decode_report(data)
    except WireError as error:
        return f"malformed: {error}", *here
    round, part = report.round, report.part
    message = record.assignment(round, part, client)
    if message is None:
        return "foreign: it was not asked for", *here
    if record.has_contribution(round, part, client):
        return "duplicate" if (round, part) == here else "replayed", *here
    if (round, part) != here or not is_open:
        return "late", round, part
    slopes, head, vector = shapes_of(wire.decode_assignment(message, client))
    shapes = report.derivatives.shape, report.head_derivatives.shape
    found = 0 if report.vector is None else report.vector.size
    if (*shapes, found) != (slopes, head, vector):
        return f"malformed: scalars {shapes[0]}, {shapes[1]}, {found} weights", round, part
    return fault(config, report), round, part
