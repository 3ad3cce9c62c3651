"""How a run stands: from its ledger, while a server has it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from cli_runs import Cli
from ledger_runs import N_CLIENTS, create, eventful, finish, message, reopen, some

from fwdllm.cli import federation_console
from fwdllm.federation.status import Evaluated, OpenPart, Seen, Status, status_of
from fwdllm.federation.summary import summarize
from fwdllm.protocol import wire
from fwdllm.protocol.figures import traffic
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.privacy import spent_epsilon
from fwdllm.protocol.replay import verify
from fwdllm.protocol.server import Server

START = 1.7e9


def look(folder: Path) -> Status:
    with Ledger(folder / NAME) as ledger:
        return status_of(ledger)


def run_rounds(server: Server, count: int, seconds: float = 30.0) -> None:
    """Rounds of which client 2 answers none, as a server's clock would tell of them."""
    for _ in range(count):
        now = START + seconds * server.round
        for a in server.open_part(range(N_CLIENTS), now):
            if some(a):
                assert server.receive(a.client, message(server, a), now + 1) is None
        server.close_part(now + 2)


def test_a_run_in_the_middle_of_a_round(tmp_path: Path) -> None:
    with create(tmp_path / NAME, rounds=40, per_round=4, quorum=0.1) as ledger:
        server = Server(ledger)
        for name in ("north", "south", "west"):
            ledger.client_of(name)
        run_rounds(server, 12)
        ledger.evaluated(10, 1.25, 0.5, 8)
        now = START + 1000
        asked = server.open_part(range(N_CLIENTS), now)
        answering = [a for a in asked if a.client != 2][:2]
        for i, a in enumerate(answering):
            assert server.receive(a.client, message(server, a), now + 5 + i) is None
        assert server.receive(answering[0].client, b"nonsense", now + 9) is not None
        assert server.receive(answering[0].client, b"nonsense!", now + 9) is not None
        server.left_out(asked[-1].client, 9, now + 9)

        found = look(tmp_path)  # the server has it open, and locked

        assert (found.rounds, found.rounds_of, found.simulated) == (12, 40, False)
        assert found.open_part == OpenPart(13, 1, 4, 2, now, now + 6)
        assert found.seconds_a_round == 30
        assert found.held_out == Evaluated(10, 1.25, 0.5)
        assert found.loss == 0.5
        assert found.epsilon is None
        assert found.rejected == {"malformed": 2, "version": 1}
        seen = {client.client: client for client in found.clients}
        assert sorted(seen) == list(range(N_CLIENTS))
        assert [seen[c].node for c in range(4)] == ["north", "south", "west", None]
        assert [c.client for c in found.clients if c.is_silent] == [2]
        assert (seen[2].answers, seen[2].last_round, seen[2].answered_lately) == (0, None, 0)
        assert seen[answering[0].client].last_round == 13
        assert sum(c.answers for c in found.clients) == 2 + sum(
            r.n_accepted for r in summarize(ledger)
        )
        assert sum(c.asked_lately for c in found.clients) == 12 * 4

        by_round = traffic(ledger)
        assert found.bytes_down == sum(row[2] for row in by_round)
        assert found.bytes_up == sum(row[3] for row in by_round)
        assert found.bytes_down_a_round == sum(row[2] for row in by_round[2:12]) / 10
        assert found.bytes_up_a_round == sum(row[3] for row in by_round[2:12]) / 10
        assert traffic(ledger, 11) == by_round[11:]
        # The server goes on as if nobody had looked.
        server.close_part(now + 20)
        finish(server, some)
        verify(ledger)
    assert look(tmp_path).rounds == 40


def test_one_long_round_does_not_change_the_time_of_a_round(tmp_path: Path) -> None:
    with create(tmp_path / NAME, rounds=40) as ledger:
        server = Server(ledger)
        run_rounds(server, 30)
        ledger.query("UPDATE round SET closed = closed + 86400 WHERE round = 29")
        assert status_of(ledger).seconds_a_round == 30
        # Nor do those at its beginning: here ten minutes each.
        ledger.query("UPDATE round SET closed = closed - 570 * (19 - round) WHERE round < 19")
        assert status_of(ledger).seconds_a_round == 30


def test_a_run_that_has_just_begun(tmp_path: Path, fwdllm: Cli) -> None:
    with create(tmp_path / NAME) as ledger:
        found = status_of(ledger)
        assert (found.rounds, found.open_part, found.clients) == (0, None, ())
        assert (found.loss, found.held_out, found.seconds_a_round) == (None, None, None)
        assert (found.bytes_up, found.bytes_down, found.bytes_up_a_round) == (0, 0, 0.0)
        assert "0 of 4" in fwdllm("federate", "status", tmp_path).out


def test_epsilon_is_that_of_all_parts_so_far(tmp_path: Path) -> None:
    changes = {"seeds": "shared", "sigma": 0.5, "weighted": False, "optimizer": "sgd"}
    with create(tmp_path / NAME, **changes) as ledger:
        server = Server(ledger)
        run_rounds(server, 2)
        server.open_part(range(N_CLIENTS), START)
        assert status_of(ledger).epsilon == spent_epsilon(server.config, [N_CLIENTS] * 3)


def test_values_out_of_range_are_counted_as_such(tmp_path: Path) -> None:
    reasons = (
        "a loss of 1e+30 is beyond 10000",
        "a weight is not finite",
        "late",
        "late",
        "replayed",
    )
    with create(tmp_path / NAME) as ledger:
        for i, reason in enumerate(reasons):
            ledger.reject(0, 0, i, START, reason, 10)
        found = status_of(ledger)
    assert found.rejected == {"late": 2, "out of range": 2, "replayed": 1}
    assert found.bytes_up == 50


def test_nothing_is_verified_and_nothing_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Either takes minutes of a long run."""
    eventful(tmp_path / NAME)

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(wire, "_Reader", fail)
    monkeypatch.setattr(Ledger, "chain", fail)
    monkeypatch.setattr(Ledger, "check_file", fail)
    assert look(tmp_path).rounds == 3


def test_a_run_of_an_older_version(tmp_path: Path) -> None:
    script = Path(__file__).with_name("old_ledger.sql").read_text(encoding="utf-8")
    with closing(sqlite3.connect(tmp_path / NAME)) as db:
        db.executescript(script)
    found = look(tmp_path)
    assert found.rounds == 2
    assert found.open_part is not None


def test_the_command(tmp_path: Path, fwdllm: Cli) -> None:
    with create(tmp_path / NAME, rounds=40, per_round=4, quorum=0.1) as ledger:
        server = Server(ledger)
        ledger.client_of("north")
        run_rounds(server, 12)
        server.open_part(range(N_CLIENTS), START)
        ledger.reject(12, 0, 5, START, "late", 10)
        ledger.evaluated(10, 1.25, 0.5, 8)
        done = fwdllm("federate", "status", tmp_path)
        assert (done.code, done.err) == (0, "")
        words = " ".join(done.out.split())
        for told in (
            "12 of 40, about 14 min to go",
            "part 1, asked",
            "days ago 0 of 4 have answered",
            "30 s (median of the last 10)",
            "6 seen; 5 of 6 asked in the last 12 rounds have answered",
            "client 2: 0 of 8 answers accepted, none before",
            "rejected 1 late",
            "loss 1.2500, 50.0%, after round 10",
        ):
            assert told in words, words
        as_json = fwdllm("federate", "status", tmp_path, "--json").json
        assert as_json == {**asdict(look(tmp_path)), "clients": as_json["clients"]}
        assert Seen(**as_json["clients"][0]) == look(tmp_path).clients[0]
    assert fwdllm("federate", "status", tmp_path / "nowhere").code == 2
    both = fwdllm("federate", "status", tmp_path, "--json", "--watch")
    assert both.code == 2
    assert len(both.err.splitlines()) == 1


def test_times_of_a_simulation_are_its_own(tmp_path: Path, fwdllm: Cli) -> None:
    with create(tmp_path / NAME) as ledger:
        Server(ledger).open_part(range(N_CLIENTS), 1234.0)
    with closing(sqlite3.connect(tmp_path / NAME)) as db, db:
        db.execute('UPDATE meta SET json = replace(json, \'"toy"\', \'"toy", "fleet": {}\')')
    assert look(tmp_path).simulated
    assert "asked at 1,234 s" in fwdllm("federate", "status", tmp_path).out


def test_watching_shows_what_is_written_meanwhile(
    tmp_path: Path, fwdllm: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    create(tmp_path / NAME).close()
    looks: list[float] = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            raise KeyboardInterrupt
        with reopen(tmp_path / NAME) as ledger:  # it is not held while one waits
            run_rounds(Server(ledger), 1)

    clock: Any = type("Clock", (), {"sleep": staticmethod(sleep)})
    monkeypatch.setattr(federation_console, "time", clock)
    done = fwdllm("federate", "status", tmp_path, "--watch")
    assert done.code == 0
    assert looks == [5.0, 5.0]
    assert "1 of 4" in done.out
