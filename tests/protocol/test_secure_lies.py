"""Secure aggregation against a server that tells each client another story."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping

import numpy as np
import pytest

pytest.importorskip("Crypto", reason="PyCryptodome comes with fwdllm[federation]")
from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import cpu
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.plan import Assignment, plan_part
from fwdllm.protocol.secure import masks
from fwdllm.protocol.secure.letters import Letter, SecureError, Stage
from fwdllm.protocol.secure.member import Member, mask_key_of
from fwdllm.protocol.secure.sums import threshold
from fwdllm.protocol.space import Space

CONFIG = FederationConfig(4, per_round=5, seeds="shared", secure=True)
N, SIZE = 5, 7
EVERYBODY = range(N)


class Clients:
    """Honest ones, and what a server asks each of them."""

    def __init__(self) -> None:
        self.members = [Member() for _ in EVERYBODY]

    def ask(self, client: int, stage: Stage, rows: Mapping[int, bytes]) -> dict[int, bytes]:
        letter = Letter(0, 0, stage, rows)
        vector = vector_of(client) if stage == Stage.VECTOR else None
        member = self.members[client]
        return dict(member.answer(CONFIG, letter, secrets.token_bytes, vector).rows)

    def keys(self) -> dict[int, bytes]:
        return {c: self.ask(c, Stage.KEYS, {c: b""})[c] for c in EVERYBODY}

    def sealed(self, keys: Mapping[int, bytes]) -> dict[int, dict[int, bytes]]:
        return {c: self.ask(c, Stage.SHARES, keys) for c in EVERYBODY}

    def masked(
        self, client: int, sealed: Mapping[int, Mapping[int, bytes]], senders: Iterable[int]
    ) -> np.ndarray:
        rows = {c: sealed[c][client] for c in senders if c != client}
        return np.frombuffer(self.ask(client, Stage.VECTOR, rows)[client], "<u8")


def vector_of(client: int) -> np.ndarray:
    return np.random.default_rng(client).integers(0, 2**64, SIZE, np.uint64)


def without(masked: np.ndarray, keys: Mapping[int, bytes], known: Mapping[int, bytes]) -> list[int]:
    """Client 0's vector without its masks with others. known: their secrets."""
    for other, secret in known.items():
        key = masks.pair_key(secret, mask_key_of(keys[0]), b"")
        masked = masked - masks.pair_mask(key, 0, other, SIZE)
    return [int(x) for x in masked]


def test_no_vector_is_alone_whoever_is_said_to_have_left() -> None:
    """To client 0 only 1 and 2 are there; to the others those have left, and client 0 has not.

    Three shares of each secret would be three keys, and client 0's vector.
    """
    clients = Clients()
    keys = clients.keys()
    sealed = clients.sealed(keys)
    said = dict.fromkeys(EVERYBODY, EVERYBODY) | {0: (0, 1, 2)}
    openings = {1: (0, 1, 3), 2: (0, 2, 3), 3: (0, 3, 4), 4: (0, 3, 4)}

    def attack() -> list[int]:
        masked = [clients.masked(c, sealed, said[c]) for c in EVERYBODY]
        found = {
            c: clients.ask(c, Stage.OPENING, dict.fromkeys(rows, b""))
            for c, rows in openings.items()
        }

        def secret(of: int, came: bool) -> bytes:
            shares = [(c, found[c][of]) for c, rows in openings.items() if (of in rows) == came]
            return masks.combine(shares[:3])

        known = {1: secret(1, False), 2: secret(2, False)}
        return without(masked[0] - masks.own_mask(secret(0, True), SIZE), keys, known)

    with pytest.raises(SecureError, match="3 clients are too few"):
        assert attack() == vector_of(0).tolist()


def test_the_fewest_whose_sum_a_lie_can_give() -> None:
    for n in range(3, 500):
        least = threshold(CONFIG, n)
        keys = n * (n - least) // least  # a key needs as many shares, of n - least by each client
        assert 2 * least > n  # nobody's key and seed
        # Of four, the one whose key is given away would have to be in no client's vector.
        assert least - keys >= 3 or n == 4


def test_the_servers_own_keys_among_true_ones_give_no_vector() -> None:
    """The keys of masks are the server's, those of seals the clients' own."""
    clients = Clients()
    keys, own = clients.keys(), {c: secrets.token_bytes(masks.SECRET) for c in EVERYBODY}

    def shown(client: int) -> dict[int, bytes]:
        forged = {
            c: row[: masks.PUBLIC] + masks.public_key(own[c]) + row[2 * masks.PUBLIC :]
            for c, row in keys.items()
        }
        return {**forged, client: keys[client]}

    sealed = {c: clients.ask(c, Stage.SHARES, shown(c)) for c in EVERYBODY}

    def attack() -> list[int]:
        masked = [clients.masked(c, sealed, EVERYBODY) for c in EVERYBODY]
        opened = [clients.ask(c, Stage.OPENING, dict.fromkeys(EVERYBODY, b"")) for c in EVERYBODY]
        seed = masks.combine([(c, opened[c][0]) for c in EVERYBODY])
        known = {c: secret for c, secret in own.items() if c}
        return without(masked[0] - masks.own_mask(seed, SIZE), keys, known)

    with pytest.raises(SecureError, match="with other keys"):
        assert attack() == vector_of(0).tolist()


def test_a_vector_is_sent_once_a_part_whether_it_is_opened_or_not() -> None:
    """Else a client could be in one sum of a part, leave, and be in another one."""
    clients = Clients()
    clients.masked(0, clients.sealed(clients.keys()), EVERYBODY)
    with pytest.raises(SecureError, match="is in a sum of round 1 already"):
        clients.ask(0, Stage.KEYS, {0: b""})
    before = Clients()
    before.sealed(before.keys())
    before.ask(0, Stage.KEYS, {0: b""})  # no vector of it was sent


def planned(space: Space, part: int = 0) -> Assignment:
    return plan_part(CONFIG, space, 0, part, EVERYBODY, None, {}, 0)[0]


def test_a_vector_is_of_the_work_that_the_settings_give_the_part() -> None:
    shapes = {f"blk.{layer}.attn_q": (4, 6) for layer in range(3)}
    lora = LoRAConfig(rank=2, targets=("attn_q",))
    space = Space(Adapter.create("llama", shapes, lora, 1, cpu), CONFIG)
    clients, right = Clients(), planned(space)
    with pytest.raises(SecureError, match="out of turn"):  # as after a node's restart
        clients.members[0].check(CONFIG, space, right)
    clients.sealed(clients.keys())
    clients.members[0].check(CONFIG, space, right)
    for changes in (
        {"round": 1},
        {"part": 1},
        {"layers": (0,)},
        {"batch_seed": right.batch_seed + 1},
        {"first_step": 1},
        {"seeds": planned(space, 1).seeds},
        {"head_seeds": right.seeds},
    ):
        changed = dataclasses.replace(right, **changes)  # type: ignore[arg-type]
        with pytest.raises(SecureError, match="not the one of this part"):
            clients.members[0].check(CONFIG, space, changed)
