"""What do hostile clients cost where clients have directions of their own, and what do rules save?

    python bench/studies/robust.py MODEL.gguf TRAIN.jsonl OUT.jsonl [--rules mean;screened]
        [--attacks flip;scale;constant;collude] [--shares 0,0.1,0.2,0.3] [--partition iid]
        [--seeds 0] [--clients 40] [--rounds 40] [--held-out 400] [--set name=value ...]
    python bench/studies/robust.py --report OUT.jsonl

Runs of ``spry`` on labelled examples, with rates and adapter of ``federated.py``, ten clients asked
a round, batches of four texts of at most 16 tokens. Runs of a seed share partition, held-out
examples, hostile clients and the adapter that they start from. A run is a line of OUT.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from federated import LORA, RUNS, setting, split_file

from fwdllm.federation.fleet import Fleet
from fwdllm.federation.simulation import Partition, simulate
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.presets import preset

PARTITIONS: dict[str, float | None] = {"iid": None, "dirichlet": 0.5}


@dataclass(frozen=True)
class Ended:
    """A run's end. share: of hostile clients.  loss, accuracy: on held-out examples."""

    rule: str
    attack: str
    share: float
    partition: str
    seed: int
    rounds: int
    n_clients: int
    loss: float
    accuracy: float | None
    seconds: float


class Attackers(Fleet):
    """A fleet in which exactly the share of clients attacks, in tenths; a Fleet draws them."""

    def attack_of(self, seed: int, client: int) -> str | None:
        return self.attack if client % 10 < round(10 * self.hostile) else None


def config_of(rule: str, seed: int, rounds: int, **changes: Any) -> FederationConfig:
    """The settings of a run. changes: over those of all runs."""
    common = {"per_round": 10, "batch_size": 4, "max_tokens": 16, "eval_every": 0}
    return preset(
        "spry",
        **{
            **RUNS["spry"].changes,
            **common,
            "aggregate": rule,
            "seed": seed,
            "rounds": rounds,
            **changes,
        },
    )


def measure(
    model: Path,
    data: Path,
    config: FederationConfig,
    fleet: Fleet,
    partition: str,
    n_clients: int,
    n_held_out: int,
) -> Ended:
    """Train one run to its end."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train, held_out = split_file(data, n_held_out, config.seed, folder)
        result = simulate(
            model,
            train,
            folder / "run",
            config,
            lora=LORA,
            partition=Partition(n_clients, alpha=PARTITIONS[partition]),
            fleet=fleet,
            eval_data=held_out,
        )
    return Ended(
        config.aggregate,
        fleet.attack or "none",
        fleet.hostile,
        partition,
        config.seed,
        config.rounds,
        n_clients,
        result.loss_after,
        result.accuracy_after,
        result.seconds,
    )


def report(rows: Sequence[Ended]) -> str:
    """Markdown: of each partition a table of accuracies, medians and ranges of the seeds."""
    parts = []
    for partition in dict.fromkeys(row.partition for row in rows):
        mine = [row for row in rows if row.partition == partition]
        rules = list(dict.fromkeys(row.rule for row in mine))
        lines = [
            f"| attack | hostile | {' | '.join(rules)} |",
            "| --- | --- |" + " --- |" * len(rules),
        ]
        for attack, share in dict.fromkeys((row.attack, row.share) for row in mine):
            of_attack = [row for row in mine if (row.attack, row.share) == (attack, share)]
            cells = [_cell([row for row in of_attack if row.rule == rule]) for rule in rules]
            lines.append(f"| {attack} | {share:.0%} | {' | '.join(cells)} |")
        n_seeds = len({row.seed for row in mine})
        parts.append("\n".join([f"### {partition}, {n_seeds} seeds", "", *lines]))
    return "\n\n".join(parts)


def _cell(rows: Sequence[Ended]) -> str:
    found = sorted(row.accuracy or 0.0 for row in rows)
    if not found:
        return ""
    middle = f"{statistics.median(found):.1%}"
    return middle if len(found) == 1 else f"{middle} ({found[0]:.1%} to {found[-1]:.1%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--rules", default="mean;screened", help="names with ; between them")
    parser.add_argument("--attacks", default="flip;scale;constant;collude")
    parser.add_argument("--shares", default="0,0.1,0.2,0.3")
    parser.add_argument("--partition", choices=PARTITIONS, default="iid")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--clients", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument(
        "--set", type=setting, nargs="*", action="extend", default=[], metavar="name=value"
    )
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if not options.report:
        _measure_all(options)
    source = options.report or options.output
    print(report([Ended(**json.loads(line)) for line in source.read_text().splitlines()]))


def _measure_all(options: argparse.Namespace) -> None:
    shares = [float(share) for share in options.shares.split(",")]
    fleets = [Attackers()] if 0 in shares else []
    for attack in options.attacks.split(";"):
        fleets += [Attackers(hostile=share, attack=attack) for share in shares if share > 0]
    for seed in map(int, options.seeds.split(",")):
        for fleet in fleets:
            for rule in options.rules.split(";"):
                config = config_of(rule, seed, options.rounds, **dict(options.set))
                row = measure(
                    options.model,
                    options.data,
                    config,
                    fleet,
                    options.partition,
                    options.clients,
                    options.held_out,
                )
                with open(options.output, "a", encoding="utf-8") as out:
                    out.write(json.dumps(asdict(row)) + "\n")


if __name__ == "__main__":
    main()
