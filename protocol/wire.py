"""Messages as bytes, for the network and for the ledger.

All numbers are little-endian. A message is a version (uint8), a kind (uint8) and the fields of that
kind in order; these two bytes, and the kinds' numbers, stay in every version. An array is its
length (uint32) and its elements. Missing or extra bytes are an error, so malformed messages are
refused before they are used. Floats are kept bit for bit.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from fwdllm.engine.errors import FwdllmError
from fwdllm.protocol.aggregate import Term
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.replica import Update
from fwdllm.protocol.report import Report
from fwdllm.protocol.secure.letters import Letter, Stage
from fwdllm.protocol.shards.messages import Order, ShardSum
from fwdllm.protocol.space import Layers

# Raised whenever the bytes of messages, or what they mean, change; and ``records.FORMAT`` with it.
VERSION = 1

_ASSIGNMENT, _REPORT, _UPDATE, _STATE, _MANY, _LETTER, _ORDER, _BATCH, _SUM = range(1, 10)
_KINDS = {
    _ASSIGNMENT: "an assignment",
    _REPORT: "a report",
    _UPDATE: "an update",
    _STATE: "a state",
    _MANY: "a list of messages",
    _LETTER: "a letter of secure aggregation",
    _ORDER: "an order for a shard",
    _BATCH: "a batch of reports",
    _SUM: "a sum of a shard's",
}

# In place of the number of layers: means all layers.
_ALL_LAYERS = 0xFFFF

_DTYPES: list[np.dtype] = [np.dtype("<f4"), np.dtype("<f8"), np.dtype("<u8"), np.dtype("<i8")]


class WireError(FwdllmError):
    """Bytes that are not a message of the kind expected."""


class VersionError(WireError):
    """A message of another version of the protocol. Its sentence is for who runs this program."""

    def __init__(self, version: int) -> None:
        advice = "update fwdllm here" if version > VERSION else "the sender has to update fwdllm"
        super().__init__(
            f"this fwdllm speaks version {VERSION} of the protocol, and the message is of version "
            f"{version}: {advice}"
        )


_SPEAKS = re.compile(r"this fwdllm speaks version (\d{1,3}) of the protocol")


def version_spoken(error: str) -> int | None:
    """The version of who has sent a VersionError's sentence, among other words; else None."""
    found = _SPEAKS.search(error)
    return int(found[1]) if found else None


def check_version(message: bytes) -> None:
    """Raise VersionError for a message of another version. Whether it is whole is not checked."""
    if message and message[0] != VERSION:
        raise VersionError(message[0])


def why_left_out(version: int) -> str:
    """Why a server does not use a client of another version, for the server's owner."""
    where = "there" if version < VERSION else "here"
    return (
        f"version: it speaks version {version} of the protocol, this server {VERSION}: update "
        f"fwdllm {where}"
    )


def version_of_report(data: bytes) -> int | None:
    """The version of a report of another version of the protocol; None for anything else."""
    is_report = len(data) > 1 and data[0] > 0 and data[1] == _REPORT
    return data[0] if is_report and data[0] != VERSION else None


def encode_assignment(assignment: Assignment) -> bytes:
    """An assignment as bytes; without the client number, as the receiver is the client."""
    a, out = assignment, _Writer(_ASSIGNMENT)
    out.put("IHQI", a.round, a.part, a.batch_seed, a.first_step)
    out.layers(a.layers)
    for seeds in (a.seeds, a.head_seeds):
        out.put("II", *seeds.shape)
        out.array(seeds.ravel(), "<u8")
    return out.done()


def decode_assignment(data: bytes, client: int = 0) -> Assignment:
    """The inverse of ``encode_assignment``. Errors: WireError."""
    into = _Reader(data, _ASSIGNMENT)
    round, part, batch_seed, first_step = into.take("IHQI")
    layers = into.layers()
    seeds, head_seeds = into.matrix("<u8"), into.matrix("<u8")
    into.end()
    return Assignment(round, part, client, layers, seeds, head_seeds, batch_seed, first_step)


def encode_report(report: Report) -> bytes:
    """A client's report as bytes: 34, and 4 for each scalar or weight."""
    r, out = report, _Writer(_REPORT)
    with np.errstate(over="ignore"):  # values beyond float32 become infinite and are refused
        seconds, loss = float(np.float32(r.seconds)), float(np.float32(r.loss))
    n_tokens = min(r.n_tokens, 2**32 - 1)
    out.put("IHIIff", r.round, r.part, r.n_examples, n_tokens, seconds, loss)
    out.put("HHH", len(r.derivatives), r.derivatives.shape[1], r.head_derivatives.shape[1])
    vector = np.zeros(0, np.float32) if r.vector is None else r.vector
    parts = (r.derivatives.ravel(), r.head_derivatives.ravel(), vector)
    out.array(np.concatenate(parts), "<f4")
    return out.done()


def decode_report(data: bytes) -> Report:
    """The inverse of ``encode_report``. Errors: WireError."""
    into = _Reader(data, _REPORT)
    round, part, n_examples, n_tokens, seconds, loss = into.take("IHIIff")
    steps, perturbations, head = into.take("HHH")
    values = into.array("<f4")
    into.end()
    first, second = steps * perturbations, steps * (perturbations + head)
    if len(values) < second or (steps and len(values) != second):
        raise WireError(f"a report has {len(values)} scalars instead of {second}")
    return Report(
        round,
        part,
        n_examples,
        n_tokens,
        seconds,
        loss,
        values[:first].reshape(steps, perturbations),
        values[first:second].reshape(steps, head),
        None if steps else values,
    )


def report_size(shapes: tuple[tuple[int, ...], tuple[int, ...], int]) -> int:
    """Size in bytes of an encoded report. shapes: see ``report.expected_shapes``."""
    slopes, head, vector = shapes
    return 34 + 4 * (slopes[0] * slopes[1] + head[0] * head[1] + vector)


def report_dtype(n_scalars: int) -> np.dtype:
    """The fields of reports with so many scalars, without gaps: many of them as one array."""
    fields = [("version", "u1"), ("kind", "u1"), ("round", "<u4"), ("part", "<u2")]
    fields += [("n_examples", "<u4"), ("n_tokens", "<u4"), ("seconds", "<f4"), ("loss", "<f4")]
    fields += [("steps", "<u2"), ("perturbations", "<u2"), ("head", "<u2"), ("count", "<u4")]
    return np.dtype([*fields, ("scalars", "<f4", (n_scalars,))])


def encode_update(update: Update) -> bytes:
    """An update as bytes: what a client needs to follow a round.

    ValueError for an update with a vector.
    """
    if update.vector is not None:
        raise ValueError("an update of weights is sent as the state it leads to")
    out = _Writer(_UPDATE)
    head = np.zeros(0, np.float32) if update.head is None else update.head
    out.put("IH", update.round, len(update.terms))
    out.array(head, "<f4")
    for term in update.terms:
        out.put("Bd", term.half, term.weight)
        out.layers(term.layers)
        out.array(term.seeds, "<u8")
        out.array(term.coefficients, "<f4")
    return out.done()


def decode_update(data: bytes) -> Update:
    """The inverse of ``encode_update``. Errors: WireError."""
    into = _Reader(data, _UPDATE)
    round, n_terms = into.take("IH")
    head = into.array("<f4")
    terms = []
    for _ in range(n_terms):
        half, weight = into.take("Bd")
        layers = into.layers()
        seeds, coefficients = into.array("<u8"), into.array("<f4")
        if half > 1 or len(seeds) != len(coefficients) or not weight > 0:
            raise WireError("an update has a term that makes no sense")
        terms.append(Term(half, layers, seeds, coefficients, weight))
    into.end()
    return Update(round, tuple(terms), head if len(head) else None)


def encode_state(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The arrays of ``Replica.to_arrays``, vectors and scalars, as bytes."""
    out = _Writer(_STATE)
    out.put("B", len(arrays))
    for name, array in arrays.items():
        raw = name.encode()
        dtype = next(i for i, d in enumerate(_DTYPES) if d == array.dtype)
        out.put("BBB", len(raw), dtype, array.ndim)
        out.raw(raw)
        out.array(array.ravel(), _DTYPES[dtype])
    return out.done()


def decode_state(data: bytes) -> dict[str, np.ndarray]:
    """The inverse of ``encode_state``. Errors: WireError."""
    into = _Reader(data, _STATE)
    arrays = {}
    for _ in range(into.take("B")[0]):
        length, dtype, ndim = into.take("BBB")
        name = into.raw(length).decode(errors="replace")
        if dtype >= len(_DTYPES):
            raise WireError(f"a state has an array of kind {dtype}")
        array = into.array(_DTYPES[dtype])
        if ndim == 0 and len(array) != 1:
            raise WireError(f"a state has {len(array)} numbers for {name}")
        arrays[name] = array if ndim else array[0]
    into.end()
    return {name: np.asarray(value) for name, value in arrays.items()}


def encode_many(messages: Sequence[bytes]) -> bytes:
    """Several messages in one; each takes 4 bytes more."""
    out = _Writer(_MANY)
    out.put("I", len(messages))
    for message in messages:
        out.put("I", len(message))
        out.raw(message)
    return out.done()


def decode_many(data: bytes) -> list[bytes]:
    """The inverse of ``encode_many``. Errors: WireError."""
    into = _Reader(data, _MANY)
    (count,) = into.take("I")
    messages = [into.raw(into.take("I")[0]) for _ in range(count)]
    into.end()
    return messages


def encode_letter(letter: Letter) -> bytes:
    """A letter as bytes: 17, and for each row 4 and its own."""
    out = _Writer(_LETTER)
    width = len(next(iter(letter.rows.values()), b""))
    out.put("IHBII", letter.round, letter.part, letter.stage, len(letter.rows), width)
    for client, row in letter.rows.items():
        out.put("I", client)
        out.raw(row)
    return out.done()


def decode_letter(data: bytes) -> Letter:
    """The inverse of ``encode_letter``. Errors: WireError."""
    into = _Reader(data, _LETTER)
    round, part, stage, count, width = into.take("IHBII")
    if stage not in list(Stage):
        raise WireError(f"a letter is of stage {stage}, which there is not")
    rows = [(into.take("I")[0], into.raw(width)) for _ in range(count)]
    into.end()
    if len(dict(rows)) < count:
        raise WireError("a letter names a client twice")
    return Letter(round, part, Stage(stage), dict(rows))


def encode_order(order: Order) -> bytes:
    """A shard's order as bytes: those of the assignment, and 4 for each client."""
    out, message = _Writer(_ORDER), encode_assignment(order.assignment)
    out.put("I", len(message))
    out.raw(message)
    out.array(order.clients, "<u4")
    return out.done()


def decode_order(data: bytes) -> Order:
    """The inverse of ``encode_order``. Errors: WireError."""
    into = _Reader(data, _ORDER)
    assignment = decode_assignment(into.raw(into.take("I")[0]))
    clients = into.array("<u4")
    into.end()
    if not len(clients) or (clients[1:] <= clients[:-1]).any():
        raise WireError("an order has no clients, or not in order")
    return Order(assignment, clients)


def encode_batch(clients: np.ndarray, reports: bytes) -> bytes:
    """Reports of the same size, one after another, and their clients: uint32 [n], n > 0."""
    out = _Writer(_BATCH)
    out.array(clients, "<u4")
    out.put("I", len(reports) // len(clients))
    out.raw(reports)
    return out.done()


def decode_batch(data: bytes) -> tuple[np.ndarray, bytes]:
    """The clients of a batch and their reports, one after another. Errors: WireError."""
    into = _Reader(data, _BATCH)
    clients = into.array("<u4")
    reports = into.raw(into.take("I")[0] * len(clients))
    into.end()
    if not len(clients):
        raise WireError("a batch has no reports")
    return clients, reports


def encode_sum(found: ShardSum) -> bytes:
    """A shard's sum as bytes: 48, and 8 for each number."""
    out = _Writer(_SUM)
    out.put("IHI", found.round, found.part, found.n_clients)
    out.raw(found.head)
    out.array(found.total, "<u8")
    return out.done()


def decode_sum(data: bytes) -> ShardSum:
    """The inverse of ``encode_sum``. Errors: WireError."""
    into = _Reader(data, _SUM)
    round, part, n_clients = into.take("IHI")
    head, total = into.raw(32), into.array("<u8")
    into.end()
    return ShardSum(round, part, n_clients, head, total)


def is_state(message: bytes) -> bool:
    """Whether a message is a state and not an update."""
    return message[1:2] == bytes([_STATE])


class _Writer:
    def __init__(self, kind: int) -> None:
        self._parts = [struct.pack("<BB", VERSION, kind)]

    def put(self, format: str, *values: float) -> None:
        self._parts.append(struct.pack("<" + format, *values))

    def raw(self, data: bytes) -> None:
        self._parts.append(data)

    def array(self, values: np.ndarray, dtype: DTypeLike) -> None:
        self.put("I", values.size)
        self.raw(np.ascontiguousarray(values, dtype).tobytes())

    def layers(self, layers: Layers) -> None:
        if layers is None:
            self.put("H", _ALL_LAYERS)
        else:
            self.put(f"H{len(layers)}H", len(layers), *layers)

    def done(self) -> bytes:
        return b"".join(self._parts)


class _Reader:
    def __init__(self, data: bytes, kind: int) -> None:
        self._data, self._at = data, 0
        check_version(data)
        _, found = self.take("BB")
        if found != kind:
            what = _KINDS.get(found, "of no known kind")
            raise WireError(f"a message is {what}, not {_KINDS[kind]}")

    def take(self, format: str) -> tuple[Any, ...]:
        size = struct.calcsize("<" + format)
        return struct.unpack("<" + format, self.raw(size))

    def raw(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise WireError(f"a message ends after {len(self._data)} bytes, too early")
        found = self._data[self._at : end]
        self._at = end
        return found

    def array(self, dtype: DTypeLike) -> np.ndarray:
        dtype = np.dtype(dtype)
        raw = self.raw(self.take("I")[0] * dtype.itemsize)
        return np.frombuffer(raw, dtype).astype(dtype.newbyteorder("="))

    def matrix(self, dtype: DTypeLike) -> np.ndarray:
        rows, columns = self.take("II")
        values = self.array(dtype)
        if values.size != rows * columns:
            raise WireError(f"a message has {values.size} numbers for {rows} x {columns}")
        return values.reshape(rows, columns)

    def layers(self) -> Layers:
        (count,) = self.take("H")
        return None if count == _ALL_LAYERS else self.take(f"{count}H")

    def end(self) -> None:
        if self._at != len(self._data):
            raise WireError(f"a message has {len(self._data) - self._at} bytes too many")
