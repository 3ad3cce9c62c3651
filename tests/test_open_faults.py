"""What the product does not do yet; each belongs into test_ledger.py once it does."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_ledger import (
    N_CLIENTS,
    RUNS,
    assert_as_new,
    change,
    create,
    finish,
    follow,
    message,
)

from fwdllm.protocol import wire
from fwdllm.protocol.ledger import Ledger, LedgerError
from fwdllm.protocol.replay import verify
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.server import Server


def test_a_round_that_is_missing_is_named_also_where_a_snapshot_was_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with create(path, rounds=3, snapshot_every=2) as ledger:
        finish(Server(ledger))
    change(path, "DELETE FROM round WHERE round = 1")
    with Ledger(path) as ledger, pytest.raises(LedgerError, match="round 2 is missing"):
        verify(ledger)


def test_a_ledger_cannot_be_in_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(LedgerError, match="cannot (write|lock)"):
        create(tmp_path / "no folder" / "ledger")


def test_a_private_round_for_which_nobody_is_there_can_be_followed(tmp_path: Path) -> None:
    with create(tmp_path / "ledger", **RUNS["private"], max_parts=1) as ledger:
        server = Server(ledger)
        client = Replica(server.config, ledger.meta.empty_adapter())
        while not server.done:
            server.open_part(range(N_CLIENTS if server.round % 2 else 0), 0.0)
            assert server.close_part(0.0) is not None
            follow(client, wire.encode_many([ledger.rounds()[-1].message or b""]))
            assert client.theta.tobytes() == server.replica.theta.tobytes()


def test_after_an_error_of_reading_a_server_is_where_a_new_one_would_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise LedgerError("the disk is gone")

    with create(tmp_path / "ledger") as ledger:
        server = Server(ledger)
        for a in server.open_part(range(N_CLIENTS), 0.0):
            server.receive(a.client, message(server, a), 1.0)
        with monkeypatch.context() as patched:
            patched.setattr(Ledger, "rounds", fail)
            with pytest.raises(LedgerError):
                server.close_part(0.0)
        assert_as_new(server)
        assert server.close_part(0.0) is not None
