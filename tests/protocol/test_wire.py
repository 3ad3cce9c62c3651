"""Messages: the same after a round trip, and nothing but WireError for bytes that are none."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol import wire
from fwdllm.protocol.aggregate import Term
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.replica import Update
from fwdllm.protocol.report import Report
from fwdllm.protocol.shards.messages import Order, ShardSum
from fwdllm.protocol.space import HEAD
from fwdllm.protocol.wire import VersionError, WireError

U16, U32, U64 = 2**16 - 1, 2**32 - 1, 2**64 - 1
DECODERS: dict[str, Callable[[bytes], Any]] = {
    "an assignment": wire.decode_assignment,
    "a report": wire.decode_report,
    "an update": wire.decode_update,
    "a state": wire.decode_state,
    "a list of messages": wire.decode_many,
    "an order for a shard": wire.decode_order,
    "a batch of reports": wire.decode_batch,
    "a sum of a shard's": wire.decode_sum,
}
ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "an assignment": wire.encode_assignment,
    "a report": wire.encode_report,
    "an update": wire.encode_update,
    "a state": wire.encode_state,
    "a list of messages": wire.encode_many,
    "an order for a shard": wire.encode_order,
    "a batch of reports": lambda found: wire.encode_batch(*found),
    "a sum of a shard's": wire.encode_sum,
}
# The version and a kind, with which every message begins.
BEGINNINGS = [bytes([1, kind]) for kind in (1, 2, 3, 4, 5, 7, 8, 9)]


# Arrays of any bits, so that floats are NaN with payloads, infinite or denormal too.


@st.composite
def vectors(draw: st.DrawFn, dtype: str, size: int | None = None) -> np.ndarray:
    n = draw(st.integers(0, 5)) if size is None else size
    width = n * np.dtype(dtype).itemsize
    raw = draw(st.binary(min_size=width, max_size=width))
    return np.frombuffer(raw, dtype).copy()


@st.composite
def matrices(draw: st.DrawFn, dtype: str, rows: int | None = None) -> np.ndarray:
    n = draw(st.integers(0, 4)) if rows is None else rows
    columns = draw(st.integers(0, 4))
    return draw(vectors(dtype, n * columns)).reshape(n, columns)


def layers() -> st.SearchStrategy[tuple[int, ...] | None]:
    return st.none() | st.lists(st.integers(0, U16), max_size=4).map(tuple)


@st.composite
def assignments(draw: st.DrawFn) -> Assignment:
    return Assignment(
        draw(st.integers(0, U32)),
        draw(st.integers(0, U16)),
        draw(st.integers(0, 2**22 - 1)),
        draw(layers()),
        draw(matrices("<u8")),
        draw(matrices("<u8")),
        draw(st.integers(0, U64)),
        draw(st.integers(0, U32)),
    )


@st.composite
def reports(draw: st.DrawFn) -> Report:
    steps = draw(st.integers(0, 3))
    weights = None if steps else draw(vectors("<f4"))
    none = np.zeros((0, 0), np.float32)
    return Report(
        draw(st.integers(0, U32)),
        draw(st.integers(0, U16)),
        draw(st.integers(0, U32)),
        draw(st.integers(0, U32)),
        draw(st.floats(width=32)),
        draw(st.floats(width=32)),
        draw(matrices("<f4", steps)) if steps else none,
        draw(matrices("<f4", steps)) if steps else none,
        weights,
    )


@st.composite
def terms(draw: st.DrawFn) -> Term:
    n = draw(st.integers(0, 4))
    return Term(
        draw(st.integers(0, 1)),
        draw(layers()),
        draw(vectors("<u8", n)),
        draw(vectors("<f4", n)),
        draw(st.floats(min_value=0, exclude_min=True)),
    )


def updates() -> st.SearchStrategy[Update]:
    found = st.lists(terms(), max_size=3).map(tuple)
    heads = st.none() | st.integers(1, 5).flatmap(lambda n: vectors("<f4", n))
    return st.builds(Update, st.integers(0, U32), found, heads)


def states() -> st.SearchStrategy[dict[str, np.ndarray]]:
    dtypes = st.sampled_from(["<f4", "<f8", "<u8", "<i8"])
    vector = dtypes.flatmap(vectors)
    number = dtypes.flatmap(lambda dtype: vectors(dtype, 1)).map(lambda found: found[0].reshape(()))
    return st.dictionaries(st.text(max_size=9), vector | number, max_size=4)


def clients() -> st.SearchStrategy[np.ndarray]:
    numbers = st.lists(st.integers(0, U32), min_size=1, max_size=4, unique=True)
    return numbers.map(lambda found: np.array(sorted(found), np.uint32))


def shard_sums() -> st.SearchStrategy[ShardSum]:
    whole = st.integers(0, U32), st.integers(0, U16), st.integers(0, U32)
    return st.builds(ShardSum, *whole, st.binary(min_size=32, max_size=32), vectors("<u8"))


def messages() -> st.SearchStrategy[bytes]:
    return st.one_of(
        assignments().map(wire.encode_assignment),
        reports().map(wire.encode_report),
        updates().map(wire.encode_update),
        states().map(wire.encode_state),
        st.lists(st.binary(max_size=6), max_size=3).map(wire.encode_many),
        st.builds(Order, assignments(), clients()).map(wire.encode_order),
        st.tuples(clients(), st.binary(max_size=6)).map(
            lambda found: wire.encode_batch(found[0], found[1] * len(found[0]))
        ),
        shard_sums().map(wire.encode_sum),
    )


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    assert got.tobytes() == want.tobytes()


def decode_any(data: bytes) -> str | None:
    """What the bytes are a message of, None for nothing; any other error than WireError escapes."""
    found = []
    for name, decode in DECODERS.items():
        try:
            decode(data)
        except WireError:
            continue
        found.append(name)
    assert len(found) <= 1
    return found[0] if found else None


def assert_refused_or_comes_back(data: bytes) -> None:
    """Bytes that are a message are those of no other: what they decode to encodes to them again."""
    name = decode_any(data)
    if name is None:
        return
    found = DECODERS[name](data)
    if name == "a state":
        assert_state_comes_back(found, data)
        return
    again = ENCODERS[name](found)
    if name == "a report" and np.isnan([found.seconds, found.loss]).any():
        # These two may come back as other NaNs.
        again, data = again[:16] + again[24:], data[:16] + data[24:]
    assert again == data


def assert_state_comes_back(state: dict[str, np.ndarray], data: bytes) -> None:
    """Its names and arrays do; all its bytes but the numbers of dimensions, which may be any."""
    if len(state) < data[2] or any("\ufffd" in name for name in state):
        return  # an array is named twice, or not in UTF-8
    sent = wire.encode_state(state)
    assert len(sent) == len(data)
    again = wire.decode_state(sent)
    assert list(again) == list(state)
    for name in state:
        assert_same(again[name], state[name])


# Round trips


@given(assignments())
def test_assignments_come_back_bit_for_bit(sent: Assignment) -> None:
    got = wire.decode_assignment(wire.encode_assignment(sent), sent.client)
    for name in ("round", "part", "client", "layers", "batch_seed", "first_step"):
        assert getattr(got, name) == getattr(sent, name)
    assert_same(got.seeds, sent.seeds)
    assert_same(got.head_seeds, sent.head_seeds)


@given(reports())
def test_reports_come_back_bit_for_bit(sent: Report) -> None:
    got = wire.decode_report(wire.encode_report(sent))
    for name in ("round", "part", "n_examples", "n_tokens"):
        assert getattr(got, name) == getattr(sent, name)
    np.testing.assert_array_equal([got.seconds, got.loss], [sent.seconds, sent.loss])
    assert_same(got.derivatives, sent.derivatives)
    assert_same(got.head_derivatives, sent.head_derivatives)
    if sent.vector is None:
        assert got.vector is None
    else:
        assert_same(got.vector, sent.vector)


@given(updates())
def test_updates_come_back_bit_for_bit(sent: Update) -> None:
    got = wire.decode_update(wire.encode_update(sent))
    assert got.round == sent.round
    assert got.vector is None
    if sent.head is None:
        assert got.head is None
    else:
        assert_same(got.head, sent.head)
    assert len(got.terms) == len(sent.terms)
    for a, b in zip(got.terms, sent.terms, strict=True):
        assert (a.half, a.layers, a.weight) == (b.half, b.layers, b.weight)
        assert_same(a.seeds, b.seeds)
        assert_same(a.coefficients, b.coefficients)


@given(states())
def test_states_come_back_bit_for_bit(sent: dict[str, np.ndarray]) -> None:
    got = wire.decode_state(wire.encode_state(sent))
    assert list(got) == list(sent)
    for name in sent:
        assert_same(got[name], sent[name])


@given(st.lists(st.binary(max_size=9), max_size=5))
def test_lists_of_messages_come_back(sent: list[bytes]) -> None:
    data = wire.encode_many(sent)
    assert wire.decode_many(data) == sent
    assert len(data) == 6 + sum(4 + len(message) for message in sent)


def test_what_is_decoded_can_be_written_to() -> None:
    report = wire.decode_report(SAMPLES["a report"])
    report.derivatives[:] = 0
    state = wire.decode_state(SAMPLES["a state"])
    state["theta"][:] = 0


@pytest.mark.parametrize("name", ["loss", "seconds"])
def test_a_loss_and_seconds_beyond_float32_travel_as_infinite(name: str) -> None:
    none = np.zeros((0, 0), np.float32)
    plain = Report(0, 0, 1, 1, 0.5, 0.25, none, none, np.zeros(1, np.float32))
    other = {"loss": "seconds", "seconds": "loss"}[name]
    for value in (1e300, -1e300):
        sent = replace(plain, **{name: value})
        got = wire.decode_report(wire.encode_report(sent))
        assert getattr(got, name) == np.sign(value) * np.inf
        assert getattr(got, other) == getattr(plain, other)


@pytest.mark.parametrize("n", [U32, U32 + 1, 2**70])
def test_more_tokens_than_fit_travel_as_the_most_that_do(n: int) -> None:
    none = np.zeros((0, 0), np.float32)
    sent = Report(0, 0, 1, n, 0.0, 0.0, none, none, np.zeros(1, np.float32))
    assert wire.decode_report(wire.encode_report(sent)).n_tokens == U32


# The format, written down a second time


def test_a_report_is_these_bytes() -> None:
    sent = Report(
        3, 2, 8, 99, 1.5, 0.25, np.array([[1, 2]], np.float32), np.array([[-4]], np.float32)
    )
    want = struct.pack("<BB", 1, 2) + struct.pack("<IHIIff", 3, 2, 8, 99, 1.5, 0.25)
    want += struct.pack("<HHH", 1, 2, 1) + struct.pack("<Ifff", 3, 1, 2, -4)
    assert wire.encode_report(sent) == want


def test_an_assignment_is_these_bytes() -> None:
    sent = Assignment(
        3, 2, 77, (1, 5), np.array([[U64], [6]], np.uint64), np.zeros((2, 0), np.uint64), 9, 4
    )
    want = struct.pack("<BB", 1, 1) + struct.pack("<IHQI", 3, 2, 9, 4)
    want += struct.pack("<HHH", 2, 1, 5)
    want += struct.pack("<IIIQQ", 2, 1, 2, U64, 6) + struct.pack("<III", 2, 0, 0)
    assert wire.encode_assignment(sent) == want


def test_an_update_is_these_bytes() -> None:
    numbers = np.array([7], np.uint64), np.array([0.5], np.float32)
    sent = Update(4, (Term(1, None, *numbers, 2.5),))
    term = struct.pack("<BdH", 1, 2.5, U16) + struct.pack("<IQ", 1, 7) + struct.pack("<If", 1, 0.5)
    assert wire.encode_update(sent) == struct.pack("<BBIHI", 1, 3, 4, 1, 0) + term
    dense = replace(sent, head=np.array([3, -4], np.float32))
    head = struct.pack("<BBIH", 1, 3, 4, 1) + struct.pack("<Iff", 2, 3, -4)
    assert wire.encode_update(dense) == head + term


def term_of(layers: tuple[int, ...] | None, n: int, half: int = 0) -> Term:
    return Term(half, layers, np.arange(n, dtype=np.uint64), np.ones(n, np.float32), 1.0)


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 2), (3, 1, 2)])
def test_an_update_has_the_smaller_form_of_its_head(sizes: tuple[int, ...]) -> None:
    """12 bytes of a seed are as much as 3 parameters; where both are the same seeds go."""
    n_seeds = sum(sizes)
    others = [term_of(None, 1000), term_of((2,), 3)]
    terms = [others[0], *(term_of(HEAD, n, i % 2) for i, n in enumerate(sizes)), others[1]]
    for n_head in range(max(1, 3 * n_seeds - 3), 3 * n_seeds + 4):
        gradient = np.arange(n_head + 7, dtype=np.float32)
        update = Update.of(4, terms, gradient, n_head)
        assert update.round == 4
        assert update.vector is None
        assert not update.empty
        if n_head >= 3 * n_seeds:
            assert update.terms == tuple(terms)
            assert update.head is None
            continue
        assert update.terms == tuple(others)
        assert update.head is not None
        np.testing.assert_array_equal(update.head, gradient[7:])
        assert update.head.dtype == np.float32
        assert not np.shares_memory(update.head, gradient)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 300))
def test_the_form_that_is_chosen_is_the_smaller_one_in_bytes(sizes: list[int], n_head: int) -> None:
    terms = [term_of(None, 3), *(term_of(HEAD, n) for n in sizes)]
    gradient = np.zeros(n_head + 7, np.float32)
    found = len(wire.encode_update(Update.of(0, terms, gradient, n_head)))
    as_terms = len(wire.encode_update(Update(0, tuple(terms))))
    dense = len(wire.encode_update(Update(0, tuple(terms[:1]), gradient[7:])))
    # A term has 19 bytes beside its seeds, which do not count.
    assert found <= min(as_terms, dense + 19 * len(sizes))


def test_an_update_without_a_head_has_its_terms() -> None:
    terms = [term_of(None, 1000), term_of((2,), 3)]
    update = Update.of(0, terms, np.zeros(7, np.float32), 0)
    assert update.terms == tuple(terms)
    assert update.head is None


def test_only_an_update_of_nothing_is_empty() -> None:
    some = np.ones(2, np.float32)
    assert Update(0).empty
    assert not Update(0, (term_of(None, 1),)).empty
    assert not Update(0, head=some).empty
    assert not Update(0, vector=some).empty


@given(st.integers(1, 9), st.integers(0, 9), st.integers(0, 9))
def test_report_size_is_the_size_of_a_report_of_scalars(steps: int, n: int, n_head: int) -> None:
    shapes = (steps, n), (steps, n_head)
    sent = Report(0, 0, 0, 0, 0, 0, *(np.zeros(shape, np.float32) for shape in shapes))
    assert wire.report_size((*shapes, 0)) == len(wire.encode_report(sent))


@given(st.integers(0, 99))
def test_report_size_is_the_size_of_a_report_of_weights(n: int) -> None:
    none = np.zeros((0, 0), np.float32)
    sent = Report(0, 0, 0, 0, 0, 0, none, none, np.zeros(n, np.float32))
    assert wire.report_size(((0, 0), (0, 0), n)) == len(wire.encode_report(sent))


def test_a_report_holds_as_many_head_perturbations_as_a_run_may_have() -> None:
    n_head = FederationConfig(rounds=1, head_perturbations=2**16 - 1).head_perturbations
    with pytest.raises(ConfigError):
        FederationConfig(rounds=1, head_perturbations=n_head + 1)
    numbers = np.zeros((1, 1), np.float32), np.ones((1, n_head), np.float32)
    got = wire.decode_report(wire.encode_report(Report(0, 0, 1, 1, 0.0, 0.0, *numbers)))
    assert_same(got.head_derivatives, numbers[1])


# What is refused

SAMPLES = {
    "an assignment": wire.encode_assignment(
        Assignment(1, 2, 3, (0, 4), np.ones((2, 3), np.uint64), np.ones((2, 1), np.uint64), 5, 6)
    ),
    "a report": wire.encode_report(
        Report(1, 2, 3, 4, 5.0, 6.0, np.ones((2, 3), np.float32), np.ones((2, 1), np.float32))
    ),
    "a report of weights": wire.encode_report(
        Report(
            *(1, 2, 3, 4, 5.0, 6.0),
            *(np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)),
            np.ones(4, np.float32),
        )
    ),
    "an update": wire.encode_update(
        Update(
            1,
            (
                Term(0, None, np.ones(2, np.uint64), np.ones(2, np.float32), 3.0),
                Term(1, (), np.ones(1, np.uint64), np.ones(1, np.float32), 3.0),
            ),
        )
    ),
    "an update with a head": wire.encode_update(
        Update(
            1,
            (Term(0, None, np.ones(2, np.uint64), np.ones(2, np.float32), 3.0),),
            np.ones(3, np.float32),
        )
    ),
    "a state": wire.encode_state({"round": np.array(3), "theta": np.ones(3, np.float32)}),
    "a list of messages": wire.encode_many([b"one", b"", b"three"]),
    "an order for a shard": wire.encode_order(
        Order(
            Assignment(1, 2, 0, None, np.ones((1, 2), np.uint64), np.ones((1, 1), np.uint64), 5, 6),
            np.arange(3, dtype=np.uint32),
        )
    ),
    "a batch of reports": wire.encode_batch(np.arange(3, dtype=np.uint32), bytes(12)),
    "a sum of a shard's": wire.encode_sum(ShardSum(1, 2, 3, bytes(32), np.ones(4, np.uint64))),
}

# Where in the samples the lengths of arrays, matrices and messages are, and how long those are.
LENGTHS = {
    "an assignment": {26: 2, 30: 3, 34: 6, 86: 2, 90: 1, 94: 2},
    "a report": {30: 8},
    "a report of weights": {30: 4},
    "an update": {8: 0, 23: 2, 43: 2, 66: 1, 78: 1},
    "an update with a head": {8: 3, 35: 2, 55: 2},
    "a state": {11: 1, 31: 3},
    "a list of messages": {2: 3, 6: 3, 13: 0, 17: 5},
    "an order for a shard": {2: 70, 28: 1, 32: 2, 36: 2, 56: 1, 60: 1, 64: 1, 76: 3},
    "a batch of reports": {2: 3, 18: 4},
    "a sum of a shard's": {44: 4},
}


def decoder(name: str) -> Callable[[bytes], Any]:
    return DECODERS[name.removesuffix(" of weights").removesuffix(" with a head")]


@pytest.mark.parametrize("name", SAMPLES)
def test_every_truncation_is_refused(name: str) -> None:
    for size in range(len(SAMPLES[name])):
        with pytest.raises(WireError):
            decoder(name)(SAMPLES[name][:size])


@pytest.mark.parametrize("name", SAMPLES)
def test_every_byte_more_is_refused(name: str) -> None:
    for byte in range(256):
        with pytest.raises(WireError):
            decoder(name)(SAMPLES[name] + bytes([byte]))


@given(messages(), st.data())
def test_truncations_and_extensions_of_any_message_are_no_messages(
    message: bytes, data: st.DataObject
) -> None:
    assert decode_any(message) is not None
    assert decode_any(message[: data.draw(st.integers(0, len(message) - 1))]) is None
    assert decode_any(message + data.draw(st.binary(min_size=1, max_size=9))) is None


def test_a_batch_has_reports() -> None:
    with pytest.raises(WireError, match="a batch has no reports"):
        wire.decode_batch(BEGINNINGS[6] + bytes(8))


@pytest.mark.parametrize("want", DECODERS)
@pytest.mark.parametrize("found", DECODERS)
def test_a_message_of_another_kind_is_named(want: str, found: str) -> None:
    if want == found:
        DECODERS[want](SAMPLES[found])
        return
    with pytest.raises(WireError, match=f"^a message is {found}, not {want}$"):
        DECODERS[want](SAMPLES[found])


@pytest.mark.parametrize("name", DECODERS)
def test_unknown_kinds_and_versions_are_named(name: str) -> None:
    sample = SAMPLES[name]
    with pytest.raises(WireError, match=f"^a message is of no known kind, not {name}$"):
        DECODERS[name](b"\x01\x63" + sample[2:])
    with pytest.raises(
        VersionError, match=r"^this fwdllm speaks version 1 .* is of version 2: update fwdllm here$"
    ):
        DECODERS[name](b"\x02" + sample[1:])


@pytest.mark.parametrize(
    "term",
    [
        Term(2, None, np.ones(1, np.uint64), np.ones(1, np.float32), 1.0),
        Term(0, None, np.ones(1, np.uint64), np.ones(2, np.float32), 1.0),
        Term(0, None, np.ones(1, np.uint64), np.ones(1, np.float32), 0.0),
        Term(0, None, np.ones(1, np.uint64), np.ones(1, np.float32), -1.0),
        Term(0, None, np.ones(1, np.uint64), np.ones(1, np.float32), np.nan),
    ],
    ids=["third half", "lengths differ", "no weight", "negative weight", "weight of nan"],
)
def test_terms_that_make_no_sense_are_refused(term: Term) -> None:
    with pytest.raises(WireError, match="makes no sense"):
        wire.decode_update(wire.encode_update(Update(0, (term,))))


def test_scalars_that_do_not_fill_their_matrices_are_refused() -> None:
    head = struct.pack("<BBIHIIff", 1, 2, 0, 0, 1, 1, 0.0, 0.0)
    for shape, n in [((1, 2, 1), 2), ((1, 2, 1), 4), ((U16, U16, U16), 0), ((1, 0, 0), 1)]:
        with pytest.raises(WireError):
            wire.decode_report(head + struct.pack("<HHHI", *shape, n) + bytes(4 * n))
    matrix = struct.pack("<BBIHQIH", 1, 1, 0, 0, 0, 0, U16)
    for rows, columns in [(1, 2), (0, 0), (U32, U32)]:
        with pytest.raises(WireError):
            wire.decode_assignment(
                matrix + struct.pack("<IIIQ", rows, columns, 1, 7) + struct.pack("<III", 0, 0, 0)
            )


def test_matrices_of_nothing_may_have_many_rows_or_columns() -> None:
    empty = struct.pack("<BBIHQIH", 1, 1, 0, 0, 0, 0, U16)
    for shape in [(U32, 0), (0, U32)]:
        got = wire.decode_assignment(empty + struct.pack("<III", *shape, 0) * 2)
        assert got.seeds.shape == got.head_seeds.shape == shape


def test_an_update_of_weights_is_not_sent() -> None:
    with pytest.raises(ValueError, match="weights"):
        wire.encode_update(Update(0, vector=np.zeros(3, np.float32)))


def test_only_states_are_states() -> None:
    for name, sample in SAMPLES.items():
        assert wire.is_state(sample) == (name == "a state")
    assert not wire.is_state(b"")
    assert not wire.is_state(b"\x01")


# Hostile bytes


def enormous(name: str, at: int, word: bytes) -> bytes:
    """A sample with four bytes of it replaced."""
    sample = SAMPLES[name]
    return sample[:at] + word + sample[at + 4 :]


# Mostly of few values, so that they are a message now and then.
any_byte = st.sampled_from(b"\0\0\0\0\1\2\xff") | st.integers(0, 255)
noise = st.lists(any_byte, max_size=80).map(bytes)
every_enormous = pytest.mark.parametrize(
    "word", [b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"]
)


@settings(max_examples=300)
@given(noise, messages(), st.integers(0, 1), st.integers(0, 255))
def test_bytes_that_do_not_begin_as_a_message_are_refused(
    random: bytes, message: bytes, at: int, byte: int
) -> None:
    for data in (random, message[:at] + bytes([byte]) + message[at + 1 :]):
        if data[:2] not in BEGINNINGS:
            assert decode_any(data) is None


@settings(max_examples=500)
@given(st.sampled_from(BEGINNINGS), noise)
@example(BEGINNINGS[0], bytes(42))
@example(BEGINNINGS[1], bytes(32))
@example(BEGINNINGS[2], bytes(10))
@example(BEGINNINGS[3], bytes(1))
@example(BEGINNINGS[4], bytes(4))
def test_random_bytes_behind_a_right_beginning_are_refused_or_come_back(
    beginning: bytes, data: bytes
) -> None:
    assert_refused_or_comes_back(beginning + data)


@settings(max_examples=500)
@given(messages(), st.lists(st.tuples(st.integers(0, 10**6), any_byte), max_size=4))
def test_changed_messages_are_refused_or_come_back(
    message: bytes, changes: list[tuple[int, int]]
) -> None:
    data = bytearray(message)
    for at, byte in changes:
        data[at % len(data)] = byte
    assert_refused_or_comes_back(bytes(data))


@pytest.mark.parametrize("name", SAMPLES)
@every_enormous
def test_enormous_lengths_are_refused(name: str, word: bytes) -> None:
    for at, length in LENGTHS[name].items():
        assert struct.unpack_from("<I", SAMPLES[name], at) == (length,)
        with pytest.raises(WireError):
            decoder(name)(enormous(name, at, word))


@pytest.mark.parametrize("name", SAMPLES)
@every_enormous
def test_enormous_numbers_anywhere_are_refused_or_come_back(name: str, word: bytes) -> None:
    for at in range(2, len(SAMPLES[name]) - 3):
        assert_refused_or_comes_back(enormous(name, at, word))
