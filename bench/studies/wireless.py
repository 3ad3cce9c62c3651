"""What do a channel's uses and its noise cost in accuracy, and what does privacy cost beside them?

    python bench/studies/wireless.py MODEL.gguf TRAIN.jsonl OUT.jsonl [--k 1,4,16,64]
        [--snr-db -30,-20,-10,20] [--epsilon 8] [--rounds 12] [--clients 100] [--held-out 500]
        [--seed 0] [--scale 1]
    python bench/studies/wireless.py --report OUT.jsonl

K slopes along directions of the head, which cost a client no pass, and one along a direction of
the adapter are K + 1 uses of the channel. For each K a run over each channel with no more noise
than its own, and one over the last with that of a target epsilon. A run is a line of OUT.jsonl.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from federated import LORA, split_file

from fwdllm.federation.channel import Channel
from fwdllm.federation.simulation import Partition, simulate
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.presets import preset
from fwdllm.protocol.privacy import spent_epsilon

# Of 64 slopes of the head, whose norm is about 16. With K of them it is sqrt(K / 64) of that.
CLIP = 3.0
# With 64 directions. A gradient estimated from K of them is sqrt(64 / K) times as long.
RATE, HEAD_RATE = 4e-3, 4.0


@dataclass(frozen=True)
class Row:
    """A run. target: the epsilon asked for.  sigma: of the sum, in clips.  seconds: real ones."""

    k: int
    snr_db: float
    target: float | None
    sigma: float
    epsilon: float
    loss: float
    accuracy: float
    seconds: float


def config_of(k: int, rounds: int, n_clients: int, seed: int, scale: float) -> FederationConfig:
    """Everybody with one example in every round."""
    length = math.sqrt(k / 64)
    return preset(
        "dpzero",
        rounds=rounds,
        per_round=n_clients,
        perturbations=1,
        head_perturbations=k,
        batch_size=1,
        max_tokens=64,
        clip=CLIP * length,
        sigma=0.0,
        learning_rate=RATE * scale * length,
        head_learning_rate=HEAD_RATE * scale * length,
        eval_every=0,
        seed=seed,
    )


def sigma_for(config: FederationConfig, epsilon: float) -> float:
    """The least noise, in clips, that keeps all rounds within epsilon, to a thousandth."""
    low, high = 0.01, 100.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        tried = dataclasses.replace(config, sigma=middle, secure=True)
        spent = spent_epsilon(tried, [config.per_round] * config.rounds)
        assert spent is not None
        low, high = (low, middle) if spent <= epsilon else (middle, high)
    return high


def measure(
    model: Path,
    data: Path,
    config: FederationConfig,
    channel: Channel,
    target: float | None,
    n_held_out: int,
) -> Row:
    """One run."""
    if target is not None:
        config = dataclasses.replace(config, sigma=sigma_for(config, target))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train, held_out = split_file(data, n_held_out, config.seed, folder)
        result = simulate(
            model,
            train,
            folder / "run",
            config,
            lora=LORA,
            partition=Partition(config.per_round),
            channel=channel,
            eval_data=held_out,
        )
        with Ledger(folder / "run" / NAME) as ledger:
            sigma = ledger.meta.config.sigma
    assert result.epsilon is not None
    assert result.accuracy_after is not None
    return Row(
        config.head_perturbations,
        channel.snr_db,
        target,
        sigma,
        result.epsilon,
        result.loss_after,
        result.accuracy_after,
        result.seconds,
    )


def report(rows: list[Row]) -> str:
    """Accuracies by K and channel; in brackets the epsilon that was spent."""
    columns = sorted({(row.snr_db, row.target) for row in rows}, key=lambda c: (c[1] or 0, c[0]))
    heads = [f"{snr:g} dB" + (f", epsilon {e:g}" if e else "") for snr, e in columns]
    lines = ["| K | " + " | ".join(heads) + " |", "| --- |" + " --- |" * len(heads)]
    found = {(row.k, row.snr_db, row.target): row for row in rows}
    for k in sorted({row.k for row in rows}):
        cells = [_cell(found.get((k, *column))) for column in columns]
        lines.append(f"| {k} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    return "" if row is None else f"{row.accuracy:.1%} ({row.epsilon:.3g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--k", default="1,4,16,64")
    parser.add_argument("--snr-db", default="-30,-20,-10,20")
    parser.add_argument("--epsilon", type=float, default=8.0, help="0: no run with a target")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scale", type=float, default=1.0, help="of the rates")
    parser.add_argument("--report", type=Path)
    options = parser.parse_args()
    if not options.report:
        _measure_all(options)
    lines = (options.report or options.output).read_text().splitlines()
    print(report([Row(**json.loads(line)) for line in lines]))


def _measure_all(options: argparse.Namespace) -> None:
    channels = [Channel("awgn", float(snr)) for snr in options.snr_db.split(",")]
    asked = [(channel, None) for channel in channels]
    if options.epsilon:
        asked.append((channels[-1], options.epsilon))
    for channel, target in asked:
        for k in map(int, options.k.split(",")):
            config = config_of(k, options.rounds, options.clients, options.seed, options.scale)
            row = measure(options.model, options.data, config, channel, target, options.held_out)
            print(row, file=sys.stderr, flush=True)
            with open(options.output, "a", encoding="utf-8") as out:
                out.write(json.dumps(dataclasses.asdict(row)) + "\n")


if __name__ == "__main__":
    main()
