"""``simulate``: a federation of many clients in one process over one engine.

Clients share forward passes through the model. Time is simulated, from the number of tokens a
client forwards and the speed of its device. A run is recorded in its ledger; a run that was stopped
or killed can be resumed and ends with the same adapter.
"""

from __future__ import annotations

import dataclasses
import os
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np

from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.data.jsonl import Example, check_labels, hold_out, labels_of, read_jsonl
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.evaluation import Evaluation
from fwdllm.engine.files import atomic_write, check_still_there, fingerprint, identity, sha256
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.channel import Channel
from fwdllm.federation.fleet import Fleet, attacked
from fwdllm.federation.partition import by_user, dirichlet, iid
from fwdllm.hub import local_path
from fwdllm.protocol import wire
from fwdllm.protocol.client import answer_all
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.figures import traffic_by_client
from fwdllm.protocol.ledger import Ledger, open_run
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.privacy import spent_epsilon
from fwdllm.protocol.records import Meta
from fwdllm.protocol.replay import verify
from fwdllm.protocol.report import Report
from fwdllm.protocol.secure import sums
from fwdllm.protocol.server import Closed, Server
from fwdllm.tuning.recipes import recipe

# Without eval_data a tenth of the data is held out, at most this many examples.
MOST_HELD_OUT = 1000

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Partition:
    """How examples are spread over clients.

    By default evenly and at random over n_clients.  alpha: by labels, see ``partition.dirichlet``.
    user_field: one client for each value of this field, see ``partition.by_user``.
    """

    n_clients: int = 100
    alpha: float | None = None
    user_field: str | None = None

    def of(self, path: Path, examples: Sequence[Example], seed: int) -> list[np.ndarray]:
        """Indices of each client's examples. Errors: ConfigError, DataError."""
        if self.user_field is not None:
            return by_user(path, examples, self.user_field)
        if self.alpha is not None:
            return dirichlet(examples, self.n_clients, self.alpha, seed)
        return iid(len(examples), self.n_clients, seed)


@dataclass(frozen=True)
class Evaluated:
    """The held-out evaluation after ``round`` rounds."""

    round: int
    loss: float
    accuracy: float | None


Event: TypeAlias = "Closed | Evaluated"


@dataclass(frozen=True)
class SimulationResult:
    """The result of a run.

    loss_before, loss_after, accuracy_before, accuracy_after: on held-out data.
    n_perturbations: perturbations of the adapter that were used.  client_seconds: simulated, sum
    over all accepted contributions.  bytes_up, bytes_down: sums over all clients.  epsilon: privacy
    loss, None without differential privacy.  head: of the ledger's journal, as hexadecimal digits;
    None if an older version has begun the run.  seconds: of this process.
    """

    rounds: int
    loss_before: float
    loss_after: float
    accuracy_before: float | None
    accuracy_after: float | None
    n_clients: int
    n_contributions: int
    n_rejected: int
    n_perturbations: int
    client_seconds: float
    bytes_up: int
    bytes_down: int
    epsilon: float | None
    head: str | None
    adapter: Path
    run_dir: Path
    seconds: float
    stopped_early: bool


def simulate(
    model: _Path,
    data: _Path,
    run_dir: _Path,
    config: FederationConfig,
    *,
    lora: LoRAConfig | None = None,
    partition: Partition | None = None,
    fleet: Fleet | None = None,
    channel: Channel | None = None,
    eval_data: _Path | None = None,
    resume: bool = False,
    device: str = "cpu",
    memory_budget: int | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> SimulationResult:
    """Run a federation in this process and write its ledger, adapter and plot to ``run_dir``.

    model: a GGUF file, or hf://owner/repo/file.gguf.  data: JSONL, see ``engine.data.jsonl``.
    config: see ``protocol.federation``; ``protocol.presets.preset`` has those of papers.
    lora: shape of the adapter, by default that of the method's recipe.  partition, fleet: clients'
    data and devices.  channel: that adds clients' scalars up on their way, with noise; see
    ``federation.channel``. The run's ``secure`` and ``sigma`` are then what the server's sums have.
    eval_data: JSONL to evaluate on; without it a tenth of ``data`` is kept, at most 1,000.
    resume: continue the run in run_dir; settings and data must be the same.
    device: of the clients, "cpu", or "cuda" for an NVIDIA GPU; the server is on the CPU.
    memory_budget: bytes to stay within on the CPU, see ``Engine.load``.
    on_event: called after each round and each evaluation.  should_stop: asked after each round.

    Errors: any FwdllmError; OSError.
    """
    began = time.perf_counter()
    partition, fleet = partition or Partition(), fleet or Fleet()
    if (config.secure or channel) and fleet.hostile:
        raise ConfigError(
            "nobody sees what a hostile client adds to a sum, so attacks on it are not simulated"
        )
    everything = read_jsonl(data)
    labels = labels_of(everything)
    if eval_data is None:
        examples, held_out = hold_out(everything, config.seed, MOST_HELD_OUT)
    else:
        examples, held_out = everything, read_jsonl(eval_data)
    if labels:
        check_labels(held_out, labels)
    shares = partition.of(Path(data), examples, config.seed)
    path = local_path(model)
    engine = Engine.load(
        path,
        lora or recipe(path, data, config.method).lora,
        labels=labels,
        literal=config.literal,
        seed=config.seed,
        memory_budget=memory_budget,
        device=device,
    )
    engine.check_method(config.method)
    settings = {
        "partition": dataclasses.asdict(partition),
        "fleet": fleet.recorded(),
        "channel": None if channel is None else dataclasses.asdict(channel),
        "n_examples": len(examples),
        "n_held_out": len(held_out),
        "data": sha256(Path(data)),
        "device": device,
    }
    assert engine.adapter is not None
    if channel is not None:
        config = channel.settings(config, has_head=engine.adapter.head is not None)
    if config.secure and len(shares) < sums.LEAST:
        raise ConfigError(f"a sum needs three clients, and there are {len(shares)}")
    model_of = {**fingerprint(*engine.file.paths), **settings}
    meta = Meta.of(config, engine.adapter, config.seed, model_of, secrets.randbits(64))
    with open_run(Path(run_dir), meta, resume) as ledger:
        verify(ledger)  # what somebody has changed is not gone on with
        clients = [engine.separate([examples[i] for i in share]) for share in shares]
        run = _Simulation(engine, Server(ledger), clients, held_out, fleet, channel)
        run.until_done(on_event, should_stop)
        return run.result(Path(run_dir), time.perf_counter() - began)


class _Simulation:
    """Drives a server with simulated devices. now: simulated seconds since the run began."""

    def __init__(
        self,
        engine: Engine,
        server: Server,
        clients: Sequence[Sequence[Example]],
        held_out: Sequence[Example],
        fleet: Fleet,
        channel: Channel | None,
    ) -> None:
        engine.adapter = server.replica.space.adapter
        self.engine, self.server, self.clients = engine, server, clients
        self.held_out, self.fleet, self.channel = held_out, fleet, channel
        self.config = server.config
        closed = server.ledger.rounds(server.round - 1) if server.round else []
        self.now = server.opened if server.part >= 0 else closed[-1].closed if closed else 0.0

    def until_done(
        self, on_event: Callable[[Event], None], should_stop: Callable[[], bool]
    ) -> None:
        """Run rounds until all are done or ``should_stop()`` is true."""
        ledger = self.server.ledger.path
        known = identity(ledger)
        self._evaluate(on_event)
        while not self.server.done and not should_stop():
            on_event(self._round())
            check_still_there(ledger, known)
            self._evaluate(on_event)
        check_still_there(ledger, known)

    def result(self, folder: Path, seconds: float) -> SimulationResult:
        """Write the adapter and the plot, and make the result."""
        from fwdllm.federation.plot import draw  # matplotlib is slow to import

        server, ledger = self.server, self.server.ledger
        adapter = folder / "adapter.gguf"
        assert self.engine.adapter is not None
        save_gguf(self.engine.adapter, adapter)
        with atomic_write(folder / "plot.png") as temporary:
            draw(ledger, temporary)
        evaluations = ledger.evaluations()
        if not evaluations or evaluations[-1][0] != server.round:
            found = self._evaluation()
            evaluations.append((server.round, found.loss, found.accuracy, found.n_examples))
        traffic = traffic_by_client(ledger)
        return SimulationResult(
            rounds=server.round,
            loss_before=evaluations[0][1],
            loss_after=evaluations[-1][1],
            accuracy_before=evaluations[0][2],
            accuracy_after=evaluations[-1][2],
            n_clients=len(self.clients),
            n_contributions=sum(row[2] for row in traffic),
            n_rejected=len(ledger.rejections()),
            n_perturbations=sum(r.n_perturbations for r in ledger.rounds()),
            client_seconds=client_seconds(ledger),
            bytes_up=sum(row[4] for row in traffic),
            bytes_down=sum(row[3] for row in traffic),
            epsilon=spent_epsilon(self.config, ledger.available()),
            head=ledger.journal.head.hash.hex() if ledger.journal else None,
            adapter=adapter,
            run_dir=folder,
            seconds=seconds,
            stopped_early=not server.done,
        )

    def _round(self) -> Closed:
        while True:
            assignments = self.server.open_part(range(len(self.clients)), self.now)
            late = self._answer(assignments)
            closed = self.server.close_part(self.now)
            for client, message in late:
                self.server.receive(client, message, self.now)
            if closed is not None:
                return closed

    def _answer(self, assignments: Sequence[Assignment]) -> list[tuple[int, bytes]]:
        """Let clients answer and advance the time; returns late answers as client and message."""
        seed, opened = self.config.seed, self.server.opened
        deadline = opened + self.config.deadline
        willing = [a for a in assignments if self.fleet.answers(seed, a)]
        arrivals: list[tuple[float, int, bytes]] = []
        reports = answer_all(self.engine, self.server.replica.space, willing, self._examples)
        for assignment, report in zip(willing, reports, strict=True):
            client = assignment.client
            seconds = self.fleet.seconds(seed, client, report.n_tokens)
            report = dataclasses.replace(report, seconds=seconds)
            message = self._message(assignment, report, len(willing))
            arrivals.append((opened + seconds, client, message))
        in_time = sorted(a for a in arrivals if a[0] <= deadline)
        with self.server.ledger.batch():
            if self.config.secure:
                self._receive_sum(in_time, len(willing))
            else:
                for at, client, message in in_time:
                    self.server.receive(client, message, at)
        # In a resumed part, the last answer may have come before the interruption.
        self.now = max([opened, *self.server.arrivals()])
        if self.server.outstanding():
            self.now = deadline
        if self.config.secure:
            return []  # a vector that comes late is in no sum, and nothing of it is known
        return [(client, message) for at, client, message in sorted(arrivals) if at > deadline]

    def _message(self, assignment: Assignment, report: Report, n_members: int) -> bytes:
        """What a client sends. n_members: clients that have begun, where sums alone are seen."""
        if self.channel is not None:
            return sums.scalars_of(self.config, report).tobytes()
        if self.config.secure:
            name = f"{self.config.seed} {report.round} {report.part} {assignment.client}"
            # Not secret, as runs repeat; and without masks, as they are taken off again.
            vector = sums.encode(self.config, report, n_members, random.Random(name).randrange)
            return vector.astype("<u8").tobytes()
        kind = self.fleet.attack_of(self.config.seed, assignment.client)
        if kind is None:
            return wire.encode_report(report)
        before = self.server.ledger.first_message_of(assignment.client)
        return attacked(kind, report, before, assignment, self.server.replica.space)

    def _receive_sum(self, arrivals: Sequence[tuple[float, int, bytes]], n_members: int) -> None:
        """Hand over the sum of the vectors that have come. arrivals: in their order."""
        n_asked = len(self.server.ledger.assignments(self.server.round, self.server.part))
        # As ``Cohort`` has it; over a channel nobody's keys are waited for.
        too_few = self.channel is None and n_members < sums.threshold(self.config, n_asked)
        if too_few or len(arrivals) < sums.threshold(self.config, n_members):
            return
        vectors = {client: vector for _, client, vector in arrivals}
        if self.channel is not None:
            scalars = np.stack([np.frombuffer(vector) for vector in vectors.values()])
            heard = self.channel.total(self.config, scalars, self.server.round, self.server.part)
            # Nobody hears what one client has sent.
            self.server.receive_sum(dict.fromkeys(vectors, b""), heard, arrivals[-1][0])
            return
        values = [np.frombuffer(vector, "<u8") for vector in vectors.values()]
        total = np.stack(values).sum(axis=0, dtype=np.uint64)
        self.server.receive_sum(vectors, total, arrivals[-1][0])

    def _examples(self, client: int) -> Sequence[Example]:
        return self.clients[client]

    def _evaluate(self, on_event: Callable[[Event], None]) -> None:
        every, round = self.config.eval_every, self.server.round
        due = self.server.done or (every > 0 and round % every == 0) or round == 0
        if not due or any(row[0] == round for row in self.server.ledger.evaluations()):
            return
        found = self._evaluation()
        self.server.ledger.evaluated(round, found.loss, found.accuracy, found.n_examples)
        on_event(Evaluated(round, found.loss, found.accuracy))

    def _evaluation(self) -> Evaluation:
        return self.engine.evaluate(self.held_out, self.config.max_tokens)


def client_seconds(ledger: Ledger) -> float:
    """Sum of the clients' seconds over all accepted contributions."""
    return sum(
        wire.decode_report(message).seconds
        for round in range(ledger.n_rounds)
        for part, _, _ in ledger.parts(round)
        for _, message in ledger.reports(round, part)
    )
