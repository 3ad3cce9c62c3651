"""Simulated federations whose server sees sums of clients' scalars alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.fleet import Fleet
from fwdllm.federation.simulation import Partition, simulate
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.presets import preset
from fwdllm.protocol.replay import replay
from fwdllm.protocol.secure.sums import threshold

LORA = LoRAConfig(2, 4)
SMALL = {"per_round": 6, "batch_size": 1, "max_tokens": 16, "eval_every": 0, "secure": True}


def run(
    bundled: Path, folder: Path, dropout: float, rounds: int, n: int = 6, **changes: object
) -> Path:
    data = folder / "data.jsonl"
    lines = (bundled.parent / "pirate.train.jsonl").read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines[:24]) + "\n", encoding="utf-8")
    config = preset("mezo", rounds=rounds, **{**SMALL, **changes})
    simulate(
        bundled,
        data,
        folder / "run",
        config,
        lora=LORA,
        partition=Partition(n),
        fleet=Fleet(dropout=dropout),
    )
    return folder / "run" / NAME


def test_a_part_of_too_few_has_no_sum_as_over_a_network(bundled: Path, tmp_path: Path) -> None:
    ledger_path = run(bundled, tmp_path, 0.3, 4, max_parts=3)
    with Ledger(ledger_path) as ledger:
        found = [
            (len(ledger.assignments(round, part)), ledger.n_accepted(round, part))
            for round in range(4)
            for part, _, _ in ledger.parts(round)
        ]
        replay(ledger)
        assert any(n for _, n in found)
        assert not all(n for _, n in found)
        for asked, n in found:
            assert n == 0 or n >= threshold(ledger.meta.config, asked)


def test_sums_are_the_plain_means_to_rounding(bundled: Path, tmp_path: Path) -> None:
    thetas = []
    for secure in (False, True):
        folder = tmp_path / str(secure)
        folder.mkdir()
        with Ledger(run(bundled, folder, 0.0, 1, secure=secure)) as ledger:
            thetas.append(replay(ledger).theta)
    assert np.abs(thetas[0]).max() > 0
    np.testing.assert_allclose(thetas[1], thetas[0], rtol=1e-4, atol=1e-6)


def test_two_clients_are_too_few(bundled: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs three clients, and there are 2"):
        run(bundled, tmp_path, 0.0, 2, n=2)
