"""A client's side of secure aggregation."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment, shared_head_seeds, shared_seeds
from fwdllm.protocol.secure import masks
from fwdllm.protocol.secure.letters import Letter, SecureError, Stage
from fwdllm.protocol.secure.sums import threshold
from fwdllm.protocol.seeds import client_keys
from fwdllm.protocol.space import Space


@dataclass
class Member:
    """What a client has to remember from one message of a run to the next, secrets included.

    last: the last round and part of which it sent a vector; it takes part in later ones only, as
    the difference of two sums of one part could be a single client's vector.  client: its number.
    roster: public keys and commitments of all members.  shares: of the others' secrets.
    """

    last: tuple[int, int] = (-1, -1)
    client: int = -1
    here: tuple[int, int] = (-1, -1)
    expected: Stage = Stage.KEYS
    seal_secret: bytes = b""
    mask_secret: bytes = b""
    seed: bytes = b""
    roster: dict[int, bytes] = field(default_factory=dict)
    shares: dict[int, bytes] = field(default_factory=dict)

    @property
    def n_members(self) -> int:
        """Members of the part, known from the second stage on."""
        return len(self.roster)

    def answer(
        self,
        config: FederationConfig,
        letter: Letter,
        draw: Callable[[int], bytes],
        vector: np.ndarray | None = None,
        history: bytes = b"",
    ) -> Letter:
        """The answer to the server's letter.

        draw: so many bytes that nobody can guess.  vector: the client's, uint64 [n], at its stage;
        history: what it was told until then (``secure.history``).
        SecureError for a letter that is out of order or asks for what would give a vector away.
        """
        if letter.stage == Stage.KEYS:
            return self._keys(letter, draw)
        if (letter.round, letter.part) != self.here or letter.stage != self.expected:
            raise SecureError(
                f"a message of secure aggregation ({letter.stage.name.lower()}, round "
                f"{letter.round + 1}) is not the one that follows"
            )
        if letter.stage == Stage.SHARES:
            rows = self._sealed(config, letter.rows)
        elif letter.stage == Stage.VECTOR:
            assert vector is not None
            rows = {self.client: self._masked(config, letter.rows, vector, history)}
        else:
            return dataclasses.replace(letter, rows=self._opening(config, letter.rows))
        self.expected = Stage(letter.stage + 1)
        return dataclasses.replace(letter, rows=rows)

    def check(self, config: FederationConfig, space: Space, assignment: Assignment) -> None:
        """SecureError unless an assignment is the one that the run's settings give this part.

        Else a server could have the same scalars of a client in two sums, and know them by the
        difference.
        """
        if self.expected != Stage.VECTOR:
            raise SecureError("a vector is asked for out of turn, or of before this node's start")
        round, part = self.here
        a = assignment
        keys = client_keys(config.seed, round, self.client + 1)
        wanted = shared_seeds(config, round, part), shared_head_seeds(config, space, round, part)
        if not (
            (a.round, a.part, a.layers) == (round, part, None)
            and (a.batch_seed, a.first_step) == (int(keys[-1]), part * config.local_steps)
            and np.array_equal(a.seeds, wanted[0])
            and np.array_equal(a.head_seeds, wanted[1])
            and round < config.rounds
            and part < config.max_parts
        ):
            raise SecureError("the assignment is not the one of this part of the run")

    def _keys(self, letter: Letter, draw: Callable[[int], bytes]) -> Letter:
        here = letter.round, letter.part
        if here <= self.last:
            raise SecureError(f"this client is in a sum of round {letter.round + 1} already")
        if len(letter.rows) != 1:
            raise SecureError("an invitation to secure aggregation names one client")
        self.client, self.here, self.expected = next(iter(letter.rows)), here, Stage.SHARES
        self.roster, self.shares = {}, {}
        drawn = [draw(masks.SECRET) for _ in range(3)]
        self.seal_secret, self.mask_secret, self.seed = drawn
        keys = [masks.public_key(secret) for secret in drawn[:2]]
        row = b"".join([*keys, masks.commitment(self.seed)])
        return dataclasses.replace(letter, rows={self.client: row})

    def _sealed(self, config: FederationConfig, rows: Mapping[int, bytes]) -> dict[int, bytes]:
        """The secrets in shares, one of each sealed for every other member."""
        own = b"".join(
            [masks.public_key(self.seal_secret), masks.public_key(self.mask_secret)]
        ) + masks.commitment(self.seed)
        if rows.get(self.client) != own:
            raise SecureError("the server has changed this client's keys")
        if len({row[: masks.PUBLIC] for row in rows.values()}) < len(rows):
            raise SecureError("two clients have the same key")
        least = threshold(config, len(rows))
        if len(rows) < least:
            raise SecureError(f"{len(rows)} clients are too few for secure aggregation")
        self.roster = dict(sorted(rows.items()))
        parts = [masks.split(secret, least, len(rows)) for secret in (self.mask_secret, self.seed)]
        sealed = {}
        for i, client in enumerate(self.roster):
            shares = parts[0][i] + parts[1][i]
            if client == self.client:
                self.shares[client] = shares
            else:
                key, context = self._seal_key(client), self._context(self.client, client)
                sealed[client] = masks.seal(key, self.client, context, shares)
        return sealed

    def _masked(
        self,
        config: FederationConfig,
        rows: Mapping[int, bytes],
        vector: np.ndarray,
        history: bytes,
    ) -> bytes:
        """The vector with all masks: bytes [8 n]."""
        for sender, sealed in rows.items():
            if sender == self.client or sender not in self.roster:
                raise SecureError(f"shares of client {sender} are none of another member's")
            context = self._context(sender, self.client)
            self.shares[sender] = masks.unseal(self._seal_key(sender), sender, context, sealed)
        if len(self.shares) < threshold(config, self.n_members):
            raise SecureError(f"{len(self.shares)} clients are too few for secure aggregation")
        masked = vector + masks.own_mask(self.seed, len(vector))
        for other in self.shares:
            if other != self.client:
                public = mask_key_of(self.roster[other])
                key = masks.pair_key(self.mask_secret, public, history)
                masked = masked + masks.pair_mask(key, self.client, other, len(vector))
        self.last = self.here
        return masked.astype("<u8").tobytes()

    def _opening(self, config: FederationConfig, rows: Mapping[int, bytes]) -> dict[int, bytes]:
        """Of each who has sent a vector the share of its seed, of the others that of their key."""
        if len(rows) < threshold(config, self.n_members):
            raise SecureError(f"{len(rows)} clients are too few to know their sum")
        if not (self.client in rows and rows.keys() <= self.shares.keys()):
            raise SecureError("the sum is not one of this client's part")
        opened = {}
        for client, shares in self.shares.items():
            of_key, of_seed = shares[: masks.SECRET], shares[masks.SECRET :]
            opened[client] = of_seed if client in rows else of_key
        vars(self).update(vars(Member(last=self.last)))  # nothing is left that could open more
        return opened

    def _seal_key(self, other: int) -> bytes:
        return masks.agreed(self.seal_secret, self.roster[other][: masks.PUBLIC], "seal")

    def _context(self, sender: int, recipient: int) -> bytes:
        # With all keys: a server that shows its own in the place of some has them not opened.
        roster = hashlib.sha256(repr(list(self.roster.items())).encode()).hexdigest()
        return repr((*self.here, sender, recipient, roster)).encode()

    def to_bytes(self) -> bytes:
        """For the client's own memory; whoever has it can take its masks off."""
        fields = {name: _plain(value) for name, value in vars(self).items()}
        return json.dumps(fields).encode()

    @staticmethod
    def from_bytes(data: bytes | None) -> Member:
        """The inverse of ``to_bytes``; a new one for None."""
        if data is None:
            return Member()
        raw = json.loads(data)

        def table(name: str) -> dict[int, bytes]:
            return {int(client): bytes.fromhex(row) for client, row in raw[name].items()}

        return Member(
            last=tuple(raw["last"]),
            client=raw["client"],
            here=tuple(raw["here"]),
            expected=Stage(raw["expected"]),
            seal_secret=bytes.fromhex(raw["seal_secret"]),
            mask_secret=bytes.fromhex(raw["mask_secret"]),
            seed=bytes.fromhex(raw["seed"]),
            roster=table("roster"),
            shares=table("shares"),
        )


def mask_key_of(row: bytes) -> bytes:
    """The public key of masks in a row of the roster."""
    return row[masks.PUBLIC : 2 * masks.PUBLIC]


def commitment_of(row: bytes) -> bytes:
    """The seed's commitment in a row of the roster."""
    return row[2 * masks.PUBLIC :]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {client: row.hex() for client, row in value.items()}
    return value.hex() if isinstance(value, bytes) else value
