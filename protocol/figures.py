"""Figures of a run for people to read, from its ledger."""

from __future__ import annotations

from fwdllm.protocol.ledger import Ledger


def traffic(ledger: Ledger) -> list[tuple[int, int, int, int]]:
    """For each round: the round, clients asked, bytes down, bytes up (rejected ones too)."""
    return ledger.query(
        "SELECT a.round, count(*), sum(a.bytes_down), coalesce(sum(length(c.message)), 0)"
        " + (SELECT coalesce(sum(n_bytes), 0) FROM rejection r WHERE r.round = a.round)"
        " FROM assignment a LEFT JOIN contribution c USING (round, part, client)"
        " GROUP BY a.round ORDER BY a.round"
    )


def traffic_by_client(ledger: Ledger) -> list[tuple[int, int, int, int, int]]:
    """For each client: the client, times asked, answers accepted, bytes down and bytes up."""
    return ledger.query(
        "SELECT a.client, count(*), count(c.message), sum(a.bytes_down),"
        " coalesce(sum(length(c.message)), 0)"
        " + (SELECT coalesce(sum(n_bytes), 0) FROM rejection r WHERE r.client = a.client)"
        " FROM assignment a LEFT JOIN contribution c USING (round, part, client)"
        " GROUP BY a.client ORDER BY a.client"
    )
