"""Secure aggregation: sums, masks, drop-outs, and what neither side may be talked into."""

from __future__ import annotations

import dataclasses
import math
import random
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("Crypto", reason="PyCryptodome comes with fwdllm[federation]")
from ledger_runs import N_CLIENTS, contribution, create, path

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol import wire
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.figures import bytes_in_all, traffic
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.privacy import spent_epsilon
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.report import Report
from fwdllm.protocol.secure import masks, sums
from fwdllm.protocol.secure.cohort import Cohort
from fwdllm.protocol.secure.letters import Letter, SecureError, Stage
from fwdllm.protocol.secure.member import Member
from fwdllm.protocol.secure.noise import discrete_gaussian
from fwdllm.protocol.server import Server

__all__ = ["path"]  # a fixture

CONFIG = FederationConfig(4, per_round=6, seeds="shared", secure=True)
SIZE = 7
# What ledger_runs' clients do, seen in sums alone.
RUN = {"seeds": "shared", "per_round": N_CLIENTS, "secure": True}

Tamper = Callable[[int, Letter], Letter | None]


def honest(client: int, letter: Letter) -> Letter | None:
    return letter


class Part:
    """A part's clients, whose memory is bytes between messages, and the server's cohort."""

    def __init__(self, n: int, config: FederationConfig = CONFIG) -> None:
        self.config, self.cohort = config, Cohort(config, 0, 0, range(n), SIZE, b"")
        self.memory: dict[int, bytes | None] = dict.fromkeys(range(n))
        self.seen: list[bytes] = []

    def answer(self, client: int, letter: Letter) -> Letter:
        letter = wire.decode_letter(wire.encode_letter(letter))
        member = Member.from_bytes(self.memory[client])
        vector = vector_of(client) if letter.stage == Stage.VECTOR else None
        found = member.answer(self.config, letter, secrets.token_bytes, vector)
        self.memory[client] = member.to_bytes()
        return found

    def stage(self, down: Tamper = honest, up: Tamper = honest) -> dict[int, str | None]:
        """One stage; None from ``down`` or ``up`` is a letter that is lost."""
        reasons = {}
        for client, letter in self.cohort.letters().items():
            sent = down(client, letter)
            answer = None if sent is None else up(client, self.answer(client, sent))
            if answer is not None:
                self.seen.append(wire.encode_letter(answer))
                answer = wire.decode_letter(self.seen[-1])
                reasons[client] = self.cohort.take(client, answer)
        self.cohort.close()
        return reasons

    def finish(self, gone: dict[int, Stage] | None = None) -> None:
        """All stages left. gone: clients that leave, and from which stage on they are silent."""
        gone = gone or {}
        while not self.cohort.done:
            at = self.cohort.stage
            self.stage(up=lambda c, x, at=at: None if gone.get(c, 9) <= at else x)  # type: ignore[misc]


def vector_of(client: int) -> np.ndarray:
    return np.random.default_rng(client).integers(0, 2**64, SIZE, np.uint64)


def sum_of(clients: Any) -> list[int]:
    return [int(x) for x in np.sum([vector_of(c) for c in clients], axis=0, dtype=np.uint64)]


@settings(max_examples=12, deadline=None)
@given(st.integers(3, 8), st.dictionaries(st.integers(0, 7), st.sampled_from(Stage), max_size=2))
def test_the_sum_is_that_of_those_whose_vectors_came(n: int, gone: dict[int, Stage]) -> None:
    part = Part(n)
    left = [c for c in range(n) if gone.get(c, 9) > Stage.VECTOR]
    at_keys = [c for c in range(n) if gone.get(c, 9) > Stage.KEYS]
    too_few_keys = len(at_keys) < sums.threshold(CONFIG, n)
    openers = [c for c in range(n) if c not in gone]
    if too_few_keys or len(openers) < sums.threshold(CONFIG, len(at_keys)):
        with pytest.raises(SecureError, match="fewer than the"):
            part.finish(gone)
        return
    part.finish(gone)
    assert sorted(part.cohort.vectors) == left
    assert part.cohort.total.tolist() == sum_of(left)


def test_no_message_shows_a_vector() -> None:
    """Every number of a client's vector is under a mask, in everything the server receives."""
    part = Part(5)
    part.finish({3: Stage.OPENING})
    everything = b"".join(part.seen)
    for client in range(5):
        for value in vector_of(client):
            assert int(value).to_bytes(8, "little") not in everything
    # The masks are new in each part.
    again = Part(5)
    again.finish()
    assert all(again.cohort.vectors[c] != part.cohort.vectors[c] for c in range(5))


def test_too_few_are_not_added() -> None:
    for n in (1, 2):
        part = Part(n)
        with pytest.raises(SecureError, match="fewer than the 3"):
            part.finish()
    assert sums.threshold(CONFIG, 6) == 5
    assert sums.threshold(dataclasses.replace(CONFIG, quorum=0.9), 20) == 18


def at(stage: Stage, n: int = 5) -> Part:
    part = Part(n)
    while part.cohort.stage != stage:
        part.stage()
    return part


def test_a_client_is_not_talked_into_giving_a_vector_away() -> None:
    # Its keys replaced by the server's own, or one key for two clients.
    part = at(Stage.SHARES)
    rows = dict(part.cohort.letters()[0].rows)
    for changed, match in (
        ({**rows, 0: rows[1]}, "changed this client's keys"),
        ({**rows, 2: rows[1]}, "the same key"),
        ({c: rows[c] for c in (0, 1)}, "too few"),
    ):
        with pytest.raises(SecureError, match=match):
            part.answer(0, Letter(0, 0, Stage.SHARES, changed))
    # Shares that are another's, changed, or too few.
    part = at(Stage.VECTOR)
    rows = dict(part.cohort.letters()[0].rows)
    for changed, match in (
        ({**rows, 1: rows[2]}, "changed on its way"),
        ({**rows, 9: rows[2]}, "none of another member's"),
        ({1: rows[1]}, "too few"),
    ):
        with pytest.raises(SecureError, match=match):
            part.answer(0, Letter(0, 0, Stage.VECTOR, changed))
    # Sums of too few, without itself, or with a stranger.
    part = at(Stage.OPENING)
    for clients, match in (
        ((0, 1), "too few"),
        ((1, 2, 3, 4), "not one of this client's"),
        ((0, 1, 2, 9), "not one of this client's"),
    ):
        with pytest.raises(SecureError, match=match):
            part.answer(0, Letter(0, 0, Stage.OPENING, dict.fromkeys(clients, b"")))


def test_a_part_is_opened_once_and_in_order() -> None:
    part = at(Stage.OPENING)
    letters = part.cohort.letters()
    part.answer(0, letters[0])
    with pytest.raises(SecureError, match="not the one that follows"):
        part.answer(0, letters[0])
    with pytest.raises(SecureError, match="is in a sum of round 1 already"):
        part.answer(0, Letter(0, 0, Stage.KEYS, {0: b""}))
    part.answer(0, Letter(0, 1, Stage.KEYS, {0: b""}))  # the next part may begin
    with pytest.raises(SecureError, match="not the one that follows"):
        part.answer(0, Letter(0, 2, Stage.SHARES, {0: b""}))
    memory = part.memory[1]
    assert memory is not None
    part.answer(1, letters[1])
    kept = Member.from_bytes(part.memory[1])
    assert kept == Member(last=(0, 0))  # nothing is left that could open more
    assert Member.from_bytes(memory).to_bytes() == memory


def test_the_server_refuses_what_is_no_answer() -> None:
    part = at(Stage.VECTOR)
    good = part.answer(0, part.cohort.letters()[0])
    for bad, reason in (
        (dataclasses.replace(good, part=1), "late"),
        (dataclasses.replace(good, stage=Stage.SHARES), "late"),
        (dataclasses.replace(good, rows={0: bytes(8)}), "malformed: vector"),
        (dataclasses.replace(good, rows={1: good.rows[0]}), "malformed: vector"),
    ):
        assert (part.cohort.take(0, bad) or "").startswith(reason)
    assert part.cohort.take(0, good) is None
    assert part.cohort.take(0, good) == "foreign: it was not asked for"
    assert part.cohort.take(9, good) == "foreign: it was not asked for"


@pytest.mark.parametrize("dropped", [False, True])
def test_wrong_shares_are_no_sum(dropped: bool) -> None:
    """A client that opens with something else spoils the part, which is noticed."""
    part = at(Stage.VECTOR, 6)
    part.stage(up=lambda c, x: None if dropped and c == 5 else x)

    def change(client: int, letter: Letter) -> Letter:
        spoiled = 5 if dropped else 2
        rows = {c: bytes(16) if (client, c) == (0, spoiled) else r for c, r in letter.rows.items()}
        return dataclasses.replace(letter, rows=rows)

    with pytest.raises(SecureError, match="do not fit"):
        part.stage(up=change)


def test_shares_and_masks() -> None:
    secret = bytes(range(16))
    shares = masks.split(secret, 3, 5)
    for places in ((0, 1, 2), (4, 2, 0)):
        assert masks.combine([(i, shares[i]) for i in places]) == secret
    assert masks.combine([(i, shares[i]) for i in (0, 1)]) != secret
    a, b = bytes(16), bytes([1] * 16)
    key = masks.pair_key(a, masks.public_key(b), b"told")
    assert key == masks.pair_key(b, masks.public_key(a), b"told")
    assert key != masks.pair_key(b, masks.public_key(a), b"another")
    assert key != masks.agreed(b, masks.public_key(a), "seal")
    total = masks.pair_mask(key, 1, 2, 5) + masks.pair_mask(key, 2, 1, 5)
    assert not total.any()
    with pytest.raises(SecureError, match="none of X25519's"):
        masks.agreed(a, bytes(32), "seal")  # the point that makes every key the same


# Sums.


def assignment(config: FederationConfig, k: int = 3, head: int = 2) -> Assignment:
    seeds = np.arange(k + head, dtype=np.uint64)[None]
    return Assignment(0, 0, 0, None, seeds[:, :k], seeds[:, k:], 0, 0)


def report_of(rng: np.random.Generator, n_examples: int = 5) -> Report:
    slopes = rng.standard_normal((1, 3)).astype(np.float32)
    head = rng.standard_normal((1, 2)).astype(np.float32)
    return Report(0, 0, n_examples, 100, 1.5, 2.25, slopes, head)


@pytest.mark.parametrize("weighted", [False, True])
def test_a_sum_is_the_weighted_mean_to_the_last_units(weighted: bool) -> None:
    config, rng = dataclasses.replace(CONFIG, weighted=weighted), np.random.default_rng(0)
    reports = [report_of(rng, n) for n in (1, 4, 8)]
    total = np.zeros(9, np.uint64)
    for report in reports:
        total += sums.encode(config, report, 3, pytest.fail)  # type: ignore[arg-type]
    found = sums.decode(config, assignment(config), total, 3)
    weights = np.array([1, 4, 8] if weighted else [1, 1, 1])
    assert (found.n_examples, found.n_tokens, found.seconds) == (weights.sum(), 300, 4.5)
    for name in ("derivatives", "head_derivatives"):
        values = np.stack([getattr(r, name)[0] for r in reports]).astype(np.float64)
        want = weights @ values / weights.sum()
        np.testing.assert_allclose(getattr(found, name)[0], want, rtol=1e-6, atol=3 / sums.SCALE)
    assert found.loss == 2.25
    assert len(total) == sums.size(config, assignment(config))


def test_an_answer_that_would_be_refused_is_not_added() -> None:
    report = report_of(np.random.default_rng(0))
    sentences = set()
    for changes in (
        {"derivatives": np.full((1, 3), np.nan, np.float32)},
        {"head_derivatives": np.full((1, 2), 2e4, np.float32)},
        {"head_derivatives": np.full((1, 2), 3e4, np.float32)},
        {"loss": 2e4},
        {"n_examples": 10**6},
    ):
        with pytest.raises(ConfigError, match="cannot be added") as raised:
            sums.encode(CONFIG, dataclasses.replace(report, **changes), 3, pytest.fail)  # type: ignore[arg-type]
        sentences.add(str(raised.value))
    assert len(sentences) == 1  # the server gets it, and it tells nothing of the client's numbers


def test_noise_is_shared_and_the_clip_holds() -> None:
    """The sum's error has the variance that central noise has, times the members by threshold."""
    config = dataclasses.replace(
        CONFIG, sigma=2.0, clip=0.5, weighted=False, quorum=0.75, per_round=4
    )
    rng, below = np.random.default_rng(0), random.Random(0).randrange
    reports = [report_of(rng) for _ in range(4)]
    rows = np.stack([np.concatenate([r.derivatives[0], r.head_derivatives[0]]) for r in reports])
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    want = (rows * np.minimum(1, 0.5 / norms)).sum(0)
    errors = []
    for _ in range(400):
        total = np.zeros(5, np.uint64)
        for report in reports:
            total += sums.encode(config, report, 4, below)
        found = sums.decode(config, assignment(config), total, 4)
        assert math.isnan(found.loss)
        mean = np.concatenate([found.derivatives[0], found.head_derivatives[0]])
        errors.append(4 * mean - want)
    # Four shares, where three make up (sigma * clip)^2 = 1; 2,000 errors: 3% either side.
    assert np.var(errors) == pytest.approx(4 / 3, rel=0.12)
    assert abs(np.mean(errors)) < 0.1


def test_no_rounding_makes_a_vector_longer_than_the_clip() -> None:
    rng = np.random.default_rng(0)
    for clip in (1e-3, 0.5, 7.0):
        for _ in range(200):
            scalars = rng.standard_normal(5) * 10 ** rng.uniform(-4, 3)
            found = sums.clipped(scalars, clip)
            # In integers, as rounding of the sum could hide what is to be seen.
            assert sum(int(x) ** 2 for x in found) <= (clip * sums.SCALE) ** 2
            want = scalars * min(1, clip / np.linalg.norm(scalars))
            np.testing.assert_allclose(found / sums.SCALE, want, atol=1.001 / sums.SCALE)


@pytest.mark.parametrize("variance", [1, 3, 30])
def test_noise_has_the_discrete_gaussian_s_frequencies(variance: int) -> None:
    below, n = random.Random(variance).randrange, 20_000
    found = np.array([discrete_gaussian(variance, below) for _ in range(n)])
    support = np.arange(-60, 61)
    p = np.exp(-(support**2) / (2 * variance))
    p /= p.sum()
    counts = np.array([(found == x).sum() for x in support])
    keep = n * p > 5
    chi = float(((counts - n * p)[keep] ** 2 / (n * p)[keep]).sum())
    assert chi < keep.sum() + 4 * math.sqrt(2 * keep.sum())  # four deviations of chi squared
    assert counts.sum() == n


def test_epsilon_is_the_library_s_without_amplification() -> None:
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting import rdp

    config = dataclasses.replace(CONFIG, sigma=4.42, weighted=False)
    accountant = rdp.RdpAccountant()
    accountant.compose(dp.GaussianDpEvent(4.42), 48)
    wanted = accountant.get_epsilon(1e-5)
    assert spent_epsilon(config, []) == spent_epsilon(config, [0]) == 0
    # However many could have been asked: the server knows who was.
    for n in (6, 600):
        assert spent_epsilon(config, [n] * 48) == pytest.approx(wanted, rel=1e-9)
    # Central noise for everybody is the same; with chance it is less.
    central = dataclasses.replace(config, secure=False)
    assert spent_epsilon(central, [6] * 48) == pytest.approx(wanted, rel=1e-3)
    less = spent_epsilon(central, [600] * 48)
    assert less is not None
    assert less < wanted / 4


# Runs.


def run(ledger: Ledger, *, secure_sums: bool, leave: int | None = None) -> None:
    """Rounds with clients that answer by themselves or in sums; ``leave`` not in first parts."""
    server = Server(ledger)
    while not server.done:
        asked = server.open_part(range(N_CLIENTS), 0.0)
        staying = [a for a in asked if a.part or a.client != leave]
        reports = {a.client: contribution(server.replica, a) for a in staying}
        if not secure_sums:
            for client, report in reports.items():
                assert server.receive(client, wire.encode_report(report), 1.0) is None
        else:
            refused = server.receive(
                staying[0].client, wire.encode_report(reports[staying[0].client]), 1.0
            )
            assert refused == "foreign: this run takes sums alone"
            below = random.Random(server.round).randrange
            vectors = {
                client: sums.encode(server.config, report, len(staying), below)
                for client, report in reports.items()
            }
            total = np.sum(list(vectors.values()), axis=0, dtype=np.uint64)
            rows = {client: vector.tobytes() for client, vector in vectors.items()}
            assert server.receive_sum(rows, total, 1.0) is None
        closed = server.close_part(2.0)
        if closed is not None:
            n = closed.parts * N_CLIENTS - (0 if leave is None else 1)
            assert closed.n_accepted == n
            assert closed.n_perturbations == n * server.config.perturbations


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"weighted": False},
        # Two parts a round, of five clients and of six: each counts by its clients.
        {"weighted": False, "pacing": True, "variance_threshold": 1e-9, "max_parts": 2},
    ],
)
def test_a_run_of_sums_is_the_plain_one_to_rounding_and_replays(
    path: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    plain, settings = tmp_path / "plain.sqlite", {**RUN, **changes}
    with (
        create(path, **settings) as ledger,
        create(plain, **{**settings, "secure": False}) as other,
    ):
        run(ledger, secure_sums=True, leave=2)
        run(other, secure_sums=False, leave=2)
        mine, theirs = Server(ledger).replica.theta, Server(other).replica.theta
        assert np.abs(theirs).max() > 0
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-6)
        assert replay(ledger).theta.tobytes() == mine.tobytes()
        verify(ledger)
        losses = [[r.loss for r in record.rounds()] for record in (ledger, other)]
        np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_private_run_of_sums_has_no_loss_and_replays(path: Path) -> None:
    with create(path, **RUN, sigma=0.5, weighted=False) as ledger:
        run(ledger, secure_sums=True)
        assert all(r.loss is None for r in ledger.rounds())
        assert replay(ledger).theta.tobytes() == Server(ledger).replica.theta.tobytes()


def test_a_sum_that_no_honest_clients_make_is_rejected(path: Path) -> None:
    with create(path, **RUN) as ledger:
        server = Server(ledger)
        asked = server.open_part(range(N_CLIENTS), 0.0)
        size = sums.size(server.config, asked[0])
        huge, negative = np.full(size, 1 << 62, np.uint64), np.full(size, 1 << 63, np.uint64)
        one = np.full(size, 1 << 50, np.uint64)
        one[:3] = 1
        for total, match in ((huge, "examples"), (negative, "examples"), (one, "beyond")):
            reason = server.receive_sum({0: bytes(8 * size)}, total, 1.0)
            assert reason is not None
            assert match in reason
            assert ledger.rejections()[-1][3] == reason
        assert not ledger.contributions(0, 0)
        up = 3 * 8 * size  # the vectors came, whatever is made of them
        assert [row[3] for row in traffic(ledger)] == [bytes_in_all(ledger)[1]] == [up]
        with pytest.raises(ValueError, match="asked"):
            server.receive_sum({99: bytes(8 * size)}, huge, 1.0)


def test_settings_that_sums_cannot_have() -> None:
    for changes, match in (
        ({"seeds": "own"}, "needs shared seeds and the mean"),
        ({"aggregate": "median"}, "needs shared seeds and the mean"),
        ({"upload": "weights"}, "needs shared seeds and the mean"),
        ({"split": True}, "the same scope"),
        ({"per_round": 2}, "three clients a part"),
        ({"max_derivative": 1e12}, "no room"),
    ):
        with pytest.raises(ConfigError, match=match):
            dataclasses.replace(CONFIG, **changes)
