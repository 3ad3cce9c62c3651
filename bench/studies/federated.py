"""What do federations of simulated clients reach for equal compute?

    python bench/studies/federated.py MODEL.gguf TRAIN.jsonl OUT.jsonl [--runs NAMES]
        [--seeds 0,1,2] [--partitions NAMES] [--budget LANE_TOKENS] [--held-out 1000]
        [--target-loss X] [--set name=value ...]
    python bench/studies/federated.py --report OUT.jsonl [--plot FOLDER] [--target-loss X]

By default the runs for AG News and an encoder; those for a decoder are named "decoder: ...", those
with slow devices "slow: ...".

A run goes on until its clients have spent a budget of lane-tokens; a token of backprop counts as
three, of readout as two. Runs of a seed share partition, held-out examples and the adapter they
start from. Each evaluation is a line of OUT.jsonl, written when it is made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from federated_report import Row, plot, report

from fwdllm.engine import Engine, LoRAConfig, read_jsonl
from fwdllm.engine.data.jsonl import Example, labels_of, split
from fwdllm.engine.errors import NumericsError
from fwdllm.engine.estimators.exact import PASSES
from fwdllm.engine.estimators.plan import plan
from fwdllm.engine.files import fingerprint
from fwdllm.engine.settings import EXACT_METHODS
from fwdllm.federation.fleet import Fleet
from fwdllm.federation.simulation import Evaluated, Event, Partition, simulate
from fwdllm.protocol import wire
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.figures import traffic_by_client
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.optimizers import OptimizerState, apply
from fwdllm.protocol.plan import Assignment
from fwdllm.protocol.presets import preset
from fwdllm.protocol.privacy import spent_epsilon
from fwdllm.protocol.records import Meta
from fwdllm.protocol.report import Report
from fwdllm.protocol.seeds import MAX_ROUNDS, batch_indices
from fwdllm.protocol.server import Closed, Server
from fwdllm.protocol.space import Space

if TYPE_CHECKING:
    from torch_model import TorchModel

BUDGET, HELD_OUT, EVALUATIONS = 800_000, 1000, 8
# Forward and two backward, or as the engine: forward, forward again, and back.
BACKPROP_LANES = PASSES["backprop"]
_SAMPLE = 500  # examples whose tokens tell the mean length

LORA = LoRAConfig(rank=8, alpha=16)
PARTITIONS = {
    "iid": Partition(100),
    "dirichlet": Partition(100, alpha=0.5),
    "20 clients": Partition(20),
    "100 clients": Partition(100),
}
FLEET, SLOW = Fleet(), Fleet(stragglers=0.3)

# Rates are constant because pacing leaves open how many rounds the budget buys.
COMMON: dict[str, Any] = {
    "per_round": 10,
    "batch_size": 8,
    "max_tokens": 64,
    "schedule": "constant",
}


@dataclass(frozen=True)
class Run:
    """A preset and what differs from it and from COMMON. lora: None is the method's own.

    backprop: clients have PyTorch; their devices are FLEET's.
    """

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    lora: LoRAConfig | None = LORA
    backprop: bool = False
    fleet: Fleet = FLEET


# Rates are the best of a few tried on seed 0 with half the budget. The gradient of a round's ten
# perturbations has a variance of about 0.5 to 1 then.
_FWDLLM = {"learning_rate": 6e-3, "head_learning_rate": 1.0, "variance_threshold": 0.3}

# No client perturbs anything here, so no seeds should be sent.
_FEDAVG = {
    "client_optimizer": "adam",
    "client_learning_rate": 3e-3,
    "perturbations": 1,
    "head_perturbations": 1,
}

# Slopes of one exact gradient cost nothing beside it, so a local step has many.
_FEDKSEED = {
    "method": "backprop",
    "local_steps": 10,
    "perturbations": 64,
    "head_perturbations": 64,
    "client_learning_rate": 1e-2,
    "head_learning_rate": 30.0,
}
# A choice of what is trained after 5 rounds; of spiel another after every 20.
_SPARSE = {"head_learning_rate": 1e-2, "reselect": 20}

_LOCAL = {**_FEDAVG, "local_steps": 4}
_ALL = {"per_round": 100, "batch_size": 2, "max_tokens": 192}

_SLOW = {
    **_FWDLLM,
    "method": "forward-ad",
    "perturbations": 8,
    "pacing": False,
    "candidates": 1,
    "learning_rate": 2e-2,
}
_SLOW_SPLIT = {"perturbations": 4, "learning_rate": 3e-3, "head_learning_rate": 1e-2}

RUNS = {
    "fwdllm": Run("fwdllm", _FWDLLM),
    "fwdllm, no pacing": Run("fwdllm", {**_FWDLLM, "pacing": False}),
    "fwdllm, no sampling": Run("fwdllm", {**_FWDLLM, "candidates": 1}),
    "fwdllm, neither": Run("fwdllm", {**_FWDLLM, "pacing": False, "candidates": 1}),
    "spry": Run("spry", {"learning_rate": 3e-3, "head_learning_rate": 1e-2}),
    "spry, 256 exact slopes": Run(
        "spry",
        {
            "method": "backprop",
            "perturbations": 256,
            "learning_rate": 1e-3,
            "head_learning_rate": 1e-2,
        },
    ),
    "spry, sparse": Run("spry", {**_SPARSE, "directions": "sparse", "learning_rate": 3e-2}),
    "spry, spiel": Run("spry", {**_SPARSE, "directions": "spiel", "learning_rate": 3e-3}),
    "mezo": Run("mezo", {"learning_rate": 1e-3, "head_learning_rate": 1.0}),
    # Everybody takes part in every round, with little: noise is for the sum, whoever is in it.
    # epsilon = 8 after the 48 rounds that the budget buys.
    "dpzero, epsilon 8": Run(
        "dpzero",
        {
            "per_round": 100,
            "batch_size": 2,
            "perturbations": 1,
            "clip": 3.0,
            "sigma": 4.42,
            "learning_rate": 1e-3,
            "head_learning_rate": 1.0,
        },
    ),
    "fedavg, backprop": Run("fedavg", _FEDAVG, backprop=True),
    "fedavg by this engine": Run("fedavg", {"method": "backprop", **_FEDAVG}),
    "ferret": Run(
        "ferret",
        {"perturbations": 1024, "client_optimizer": "adam", "client_learning_rate": 3e-3},
    ),
    "fedkseed, exact slopes": Run("fedkseed", _FEDKSEED),
    "fedkseed-pro, exact slopes": Run("fedkseed-pro", _FEDKSEED),
    # Everybody in every round, with little: batches of two.
    "decoder: spry": Run("spry", {**_ALL, "learning_rate": 3e-3}),
    "decoder: fwdllm": Run("fwdllm", {**_ALL, "learning_rate": 3e-2, "pacing": False}),
    "decoder: fedavg by backprop": Run(
        "fedavg", {**_ALL, **_LOCAL, "method": "backprop", "client_learning_rate": 6e-3}
    ),
    "decoder: fedavg by readout": Run(
        "fedavg", {**_ALL, **_LOCAL, "method": "readout", "client_learning_rate": 5e-3}, None
    ),
    "decoder: readout, 256 slopes": Run("readout", _ALL, None),
    # Three of ten devices are 20 times as slow.
    "slow: 8 each": Run("fwdllm", _SLOW, fleet=SLOW),
    "slow: adaptive": Run("fwdllm", {**_SLOW, "adaptive": True}, fleet=SLOW),
    "slow: 8 each, deadline 10 s": Run("fwdllm", {**_SLOW, "deadline": 10.0}, fleet=SLOW),
    "slow: split, 4 each": Run("spry", _SLOW_SPLIT, fleet=SLOW),
    "slow: split, adaptive": Run("spry", {**_SLOW_SPLIT, "adaptive": True}, fleet=SLOW),
}
ENCODER_RUNS = [name for name in RUNS if ":" not in name]


@dataclass(frozen=True)
class Task:
    """What all runs share. data: JSONL with labels.  budget: lane-tokens of a run's clients.

    changes: settings of all runs, over those of RUNS.
    """

    model: Path
    data: Path
    budget: int = BUDGET
    n_held_out: int = HELD_OUT
    changes: Mapping[str, Any] = field(default_factory=dict)


class Meter:
    """Adds up the events of one run, and makes a row of each evaluation."""

    def __init__(self, key: tuple[str, str, int], ledger: Path, on_row: Callable[[Row], None]):
        self.n_tokens = 0
        self.round = -1  # of the last row
        self._key, self._ledger, self._on_row = key, ledger, on_row
        self._n_perturbations, self._client_seconds = 0, 0.0
        self._variance: float | None = None
        self._seconds, self._clock = 0.0, time.perf_counter()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Closed):
            self._closed(event)
        elif event.round != self.round:
            self._evaluated(event)

    def _closed(self, event: Closed) -> None:
        self._seconds += time.perf_counter() - self._clock
        self._clock = time.perf_counter()
        self.n_tokens += event.n_tokens
        self._n_perturbations += event.n_perturbations
        self._client_seconds += event.seconds
        self._variance = event.variance

    def _evaluated(self, event: Evaluated) -> None:
        with Ledger(self._ledger) as ledger:
            traffic = traffic_by_client(ledger)
            rounds = ledger.rounds(event.round - 1) if event.round else []
            spent = spent_epsilon(ledger.meta.config, ledger.available())
        self.round = event.round
        self._on_row(
            Row(
                *self._key,
                round=event.round,
                n_tokens=self.n_tokens,
                n_answers=sum(row[2] for row in traffic),
                client_seconds=self._client_seconds,
                wall_seconds=rounds[0].closed if rounds else 0.0,
                bytes_up=sum(row[4] for row in traffic),
                bytes_down=sum(row[3] for row in traffic),
                n_perturbations=self._n_perturbations,
                variance=self._variance,
                epsilon=spent,
                loss=event.loss,
                accuracy=event.accuracy,
                seconds=self._seconds,
            )
        )
        self._clock = time.perf_counter()


def measure(
    task: Task, name: str, partition: str, seed: int, on_row: Callable[[Row], None]
) -> None:
    """Train one run until its budget is spent; rows come as evaluations are made."""
    run = RUNS[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train, held_out = split_file(task.data, task.n_held_out, seed, folder)
        meter = Meter((name, partition, seed), folder / "run" / NAME, on_row)
        drive = backprop if run.backprop else partial(forward_passes, fleet=run.fleet)
        last = drive(
            task.model,
            train,
            folder / "run",
            config_of(task, run, seed, PARTITIONS[partition].n_clients),
            lora=run.lora,
            partition=PARTITIONS[partition],
            eval_data=held_out,
            on_event=meter,
            should_stop=lambda: meter.n_tokens >= task.budget,
        )
        meter(last)


def config_of(task: Task, run: Run, seed: int, n_clients: int) -> FederationConfig:
    """The settings of a run, with about EVALUATIONS evaluations within the budget."""
    changes = {**COMMON, **run.changes, **task.changes, "seed": seed}
    changes["per_round"] = min(changes["per_round"], n_clients)
    config = preset(run.preset, rounds=MAX_ROUNDS - 1, **changes)
    shortest = task.budget / part_tokens(config, run.backprop, _mean_length(task, config))
    parts = (1 + config.max_parts) / 2 if config.pacing else 1
    # Twice what the budget buys, so that a run ends whose answers are all refused.
    rounds = math.ceil(2 * shortest) + 1
    every = max(1, round(shortest / parts / EVALUATIONS))
    return dataclasses.replace(config, rounds=rounds, eval_every=every)


def part_tokens(config: FederationConfig, by_backprop: bool, length: float) -> float:
    """Lane-tokens of a part of a round. length: mean tokens of an example."""
    if by_backprop or config.method in EXACT_METHODS:
        lanes = BACKPROP_LANES if by_backprop else PASSES[config.method]
    else:
        seeds = np.zeros(config.perturbations, np.uint64)
        # An encoder's head always wants a plain lane.
        lanes = len(plan(seeds, config.method, plain=True).lanes)
    return config.per_round * config.local_steps * config.batch_size * length * lanes


def forward_passes(
    model: Path, data: Path, run_dir: Path, config: FederationConfig, **options: Any
) -> Evaluated:
    """The product's own simulation; gives its last evaluation."""
    result = simulate(model, data, run_dir, config, **options)
    return Evaluated(result.rounds, result.loss_after, result.accuracy_after)


def backprop(
    model: Path,
    data: Path,
    run_dir: Path,
    config: FederationConfig,
    *,
    lora: LoRAConfig,
    partition: Partition,
    eval_data: Path,
    on_event: Callable[[Event], None],
    should_stop: Callable[[], bool],
) -> Evaluated:
    """As ``forward_passes``, with clients that train by PyTorch on the decoded weights."""
    import torch
    from torch_model import TorchModel

    # A second thread gains nothing on 40 rows, and waits for its turn on a machine that is shared.
    torch.set_num_threads(1)
    examples, held_out = read_jsonl(data), read_jsonl(eval_data)
    shares = partition.of(data, examples, config.seed)
    clients = [[examples[i] for i in share] for share in shares]
    engine = Engine.load(model, lora, labels=labels_of(examples), seed=config.seed)
    assert engine.adapter is not None
    run_dir.mkdir()
    meta = Meta.of(
        config, engine.adapter, config.seed, fingerprint(*engine.file.paths), noise_seed=0
    )
    with Ledger.create(run_dir / NAME, meta) as ledger:
        server = Server(ledger)
        engine.adapter = server.replica.space.adapter
        torch_model = TorchModel(engine, torch.float32)
        now = 0.0
        while True:
            ends = server.done or should_stop()
            if ends or server.round % config.eval_every == 0:
                found = engine.evaluate(held_out, config.max_tokens)
                last = Evaluated(server.round, found.loss, found.accuracy)
                on_event(last)
            if ends:
                return last
            closed, now = _backprop_round(server, torch_model, clients, now)
            on_event(closed)


def _backprop_round(
    server: Server, model: TorchModel, clients: Sequence[Sequence[Example]], now: float
) -> tuple[Closed, float]:
    """One round, and the simulated seconds at its end."""
    space, closed = server.replica.space, None
    while closed is None:
        for assignment in server.open_part(range(len(clients)), now):
            client = assignment.client
            report = backprop_answer(model, model.engine, space, assignment, clients[client])
            seconds = FLEET.seconds(server.config.seed, client, report.n_tokens)
            message = wire.encode_report(dataclasses.replace(report, seconds=seconds))
            server.receive(client, message, server.opened + seconds)
        now = max([now, *server.arrivals()])
        closed = server.close_part(now)
    return dataclasses.replace(closed, n_perturbations=0), now


def backprop_answer(
    model: TorchModel,
    engine: Engine,
    space: Space,
    assignment: Assignment,
    examples: Sequence[Example],
) -> Report:
    """``protocol.client.answer`` of weights after local steps along autograd's gradient.

    The engine's adapter is the server's, and is so again when this returns. Directions must be
    those whose coordinates are the parameters.
    """
    assert engine.adapter is not None and space.size == engine.adapter.theta.size
    config, theta = space.config, engine.adapter.theta
    before, losses = theta.copy(), []
    n_examples = n_tokens = 0
    optimizer = config.client_optimizer_config()
    state = OptimizerState.initial(optimizer, space.size)
    try:
        for step in range(assignment.first_step, assignment.first_step + config.local_steps):
            chosen = batch_indices(assignment.batch_seed, step, len(examples), config.batch_size)
            batch = engine.encode([examples[i] for i in chosen], config.max_tokens)
            leaf = model.theta()
            loss = model.loss(leaf, batch)
            loss.backward()
            apply(optimizer, state, theta, leaf.grad.numpy(), config.client_learning_rate)
            losses.append(loss.item())
            n_examples += len(chosen)
            n_tokens += BACKPROP_LANES * batch.n_rows
        moved = before - theta
    finally:
        theta[:] = before
    none = np.zeros((0, 0), np.float32)
    return Report(
        assignment.round,
        assignment.part,
        n_examples,
        n_tokens,
        0.0,
        float(np.mean(losses)),
        none,
        none,
        space.pack(moved, assignment.layers),
    )


def split_file(data: Path, n_held_out: int, seed: int, folder: Path) -> tuple[Path, Path]:
    """Files of the training and the held-out examples, which are a seed's own."""
    lines = data.read_bytes().split(b"\n")
    paths = folder / "train.jsonl", folder / "held_out.jsonl"
    for path, part in zip(paths, split(read_jsonl(data), n_held_out, seed), strict=True):
        path.write_bytes(b"\n".join(lines[example.line - 1] for example in part))
    return paths


def _mean_length(task: Task, config: FederationConfig) -> float:
    """Tokens of an example, a mean over the first ones of the file."""
    examples = read_jsonl(task.data)
    engine = Engine.load(task.model, labels=labels_of(examples))
    tokens = [engine.tokenize(e, config.max_tokens) for e in examples[:_SAMPLE]]
    return statistics.mean(len(t.ids) for t in tokens)


def setting(text: str) -> tuple[str, Any]:
    """A setting and its value, a word where it is not JSON."""
    name, separator, value = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"write name=value, not {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--runs", default=";".join(ENCODER_RUNS), help="names with ; between them")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--partitions", default="iid;dirichlet")
    parser.add_argument("--budget", type=int, default=BUDGET)
    parser.add_argument("--held-out", type=int, default=HELD_OUT)
    parser.add_argument("--target-loss", type=float)
    parser.add_argument(
        "--set", type=setting, nargs="*", action="extend", default=[], metavar="name=value"
    )
    parser.add_argument("--report", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    source = options.report or options.output
    if not options.report:
        _measure_all(options)
    rows = [Row(**json.loads(line)) for line in source.read_text().splitlines()]
    rows.sort(key=lambda row: (list(PARTITIONS).index(row.partition), list(RUNS).index(row.run)))
    print(report(rows, options.target_loss))
    if options.plot:
        plot(rows, options.plot)


def _measure_all(options: argparse.Namespace) -> None:
    task = Task(options.model, options.data, options.budget, options.held_out, dict(options.set))

    def write(row: Row) -> None:
        print(row, file=sys.stderr, flush=True)
        with open(options.output, "a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(row)) + "\n")

    for seed in map(int, options.seeds.split(",")):
        for partition in options.partitions.split(";"):
            for name in options.runs.split(";"):
                try:
                    measure(task, name, partition, seed, write)
                except NumericsError as error:  # of one run with too high a rate
                    print(f"{name}, {partition}, seed {seed}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
