"""The study of the wireless channel: its privacy, its table, and that its runs start."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import wireless
from wireless import Row, config_of

from fwdllm.federation.channel import Channel
from fwdllm.protocol.privacy import spent_epsilon


def test_noise_for_an_epsilon_is_the_least() -> None:
    pytest.importorskip("dp_accounting")
    config = config_of(4, 12, 100, 0, 1.0)
    sigma = wireless.sigma_for(config, 8.0)
    for factor, within in ((1.0, True), (0.99, False)):
        tried = dataclasses.replace(config, sigma=sigma * factor, secure=True)
        spent = spent_epsilon(tried, [100] * 12)
        assert spent is not None
        assert (spent <= 8) == within


def test_a_table_has_a_row_for_each_k() -> None:
    rows = [
        Row(4, 20.0, None, 0.05, 9e4, 1.0, 0.75, 1.0),
        Row(1, 20.0, None, 0.07, 5e4, 1.0, 0.5, 1.0),
        Row(4, 20.0, 8.0, 2.3, 7.99, 1.0, 0.625, 1.0),
    ]
    assert wireless.report(rows).splitlines()[::2] == [
        "| K | 20 dB | 20 dB, epsilon 8 |",
        "| 1 | 50.0% (5e+04) |  |",
    ]
    assert wireless.report(rows).splitlines()[3] == "| 4 | 75.0% (9e+04) | 62.5% (7.99) |"


def test_a_run(shared: Path, tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting")
    data = tmp_path / "few.jsonl"
    lines = (shared / "data/agnews.train.jsonl").read_bytes().splitlines()[:60]
    data.write_bytes(b"\n".join(lines))
    model = shared / "models/minilm-l6-v2.Q4_0.gguf"
    config = config_of(4, 2, 3, 0, 1.0)
    for target in (None, 8.0):
        row = wireless.measure(model, data, config, Channel("awgn", -10.0), target, 20)
        assert (row.k, row.snr_db, row.target) == (4, -10.0, target)
        assert 0 <= row.accuracy <= 1
        if target is None:  # five uses of the channel
            assert row.sigma == pytest.approx(2**0.5)
        else:
            assert row.epsilon <= 8
