"""The study of hostile clients: that its runs start, and what its table says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import robust
from robust import Attackers, Ended

from fwdllm.protocol.federation import FederationConfig


def row(rule: str, attack: str, share: float, accuracy: float, seed: int = 0) -> Ended:
    return Ended(rule, attack, share, "iid", seed, 40, 40, 0.5, accuracy, 1.0)


def test_a_line_for_each_attack() -> None:
    rows = [
        row("mean", "none", 0, 0.87),
        row("screened", "none", 0, 0.86),
        row("screened", "flip", 0.2, 0.85),
        row("mean", "none", 0, 0.8, seed=1),
        row("mean", "none", 0, 0.82, seed=2),
    ]
    assert robust.report(rows).splitlines() == [
        "### iid, 3 seeds",
        "",
        "| attack | hostile | mean | screened |",
        "| --- | --- | --- | --- |",
        "| none | 0% | 82.0% (80.0% to 87.0%) | 86.0% |",
        "| flip | 20% |  | 85.0% |",
    ]


def test_exactly_the_share_attacks() -> None:
    found = [Attackers(hostile=0.3, attack="flip").attack_of(0, client) for client in range(40)]
    assert (found.count("flip"), found.count(None)) == (12, 28)
    assert Attackers().attack_of(0, 0) is None


@pytest.mark.parametrize("rule", ["mean", "screened"])
def test_a_run_starts(rule: str, shared: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = (shared / "data/agnews.train.jsonl").read_bytes().split(b"\n")[:160]
    data.write_bytes(b"\n".join(lines))
    config = robust.config_of(rule, 3, 2, per_round=3, batch_size=2)
    assert (config.aggregate, config.split, config.rounds) == (rule, True, 2)
    model = shared / "models/minilm-l6-v2.Q4_0.gguf"
    ended = robust.measure(model, data, config, Attackers(hostile=0.5, attack="flip"), "iid", 8, 40)
    assert (ended.rule, ended.attack, ended.share, ended.n_clients) == (rule, "flip", 0.5, 8)
    assert ended.accuracy is not None
    assert 0 < ended.loss < 2


def test_every_set_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def measure(_: Path, __: Path, config: FederationConfig, *rest: object) -> Ended:
        seen.append((config.quorum, config.batch_size))
        return row("mean", "none", 0, 0.5)

    monkeypatch.setattr(robust, "measure", measure)
    options = "--rules mean --shares 0 --set quorum=0.9 --set batch_size=2"
    arguments = ["robust.py", "model", "data", str(tmp_path / "out.jsonl"), *options.split()]
    monkeypatch.setattr(sys, "argv", arguments)
    robust.main()
    assert seen == [(0.9, 2)]
