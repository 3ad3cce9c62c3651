"""Reports taken by several processes: the sums, the checks, kills, and what may have no shards."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ledger_runs import fast, make
from shard_runs import (
    N_CLIENTS,
    PACED,
    SHARED,
    Child,
    Run,
    answers,
    meta_of,
    plain,
    report_of,
    running,
)

from fwdllm.engine.errors import ConfigError
from fwdllm.federation.summary import summarize
from fwdllm.protocol import wire
from fwdllm.protocol.figures import answers_in_part
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.report import Report, fault, usable
from fwdllm.protocol.secure import sums
from fwdllm.protocol.seeds import client_keys
from fwdllm.protocol.server import Server
from fwdllm.protocol.shards.check import check_sums
from fwdllm.protocol.shards.messages import FIRST, shard_of
from fwdllm.protocol.shards.shard import Shard

# The same run


@pytest.mark.parametrize(
    "changes",
    [SHARED, PACED, {**PACED, "weighted": False, "optimizer": "sgd", "head_perturbations": 1}],
    ids=["shared", "paced", "unweighted"],
)
def test_any_number_of_shards_comes_to_the_same_bits_and_close_to_the_plain_server(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    want, rounds = plain(tmp_path, **changes)
    assert np.abs(want).max() > 0.05
    assert (max(closed.parts for closed in rounds) > 1) == bool(changes.get("pacing"))
    found = {}
    for n_shards in (1, 2, 3):
        with running(tmp_path / str(n_shards), n_shards, **changes) as run:
            closed = run.finish()
            theta = run.server.replica.theta
            found[n_shards] = theta.tobytes()
            # Scalars in units of 2^-24, one rounding of their means, then of the optimizer's steps.
            np.testing.assert_allclose(theta, want, rtol=1e-5, atol=1e-6)
            for one, other in zip(closed, rounds, strict=True):
                assert one == dataclasses.replace(
                    other, loss=one.loss, seconds=one.seconds, variance=one.variance
                )
                assert one.loss == pytest.approx(other.loss)
                assert one.seconds == pytest.approx(other.seconds)
                assert (one.variance is None) == (other.variance is None)
                assert (one.variance or 0) == pytest.approx(other.variance or 0, rel=1e-4)
            assert verify(run.ledger).rounds == 4
            assert replay(run.ledger).theta.tobytes() == found[n_shards]
            ledgers = [shard.ledger for shard in run.shards]
            assert check_sums(run.ledger, ledgers) == sum(c.n_accepted for c in closed)
            assert Server(run.ledger).replica.theta.tobytes() == found[n_shards]
            for summary, one in zip(summarize(run.ledger), closed, strict=True):
                assert (summary.n_asked, summary.n_accepted) == (one.n_asked, one.n_accepted)
                assert summary.client_seconds == pytest.approx(one.seconds)
            accepted = [answers_in_part(run.ledger, 0, p)[1] for p in range(closed[0].parts)]
            assert sum(accepted) == closed[0].n_accepted
    assert found[1] == found[2] == found[3]


def test_a_round_is_close_to_the_plain_servers_to_the_last_units(tmp_path: Path) -> None:
    """One step of sgd, so that it is the gradient which is compared."""
    changes = {"rounds": 1, "optimizer": "sgd", "learning_rate": 1.0, "schedule": "constant"}
    want, _ = plain(tmp_path, **changes)
    with running(tmp_path / "run", 2, **changes) as run:
        run.finish()
        np.testing.assert_allclose(run.server.replica.theta, want, rtol=1e-6, atol=2**-22)


def test_a_shard_gives_clients_the_assignments_of_the_plain_server(tmp_path: Path) -> None:
    with fast(Ledger.create(tmp_path / "plain.sqlite", meta_of(0))) as ledger:
        planned = Server(ledger).open_part(range(N_CLIENTS), 0.0)
    with running(tmp_path / "run", 3) as run:
        run.open()
        for a in planned:
            shard = run.shards[shard_of(a.client, 3)]
            assert shard.assignment(0, 0, a.client) == wire.encode_assignment(a)
        assert sum(len(shard.outstanding()) for shard in run.shards) == len(planned) == 30
        stranger = next(c for c in range(N_CLIENTS) if c not in {a.client for a in planned})
        assert run.shards[shard_of(stranger, 3)].assignment(0, 0, stranger) is None


# The same checks


# The nearest number of single precision is above it.
LIMIT = 10.3


def mutations(run: Run, old: dict[int, bytes]) -> list[tuple[int, bytes]]:
    """Reports of the open part, good ones among many that are not, in a random order."""
    rng = np.random.default_rng(run.server.round)
    found: list[tuple[int, bytes]] = []
    for client in [int(c) for c in run.shards[0].outstanding()]:
        honest = run.report(0, client)
        data = wire.encode_report(honest)

        def with_one(name: str, value: float, honest: Report = honest) -> Report:
            values = getattr(honest, name).copy()
            values[0, -1] = value
            return dataclasses.replace(honest, **{name: values})

        values = [np.nan, np.inf, 1e30, np.float32(LIMIT), np.nextafter(np.float32(LIMIT), 0)]
        odd = [with_one("derivatives", value) for value in values]
        odd += [with_one("head_derivatives", value) for value in values]
        odd += [dataclasses.replace(honest, loss=value) for value in (np.nan, LIMIT + 1, -np.inf)]
        odd += [dataclasses.replace(honest, seconds=value) for value in (np.nan, -1.0, np.inf)]
        odd += [dataclasses.replace(honest, n_examples=n) for n in (0, 9, 2**32 - 1)]
        odd += [dataclasses.replace(honest, round=honest.round + 1)]
        odd += [dataclasses.replace(honest, part=4)]
        odd += [dataclasses.replace(honest, derivatives=honest.derivatives[:, 1:])]
        flipped = [bytes([*data[:at], data[at] ^ 1, *data[at + 1 :]]) for at in range(34)]
        messages = [*map(wire.encode_report, odd), *flipped, data[:-1], data + b"\0", b"", data]
        sent = rng.choice(len(messages), 4)
        found += [(client, messages[i]) for i in sent] + [(client, data)] * (client % 3)
        found += [(stranger, data) for stranger in (int(rng.integers(N_CLIENTS)), 10**9)]
        found += [(10**9, old[client])] if client in old else []
        found += [(client, b"\2" + data[1:])] if client % 5 == 0 else []
        found += [(client, old[client])] if client in old else []
        old[client] = data
    return [found[i] for i in rng.permutation(len(found))]


def test_a_shard_accepts_and_rejects_what_the_plain_server_does(tmp_path: Path) -> None:
    changes = {"max_derivative": LIMIT, "rounds": 6, "learning_rate": 1e-3}
    old: dict[int, bytes] = {}
    reasons = set()
    with (
        running(tmp_path / "run", 1, **changes) as run,
        fast(Ledger.create(tmp_path / "plain.sqlite", meta_of(0, **changes))) as ledger,
    ):
        server = Server(ledger)
        while not server.done:
            run.open()
            server.open_part(range(N_CLIENTS), 0.0)
            sent = mutations(run, old)
            for piece in (sent[:20], sent[20:21], sent[21:]):
                found = run.shards[0].receive(*zip(*piece, strict=True), 1.0)  # type: ignore[arg-type]
                told = [server.receive(client, data, 1.0) for client, data in piece]
                want = {i: reason for i, reason in enumerate(told) if reason is not None}
                assert found == {
                    i: "late" if known(run, piece[i][1]) else reason for i, reason in want.items()
                }
                reasons.update(reason.split()[0] for reason in want.values())
            mine, theirs = run.shards[0].outstanding(), server.outstanding()
            assert mine.tolist() == theirs
            run.close()
            server.close_part(2.0)
            kept = ledger.contributions(server.round - 1, 0)
            assert summarize(run.ledger)[-1].n_accepted == len(kept)
        np.testing.assert_allclose(run.server.replica.theta, server.replica.theta, atol=1e-6)
    assert reasons >= {"malformed:", "foreign:", "duplicate", "late", "a", "9", "version:"}


def known(run: Run, data: bytes) -> bool:
    """Whether a message is a report of an earlier round, of which a shard knows no clients."""
    with contextlib.suppress(wire.WireError):
        return wire.decode_report(data).round < run.server.round
    return False


def test_many_reports_are_judged_as_one_is() -> None:
    config = make(max_derivative=LIMIT)
    good = Report(0, 0, 8, 9, 1.0, 2.0, np.full((1, 2), 9, np.float32), np.ones((1, 1), np.float32))
    above = np.float32(LIMIT)
    assert float(above) > LIMIT
    odd: list[dict[str, Any]] = [
        *({"n_examples": n} for n in (0, 9)),
        *({"seconds": x} for x in (-1.0, np.inf, np.nan)),
        *({"loss": x} for x in (float(above), -np.inf, np.nan)),
        *({"derivatives": np.array([[1, x]], np.float32)} for x in (above, -above, np.nan)),
        {"head_derivatives": np.array([[np.inf]], np.float32)},
    ]
    reports = [good, *(dataclasses.replace(good, **changes) for changes in odd)]
    told = [fault(config, report) is None for report in reports]
    assert told == [True] + [False] * len(odd)
    found = usable(
        config,
        np.array([r.n_examples for r in reports], np.uint32),
        np.array([r.seconds for r in reports], np.float32),
        np.array([r.loss for r in reports], np.float32),
        np.stack([np.append(r.derivatives, r.head_derivatives) for r in reports]),
    )
    assert found.tolist() == told


def test_a_batch_of_nothing_changes_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "run", 1) as run:
        with pytest.raises(ValueError, match="no order"):
            run.shards[0].receive([], [], 0.0)
        run.open()
        before = run.shards[0].outstanding().tolist()
        assert run.shards[0].receive([], [], 0.0) == {}
        assert run.shards[0].outstanding().tolist() == before


def test_reports_after_the_sum_are_late(tmp_path: Path) -> None:
    with running(tmp_path / "run", 1) as run:
        run.open()
        first, *_, last = (int(c) for c in run.shards[0].outstanding())
        run.take(0, [first])
        late = run.message(0, last)
        for again in (False, True):
            if again:
                run.reopen(0)
            told = run.shards[0].close(2.0)
            assert wire.decode_sum(told).n_clients == 1
            assert run.shards[0].receive([last], [late], 3.0) == {0: "late"}
            assert run.shards[0].close(4.0) == told


def test_only_the_next_order_is_taken(tmp_path: Path) -> None:
    with running(tmp_path / "run", 1) as run:
        run.open()
        (_, order), shard = run.server.open_shards(range(N_CLIENTS), 0.0)[0], run.shards[0]
        run.take(0, shard.outstanding()[:20].tolist())
        before = shard.outstanding().tolist()
        shard.open(order, 1.0)
        assert shard.outstanding().tolist() == before
        found = wire.decode_order(order)
        other = wire.encode_order(dataclasses.replace(found, clients=found.clients[1:]))
        with pytest.raises(ValueError, match="another order for round 1"):
            shard.open(other, 1.0)
        with pytest.raises(wire.WireError, match="not an order"):
            shard.open(run.message(0, before[0]), 1.0)
        for clients in (found.clients[:0], found.clients[::-1], found.clients[[0, 0]]):
            bad = wire.encode_order(dataclasses.replace(found, clients=clients))
            with pytest.raises(wire.WireError, match="no clients, or not in order"):
                shard.open(bad, 1.0)
        run.close()
        run.open()
        with pytest.raises(ValueError, match="another order for round 1"):
            shard.open(other, 1.0)


def test_a_shard_that_cannot_write_is_as_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(tmp_path / "run", 1) as run:
        run.open()
        clients = run.shards[0].outstanding().tolist()
        messages = [run.message(0, client) for client in clients]
        run.take(0, clients[:2])

        def fail(*_: object) -> None:
            raise LedgerError("the disk is gone")

        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "reject", fail)  # after the batch was accepted
            with pytest.raises(LedgerError, match="the disk is gone"):
                run.shards[0].receive(clients, messages, 1.0)
        assert run.shards[0].outstanding().tolist() == clients[2:]
        again = run.shards[0].receive(clients, messages, 1.0)
        assert again == {0: "duplicate", 1: "duplicate"}
        run.close()
        assert check_sums(run.ledger, [run.shards[0].ledger]) == len(clients)


# The root


def test_the_root_takes_a_sum_once_and_nothing_else(tmp_path: Path) -> None:
    with running(tmp_path / "run", 2, quorum=0.3) as run:
        run.open()
        for i in (0, 1):
            run.take(i, run.shards[i].outstanding().tolist())
        server, told = run.server, run.shards[0].close(1.0)
        found = wire.decode_sum(told)

        def refused(data: bytes, reason: str, shard: int = 0) -> None:
            got = server.receive_shard(shard, data, 1.0)
            assert got is not None
            assert got.startswith(reason), got
            assert (FIRST + shard, got) in [row[2:] for row in run.ledger.rejections()]

        def changed(**changes: Any) -> bytes:
            return wire.encode_sum(dataclasses.replace(found, **changes))

        def with_number(at: int, value: int) -> bytes:
            total = found.total.copy()
            total[at] = np.int64(value).astype(np.uint64)
            return changed(total=total)

        refused(told[:-1], "malformed: a message ends")
        refused(run.message(1, int(run.shards[1]._ordered().clients[0])), "malformed: a message is")
        refused(changed(total=found.total[1:]), "malformed: a sum of 10 numbers")
        refused(changed(round=1), "foreign")
        refused(told, "foreign", shard=2)
        refused(changed(n_clients=40), "40 clients are more than the")
        refused(changed(n_clients=0), "a sum of nothing")
        refused(with_number(0, 0), "0 examples are not of")
        refused(with_number(0, 2**40), "4294967295 examples are not between 1 and")
        refused(with_number(2, -1), "-")  # seconds
        refused(with_number(3, 2**60), "a loss of")
        refused(with_number(5, -(2**60)), "a derivative of")
        refused(with_number(10, 2**60), "a head derivative of")
        assert server.receive(0, run.message(0, int(run.shards[0]._ordered().clients[0])), 1.0) == (
            "foreign: this run takes sums alone"
        )
        assert server.receive_shard(0, told, 1.0) is None
        refused(told, "duplicate")
        assert [i for i, _ in server.open_shards(range(N_CLIENTS), 1.0)] == [1]
        late = run.shards[1].close(1.0)
        assert server.close_part(1.0) is not None
        refused(late, "late", shard=1)


def test_a_shard_that_is_gone_counts_as_clients_without_an_answer(tmp_path: Path) -> None:
    with running(tmp_path / "run", 3, quorum=0.6, max_parts=2) as run:
        run.open()
        asked = 0
        for i in (0, 1):
            clients = run.shards[i].outstanding().tolist()
            asked += len(clients)
            run.take(i, clients if i else clients[:2])
            run.server.receive_shard(i, run.shards[i].close(1.0), 1.0)
        assert asked < 30
        assert run.server.close_part(1.0) is None  # less than the quorum: another part
        assert run.server.outstanding() == [FIRST + 2]
        # A server made from the ledger is in the same part; the next one has other clients first.
        orders = run.server.open_shards(range(N_CLIENTS), 2.0)
        again = {int(c) for _, order in orders for c in wire.decode_order(order).clients}
        first = {int(c) for shard in run.shards for c in shard._ordered().clients}
        assert len(again - first) == N_CLIENTS - 30
        for i, order in orders:
            run.shards[i].open(order, 2.0)
            run.take(i, run.shards[i].outstanding().tolist())
        closed = run.close()
        assert closed is not None
        assert (closed.n_asked, closed.parts) == (60, 2)
        assert 30 < closed.n_accepted < 60
        assert replay(run.ledger).theta.tobytes() == run.server.replica.theta.tobytes()
        check_sums(run.ledger, [shard.ledger for shard in run.shards])


def test_a_shard_without_a_client_is_not_asked(tmp_path: Path) -> None:
    with running(tmp_path / "run", 8, per_round=2, rounds=2) as run:
        assert len(run.open()) == 2
        closed = run.finish()
        assert [one.n_asked for one in closed] == [2, 2]
        check_sums(run.ledger, [shard.ledger for shard in run.shards])


def test_a_round_without_an_answer_changes_nothing(tmp_path: Path) -> None:
    with running(tmp_path / "run", 2, rounds=1, max_parts=1) as run:
        run.open()
        closed = run.close()
        assert closed is not None
        assert not closed.moved
        assert (closed.n_asked, closed.n_accepted, closed.loss) == (30, 0, None)
        assert check_sums(run.ledger, [shard.ledger for shard in run.shards]) == 0


# Runs without shards


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"seeds": "own"}, "seeds=shared and upload=scalars"),
        ({"upload": "weights"}, "seeds=shared and upload=scalars"),
        ({"upload": "projection", "method": "backprop"}, "seeds=shared and upload=scalars"),
        ({"aggregate": "median"}, "median needs each client's scalars"),
        ({"aggregate": "trimmed"}, "trimmed needs each client's scalars"),
        ({"split": True}, "split deals them out"),
        ({"secure": True}, "secure runs have no shards"),
        ({"sigma": 1.0, "weighted": False}, "cannot give differential privacy"),
        ({"per_round": 4_000_000}, "no room for 4000000 clients"),
        ({"batch_size": 2**28, "max_derivative": 1e-9}, "no room for 30 clients"),
    ],
)
def test_what_sums_of_shards_do_not_give_is_refused(changes: dict[str, Any], sentence: str) -> None:
    meta_of(0, **changes)
    with pytest.raises(ConfigError, match=sentence):
        meta_of(2, **changes)


@pytest.mark.parametrize("n_shards", [-1, 1025])
def test_the_number_of_shards_is_bounded(n_shards: int) -> None:
    with pytest.raises(ConfigError, match="1 to 1024 shards"):
        meta_of(n_shards)


def test_a_ledger_without_shards_is_as_before() -> None:
    meta = meta_of(0)
    assert "shards" not in meta.to_json()
    assert Meta.from_json(meta.to_json()).shards == 0
    assert Meta.from_json(meta_of(3).to_json()).shards == 3
    assert meta_of(3).difference(meta_of(2)) == "shards is 2, but 3"


def test_a_plain_ledger_has_no_shard(tmp_path: Path) -> None:
    with (
        fast(Ledger.create(tmp_path / "plain.sqlite", meta_of(0))) as ledger,
        pytest.raises(LedgerError, match="not of a run with shards"),
    ):
        Shard(ledger)


def test_a_server_asks_either_clients_or_shards(tmp_path: Path) -> None:
    with (
        fast(Ledger.create(tmp_path / "plain.sqlite", meta_of(0))) as ledger,
        pytest.raises(ValueError, match="no shards"),
    ):
        Server(ledger).open_shards(range(N_CLIENTS), 0.0)
    with running(tmp_path / "run", 1) as run:
        with pytest.raises(ValueError, match="asked by its shards"):
            run.server.open_part(range(N_CLIENTS), 0.0)
        assert run.server.part == -1


def test_the_largest_figures_of_all_clients_fit_a_sum() -> None:
    config = meta_of(1, per_round=3_000_000, batch_size=8).config
    n = 2**22
    numbers = np.full(1, 2**32 - 1), np.full(1, 3e38), np.full(1, config.max_derivative)
    row = sums.vectors(config, np.full(1, 8), *numbers, np.full((1, 1), -config.max_derivative))
    exact = [int(number) * n for number in row.view(np.int64)[0]]
    assert all(abs(number) < 2**63 for number in exact[:3])
    assert all(abs(number) // n * config.per_round < 2**63 for number in exact)
    assert all(number > 0 for number in exact[:4])


# kill -9


MOMENTS = ("opened", "batch", "accepted", "closed")


def test_a_run_whose_shard_is_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    """Once in every round, each time at another moment; the second shard is the one."""
    with running(tmp_path / "whole", 2) as run:
        rounds = run.finish()
        want = run.server.replica.theta.tobytes()
    run = Run(tmp_path / "killed", 2)
    run.shards[1].ledger.close()
    for moment, whole in zip(MOMENTS, rounds, strict=True):
        orders = dict(run.server.open_shards(range(N_CLIENTS), 0.0))
        run.shards[0].open(orders[0], 0.0)
        run.take(0, [int(c) for c in run.shards[0].outstanding() if answers(int(c))])
        run.server.receive_shard(0, run.shards[0].close(2.0), 2.0)
        order = wire.decode_order(orders[1])
        sent = []
        for client in (int(c) for c in order.clients if answers(int(c))):
            key = int(client_keys(run.server.config.seed, run.server.round, 1, client)[0])
            a = dataclasses.replace(order.assignment, client=client, batch_seed=key)
            sent.append((client, wire.encode_report(report_of(run.server, a)).hex()))
        told, kept = None, 0
        for dies in (moment, ""):
            child = Child(run.paths[1], dies)
            if child.ask("open", orders[1].hex()) is not None:
                # The second batch has a report of the first.
                for batch in (sent[:6], sent[5:]):
                    refused = child.ask("receive", *zip(*batch, strict=True))
                    kept += 0 if refused is None or not dies else len(batch) - len(refused)
                    if refused is None:
                        break
                    if not dies:
                        duplicates = list(refused.values()).count("duplicate")
                        assert duplicates == len(refused)
                told = None if refused is None else child.ask("close")
            assert child.end() == (-signal.SIGKILL if dies else 0)
        assert told is not None
        expected = {"opened": 0, "batch": 6, "accepted": 6, "closed": len(sent)}
        assert kept == expected[moment]
        assert run.server.receive_shard(1, bytes.fromhex(told), 2.0) is None
        closed = run.server.close_part(2.0)
        assert closed == whole
    assert run.server.replica.theta.tobytes() == want
    with Ledger(run.paths[1]) as killed:
        verify(run.ledger)
        check_sums(run.ledger, [run.shards[0].ledger, killed])
    run.ledger.close()
    run.shards[0].ledger.close()
