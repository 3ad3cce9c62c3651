"""The tables of a ledger; those of its journal are in ``protocol.journal``."""

from __future__ import annotations

SCHEMA = """
CREATE TABLE meta (id INTEGER PRIMARY KEY CHECK (id = 0), json TEXT NOT NULL);
CREATE TABLE node (name TEXT PRIMARY KEY, client INTEGER NOT NULL UNIQUE);
CREATE TABLE part (
    round INTEGER, part INTEGER, opened REAL NOT NULL, n_available INTEGER NOT NULL,
    PRIMARY KEY (round, part)
) WITHOUT ROWID;
CREATE TABLE assignment (
    round INTEGER, part INTEGER, client INTEGER, message BLOB NOT NULL, bytes_down INTEGER NOT NULL,
    PRIMARY KEY (round, part, client)
) WITHOUT ROWID;
CREATE TABLE contribution (
    round INTEGER, part INTEGER, client INTEGER, received REAL NOT NULL, message BLOB NOT NULL,
    PRIMARY KEY (round, part, client)
) WITHOUT ROWID;
CREATE INDEX contribution_of_client ON contribution (client, round);
CREATE TABLE rejection (
    id INTEGER PRIMARY KEY, round INTEGER, part INTEGER, client INTEGER, received REAL NOT NULL,
    reason TEXT NOT NULL, n_bytes INTEGER NOT NULL, UNIQUE (round, part, client, reason, n_bytes)
);
CREATE TABLE round (
    round INTEGER PRIMARY KEY, closed REAL NOT NULL, message BLOB, loss REAL,
    first_variance REAL, variance REAL, n_perturbations INTEGER NOT NULL,
    theta BLOB NOT NULL, snapshot BLOB, hash BLOB NOT NULL
);
CREATE TABLE snapshot (round INTEGER PRIMARY KEY, state BLOB NOT NULL);
CREATE TABLE evaluation (
    round INTEGER PRIMARY KEY, loss REAL NOT NULL, accuracy REAL, n_examples INTEGER NOT NULL
);
"""

# Columns of figures that some rows do not have.
OPTIONAL = {"message", "loss", "first_variance", "variance", "snapshot", "accuracy"}
