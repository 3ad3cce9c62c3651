"""The wireless channel: its power and noise, what they are accounted as, and runs over it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import Cli, make_cli

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.federation.channel import Channel
from fwdllm.federation.fleet import Fleet
from fwdllm.federation.simulation import Partition, SimulationResult, simulate
from fwdllm.federation.summary import summarize
from fwdllm.protocol.federation import COHORT, FederationConfig
from fwdllm.protocol.ledger import NAME, Ledger
from fwdllm.protocol.privacy import spent_epsilon
from fwdllm.protocol.replay import replay, verify
from fwdllm.protocol.secure import sums

N, D = 5, 8
CONFIG = FederationConfig(
    3, per_round=N, seeds="shared", weighted=False, perturbations=D, clip=0.5, batch_size=2
)
ROWS = np.random.default_rng(0).standard_normal((N, D))
CLIPPED = np.stack([row * min(1, 0.5 / math.hypot(*row)) for row in ROWS])


def estimates(channel: Channel, config: FederationConfig, rows: np.ndarray, n: int) -> np.ndarray:
    """Of n rounds: float64 [n, d]."""
    totals = [channel.total(config, rows, round, 0).view(np.int64) for round in range(n)]
    return np.stack(totals) / sums.SCALE


@pytest.mark.parametrize(
    ("snr_db", "sigma", "wanted"),
    [
        # The channel's own: 1 / sqrt(8 * 10), 1 / sqrt(8 * 0.01).
        (10.0, 0.0, 0.1118),
        (-20.0, 0.0, 3.5355),
        (-20.0, 2.0, 3.5355),
        # Clients add what is missing.
        (-20.0, 4.0, 4.0),
        (10.0, 2.0, 2.0),
    ],
)
def test_the_noise_of_the_sum_and_the_power_of_clients(
    snr_db: float, sigma: float, wanted: float
) -> None:
    channel = Channel("awgn", snr_db)
    config = channel.settings(dataclasses.replace(CONFIG, sigma=sigma), has_head=False)
    assert config.sigma == pytest.approx(wanted, rel=1e-3)
    errors = estimates(channel, config, ROWS, 500) - CLIPPED.sum(axis=0)
    # 4,000 of them: their variance is known to 2.2%, one deviation.
    assert np.var(errors) == pytest.approx((wanted * 0.5) ** 2, rel=0.1)
    assert abs(np.mean(errors)) < 4 * wanted * 0.5 / math.sqrt(errors.size)
    # All rows are longer than the clip, so that they use the power they have: that of the noise,
    # which is 1, times the ratio.
    random = np.random.default_rng(1)
    power = np.mean([channel.sent(config, ROWS, random) ** 2 for _ in range(500)])
    assert power == pytest.approx(10 ** (snr_db / 10), rel=0.05)
    small = np.mean([channel.sent(config, ROWS / 1e3, random) ** 2 for _ in range(100)])
    assert small < power


def test_what_is_heard_is_the_clipped_sum_and_the_noise_of_a_stream_of_its_own() -> None:
    channel = Channel("awgn", 100.0)
    config = channel.settings(CONFIG, has_head=False)
    found = estimates(channel, config, ROWS, 1)[0]
    np.testing.assert_allclose(found, CLIPPED.sum(axis=0), atol=1e-4)
    short = ROWS / 1e3  # shorter than the clip
    np.testing.assert_allclose(
        estimates(channel, config, short, 1)[0], short.sum(axis=0), atol=1e-4
    )
    noisy = Channel("awgn", 0.0)
    config = noisy.settings(CONFIG, has_head=False)
    total = noisy.total(config, ROWS, 3, 1)
    assert total.tolist() == noisy.total(config, ROWS, 3, 1).tolist()
    others = [
        noisy.total(config, ROWS, 4, 1),
        noisy.total(config, ROWS, 3, 0),
        noisy.total(dataclasses.replace(config, seed=1), ROWS, 3, 1),
    ]
    assert all((total != other).all() for other in others)


def test_clients_add_nothing_where_the_channel_has_enough() -> None:
    config = dataclasses.replace(CONFIG, sigma=2.0)
    loud, quiet = Channel("awgn", -20.0), Channel("awgn", 10.0)
    assert loud.transmission(loud.settings(config, False), N, D)[0] == 0
    own, gain = quiet.transmission(quiet.settings(config, False), N, D)
    assert own > 0
    # By hand: n t^2 + N0 / a^2 = (sigma clip)^2, and all the power is used.
    assert N * own**2 + 1 / gain**2 == pytest.approx(1.0)
    assert gain**2 * (0.5**2 / D + own**2) == pytest.approx(10.0)


def test_the_head_s_slopes_take_uses_of_the_channel_too() -> None:
    channel = Channel("awgn", 0.0)
    config = dataclasses.replace(CONFIG, head_perturbations=28)
    assert channel.settings(config, has_head=False).sigma == pytest.approx(1 / math.sqrt(8))
    assert channel.settings(config, has_head=True).sigma == pytest.approx(1 / 6)


def test_epsilon_is_that_of_the_channel_s_noise() -> None:
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting import rdp

    accountant = rdp.RdpAccountant()
    accountant.compose(dp.GaussianDpEvent(1 / math.sqrt(D * 0.01)), 3)
    wanted = accountant.get_epsilon(CONFIG.delta)
    channel = Channel("awgn", -20.0)
    # However many could have been asked: the server knows who was.
    for sigma, n in ((0.0, N), (0.0, 100 * N), (3.0, N)):
        config = channel.settings(dataclasses.replace(CONFIG, sigma=sigma), has_head=False)
        assert spent_epsilon(config, [n] * 3) == pytest.approx(wanted, rel=1e-6)
    more = channel.settings(dataclasses.replace(CONFIG, sigma=5.0), has_head=False)
    spent = spent_epsilon(more, [N] * 3)
    assert spent is not None
    assert spent < wanted


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Channel("rayleigh", 0.0), "channels are awgn; there is no 'rayleigh'"),
        (lambda: Channel("awgn", math.nan), "snr_db is from -100 to 100 decibels, not nan"),
        (lambda: Channel("awgn", 1e9), "snr_db is from -100 to 100 decibels"),
        (lambda: over(seeds="own"), "a channel adds clients' scalars, .* needs shared seeds"),
        (lambda: over(weighted=True), "counts all clients alike"),
        (lambda: over(per_round=2), "needs three clients a part"),
    ],
)
def test_what_a_channel_cannot_carry_is_refused(make: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        make()


def over(**changes: Any) -> FederationConfig:
    return Channel("awgn", 0.0).settings(dataclasses.replace(CONFIG, **changes), has_head=False)


# Runs


@pytest.fixture(scope="module")
def few(bundled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few examples."""
    path = tmp_path_factory.mktemp("few") / "few.jsonl"
    lines = (bundled.parent / "pirate.valid.jsonl").read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:12]) + "\n", encoding="utf-8")
    return path


def simulated(bundled: Path, few: Path, folder: Path, **options: Any) -> SimulationResult:
    config = dataclasses.replace(CONFIG, max_tokens=16, per_round=6, eval_every=0, snapshot_every=2)
    options = {
        "config": config,
        "channel": Channel("awgn", 0.0),
        "partition": Partition(6),
        **options,
    }
    return simulate(bundled, few, folder, lora=LoRAConfig(2, 4), eval_data=few, **options)


def theta_of(run_dir: Path) -> bytes:
    """The hash of the last adapter, of a ledger that verifies and replays."""
    with Ledger(run_dir / NAME) as ledger:
        verify(ledger)
        assert replay(ledger).theta.any()
        return ledger.rounds()[-1].theta


def test_a_run_repeats_resumes_replays_and_keeps_its_channel(
    bundled: Path, few: Path, tmp_path: Path
) -> None:
    whole = simulated(bundled, few, tmp_path / "whole")
    assert (whole.n_contributions, whole.n_rejected) == (18, 0)
    assert whole.n_perturbations == 18 * D
    simulated(bundled, few, tmp_path / "again")
    closed: list[object] = []
    options = {"on_event": closed.append, "should_stop": lambda: len(closed) > 1}
    simulated(bundled, few, tmp_path / "stopped", **options)
    for changed, sentence in (
        (Channel("awgn", 3.0), r"model\.channel\.snr_db is 3\.0, but 0\.0"),
        (None, r"model\.channel is None, but"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            simulated(bundled, few, tmp_path / "stopped", channel=changed, resume=True)
    simulated(bundled, few, tmp_path / "stopped", resume=True)
    found = {theta_of(tmp_path / name) for name in ("whole", "again", "stopped")}
    assert len(found) == 1
    # Without noise it would be another.
    simulated(bundled, few, tmp_path / "quiet", channel=Channel("awgn", 90.0))
    assert theta_of(tmp_path / "quiet") not in found


def test_a_ledger_has_the_sum_and_nothing_of_a_client(
    bundled: Path, few: Path, tmp_path: Path
) -> None:
    """Drop-outs and late ones are in no sum and not counted."""
    fleet = Fleet(dropout=0.15, stragglers=0.2, slowdown=1e6)
    result = simulated(bundled, few, tmp_path / "run", fleet=fleet)
    with Ledger(tmp_path / "run" / NAME) as ledger:
        rounds = summarize(ledger)
        contributions = [ledger.contributions(r, 0) for r in range(ledger.n_rounds)]
        assert ledger.meta.config.secure
        assert ledger.meta.config.sigma == pytest.approx(1 / math.sqrt(D))
    theta_of(tmp_path / "run")
    for summary, rows in zip(rounds, contributions, strict=True):
        clients = [message for client, message in rows if client != COHORT]
        assert len(clients) == summary.n_accepted == len(rows) - 1
        # All the same but for the client's number, and too short for eight scalars.
        assert {len(message) for message in clients} == {21}
        assert summary.loss is None
    assert sum(r.n_accepted for r in rounds) == result.n_contributions < 18


def test_attacks_that_nobody_would_see_are_refused(
    bundled: Path, few: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="nobody sees what a hostile client adds"):
        simulated(bundled, few, tmp_path / "run", fleet=Fleet(hostile=0.5))


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    return make_cli(capfd)


def test_the_command(cli: Cli, bundled: Path, few: Path, tmp_path: Path) -> None:
    run = ["simulate", bundled, few, "--run-dir", tmp_path / "run", "--preset", "dpzero"]
    run += ["--rounds", "1", "--clients", "6", "--per-round", "6", "--eval", few]
    for options in (["--channel", "awgn"], ["--snr-db", "3"]):
        done = cli(*run, *options)
        assert (done.code, "--channel and --snr-db are given together" in done.err) == (2, True)
    done = cli(*run, "--channel", "am", "--snr-db", "3")
    assert (done.code, "channels are awgn" in done.err) == (2, True)
    assert not (tmp_path / "run").exists()
    done = cli(*run, "--set", "sigma=0", "--channel", "awgn", "--snr-db", "3", "--json")
    assert done.code == 0, done.err
    assert done.json["epsilon"] > 0
