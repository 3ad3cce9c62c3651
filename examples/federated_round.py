"""One round of a federation by hand: python examples/federated_round.py

Three clients answer a server. What passes between them are the bytes of `fwdllm.protocol.wire`;
here the network is a function call. Writes ledger.sqlite, the record of the run.
"""

import time
from pathlib import Path

import numpy as np

from fwdllm import Engine, LoRAConfig, preset, read_jsonl
from fwdllm.demo import asset
from fwdllm.engine.files import fingerprint
from fwdllm.protocol import wire
from fwdllm.protocol.client import answer
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replay import replay
from fwdllm.protocol.replica import Replica
from fwdllm.protocol.server import Server

MODEL, CLIENTS = asset("fwdllm-tiny.gguf"), range(3)
CONFIG = preset("mezo", rounds=1, per_round=3, perturbations=8, batch_size=4)


def client_answers(number: int, task: bytes, updates: bytes) -> tuple[bytes, Replica]:
    """A client's side, on its own examples: the model and the messages are all it is given."""
    engine = Engine.load(MODEL, LoRAConfig(rank=2, alpha=4.0), seed=CONFIG.seed)
    replica = Replica(CONFIG, engine.adapter)
    follow(replica, updates)
    own = read_jsonl(asset("pirate.train.jsonl"))[number * 10 : number * 10 + 10]
    report = answer(engine, replica.space, wire.decode_assignment(task, number), own)
    return wire.encode_report(report), replica


def follow(replica: Replica, updates: bytes) -> None:
    """Apply the rounds a client has missed; each is seeds and coefficients."""
    for message in wire.decode_many(updates):
        replica.apply(wire.decode_update(message))


def main() -> None:
    Path(NAME).unlink(missing_ok=True)  # of an earlier try; a run is never overwritten
    empty = Engine.load(MODEL, LoRAConfig(rank=2, alpha=4.0), seed=CONFIG.seed).adapter
    meta = Meta.of(CONFIG, empty, CONFIG.seed, fingerprint(MODEL), noise_seed=0)
    with Ledger.create(Path(NAME), meta) as ledger:
        server = Server(ledger)
        for assignment in server.open_part(CLIENTS, time.time()):
            number, task = assignment.client, wire.encode_assignment(assignment)
            report, replica = client_answers(number, task, server.synchronize(number))
            reason = server.receive(number, report, time.time())
            print(f"client {number}: {len(task)} bytes down, {len(report)} up, {reason or 'taken'}")
        print(f"the same report again: {server.receive(number, report, time.time())}")
        closed = server.close_part(time.time())
        print(
            f"round closed: {closed.n_accepted} clients, {closed.n_perturbations} slopes, "
            f"adapter moved: {closed.moved}"
        )
        follow(replica, server.synchronize(number))
        again = replay(ledger)  # from the empty adapter and the contributions alone
        same = all(np.array_equal(server.replica.theta, r.theta) for r in (replica, again))
        print(f"server, client and replay have the same adapter: {same}")


if __name__ == "__main__":
    main()
