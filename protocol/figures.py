"""Figures of a run for people to read, from its ledger; a sum is no client's answer."""

from __future__ import annotations

from fwdllm.protocol.federation import COHORT
from fwdllm.protocol.ledger import Ledger
from fwdllm.protocol.shards.root import n_accepted, n_asked


def traffic(ledger: Ledger, first: int = 0) -> list[tuple[int, int, int, int]]:
    """From round ``first`` on: the round, clients asked, bytes down, bytes up (rejected, too)."""
    return ledger.query(
        "SELECT a.round, count(*), sum(a.bytes_down), coalesce(sum(length(c.message)), 0)"
        " + (SELECT coalesce(sum(n_bytes), 0) FROM rejection r WHERE r.round = a.round)"
        " FROM assignment a LEFT JOIN contribution c USING (round, part, client)"
        " WHERE a.round >= ? GROUP BY a.round ORDER BY a.round",
        first,
    )


def traffic_by_client(ledger: Ledger) -> list[tuple[int, int, int, int, int]]:
    """For each client: the client, times asked, answers accepted, bytes down and bytes up.

    Of a run with shards nobody, as their ledgers have it.
    """
    return ledger.query(
        "SELECT a.client, count(*), count(c.message), sum(a.bytes_down),"
        " coalesce(sum(length(c.message)), 0)"
        " + (SELECT coalesce(sum(n_bytes), 0) FROM rejection r WHERE r.client = a.client)"
        " FROM assignment a LEFT JOIN contribution c USING (round, part, client)"
        " WHERE a.client < ? GROUP BY a.client ORDER BY a.client",
        COHORT,
    )


def bytes_in_all(ledger: Ledger) -> tuple[int, int]:
    """Bytes down and bytes up (rejected, too) of the run so far; reads all rows once."""
    down = ledger.query("SELECT sum(bytes_down) FROM assignment")[0][0]
    up = ledger.query(
        "SELECT (SELECT coalesce(sum(length(message)), 0) FROM contribution WHERE client < ?)"
        " + (SELECT coalesce(sum(n_bytes), 0) FROM rejection)",
        COHORT,
    )[0][0]
    return int(down or 0), int(up)


def answers_in_part(ledger: Ledger, round: int, part: int) -> tuple[int, int, float | None]:
    """Of a part: clients asked, answers accepted, when the last one came."""
    asked, answered = n_asked(ledger, round, part), n_accepted(ledger, round, part)
    return asked, answered, max(ledger.arrivals(round, part), default=None)


def last_answers(ledger: Ledger) -> list[tuple[int, str | None, int, int | None]]:
    """Of each client: its number, its node, answers accepted, the round of the last of them.

    All with an answer or a node are there, by number. node: None in a simulation.
    """
    answered = {
        client: (count, last)
        for client, count, last in ledger.query(
            "SELECT client, count(*), max(round) FROM contribution WHERE client < ?"
            " GROUP BY client",
            COHORT,
        )
    }
    nodes = dict(ledger.query("SELECT client, name FROM node"))
    return [
        (client, nodes.get(client), *answered.get(client, (0, None)))
        for client in sorted({*answered, *nodes})
    ]


def asked_and_answered(ledger: Ledger, first: int, end: int) -> list[tuple[int, int, int]]:
    """Of each client asked in rounds from ``first`` to before ``end``: times asked, answers."""
    return ledger.query(
        "SELECT a.client, count(*), count(c.message)"
        " FROM assignment a LEFT JOIN contribution c USING (round, part, client)"
        " WHERE a.round >= ? AND a.round < ? AND a.client < ? GROUP BY a.client",
        first,
        end,
        COHORT,
    )


def rejections_by_reason(ledger: Ledger) -> list[tuple[str, int]]:
    """How often each reason was given."""
    return ledger.query("SELECT reason, count(*) FROM rejection GROUP BY reason")
