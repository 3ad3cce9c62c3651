"""The scripts behind docs/estimators.md run, and count what they say they count."""

from __future__ import annotations

import json
from pathlib import Path

import estimators
import numpy as np
import pytest
import runs
import sst2
from shallow import first_layers


def metrics(folder: Path, losses: list[float], n_tokens: int) -> Path:
    folder.mkdir()
    records = [{"event": "eval", "step": 0, "loss": 9.0, "n_tokens": 5}]
    records += [{"event": "step", "loss": loss, "n_tokens": n_tokens} for loss in losses]
    lines = [json.dumps(record) + "\n" for record in records]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def test_a_curve_is_a_running_mean_over_lane_tokens(tmp_path: Path) -> None:
    curve = runs.training_curve(metrics(tmp_path / "run", [4.0, 2.0, 1.0], 500_000))
    tokens, losses = zip(*curve, strict=True)
    assert tokens == (0.5, 1.0, 1.5)
    assert losses[0] == 4.0
    assert losses[1] == pytest.approx((0.95 * 4 + 2) / 1.95)
    assert runs.tokens_to_reach(curve, losses[1]) == 1.0
    assert runs.tokens_to_reach(curve, 1.0) is None


def test_runs_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a = metrics(tmp_path / "a", [4.0, 2.0, 1.0], 500_000)
    b = metrics(tmp_path / "b", [4.0, 4.0, 4.0], 500_000)
    plot = tmp_path / "plot.png"
    monkeypatch.setattr("sys.argv", ["runs", str(plot), f"a={a}", f"b={b}", "--at", "3"])
    runs.main()
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| a | 2.2822 | 1.00 M |",
        "| b | 4.0000 | never |",
    ]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_shares_of_the_gap(tmp_path: Path) -> None:
    def row(run: str, loss: float) -> sst2.Row:
        return sst2.Row(run, 0, 600, 1_000_000, loss, 0.8, 1.0)

    rows = [row("head alone", 0.4), row("backprop", 0.2), row("activation", 0.3)]
    assert sst2.report(rows).splitlines()[-2] == ("| activation | 0.3000 | 80.0% | 50% | 1.0 M |")
    sst2.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists()


@pytest.fixture(scope="module")
def encoder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "minilm-l2.gguf"
    return first_layers(shared / "models/minilm-l6-v2.Q4_0.gguf", 2, path)


def test_every_run_on_sst2_starts(shared: Path, encoder: Path) -> None:
    model, data = encoder, shared / "data/sst2.train.jsonl"
    for name in ("head alone", "backprop", "activation"):
        [row] = sst2.measure(model, data, name, 0, n_held_out=40, steps=3)
        assert (row.run, row.step) == (name, 3)
        assert np.isfinite(row.loss)
        assert row.accuracy <= 1


def test_every_way_to_estimate(
    shared: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With few examples; activations of a measured B need far fewer tangents."""
    monkeypatch.setattr(estimators, "BATCH", 4)
    monkeypatch.setattr(estimators, "PERTURBATIONS", (8,))
    monkeypatch.setattr(estimators, "REPEATS", 2)
    monkeypatch.setattr(estimators, "HEAD_STEPS", 10)
    examples = estimators.read_jsonl(shared / "data/sst2.train.jsonl")[:44]
    points = list(estimators.measure(encoder, examples))
    found = {point.way: point for point in points}
    assert list(found) == list(estimators.WAYS)
    assert len(estimators.table(points).splitlines()) == 2 + len(found)
    shared_seeds = np.mean(found["forward-ad"].cosines)
    assert np.mean(found["activation, rank 1, measured B"].cosines) > 5 * shared_seeds
    assert found["forward-ad"].d == 24576
    assert (
        found["forward-ad"].n_tokens * 17 == found["central"].n_tokens * 9
    )  # one more for the head
