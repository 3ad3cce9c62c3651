"""SpIEL's directions: a sparse change of the weights that is an ordinary adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import MODEL, make_cli, pirate_rows, write_rows

from fwdllm import (
    DirectionsConfig,
    Engine,
    LoRAConfig,
    TrainConfig,
    evaluate,
    read_jsonl,
    recipe,
    tune,
)
from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.directions import spiel
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.settings import METHODS, Scope
from fwdllm.kernels import cpu
from fwdllm.protocol.local import StepResult

pytestmark = pytest.mark.usefixtures("no_plot")
CONFIG = DirectionsConfig("spiel", keep=0.25, reselect=4)
SHAPES = {f"blk.{layer}.attn_q": (40, 24) for layer in range(2)}


@pytest.fixture
def adapter() -> Adapter:
    return Adapter.create("llama", SHAPES, LoRAConfig(3, targets=("attn_q",)), 1, cpu)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "pirate.jsonl", pirate_rows(24))


def run(data: Path, output: Path, method: str, steps: int = 12, **options: Any) -> Any:
    lora = recipe(MODEL, data, method).lora
    rate = 0.1 if method in ("forward-ad", "central") else 0.03
    train = TrainConfig(steps, batch_size=4, perturbations=4, learning_rate=rate, method=method)
    made = {"lora": lora, "train": train, "directions": CONFIG, "held_out": 4, **options}
    return tune(MODEL, data, output, **made)


def entries(path: Path) -> tuple[int, int]:
    """Of a saved adapter: how many elements of the weights it changes, and how many it has.

    They are in columns that rows of A pick.
    """
    adapter = Engine.load(MODEL, adapter=path).adapter
    assert adapter is not None
    changed = total = 0
    for target in adapter.targets:
        lora = adapter.factors(target)
        assert (np.sort(lora.a, axis=1)[:, :-1] == 0).all()
        assert (lora.a.max(axis=1) == 1).all()
        assert lora.a.sum(axis=0).max() == 1
        changed += np.count_nonzero(lora.b @ lora.a)
        total += lora.b.size
    return changed, total


def test_a_row_of_a_picks_a_column_and_only_b_is_perturbed(adapter: Adapter) -> None:
    directions = spiel(adapter, CONFIG, seed=5)
    found = [np.argmax(adapter.factors(t).a, axis=1).tolist() for t in adapter.targets]
    assert all(len(set(columns)) == 3 for columns in found)
    assert found[0] != found[1]
    v = directions.expand(directions.combine(np.array([9], np.uint64), np.ones(1, np.float32)))
    for t in adapter.targets:
        lora = adapter.factors(t)
        np.testing.assert_array_equal(np.count_nonzero(lora.a, axis=1), 1)
        a, b = np.split(v[t.offset : t.offset + t.size(3)], [lora.a.size])
        assert not a.any()
        assert b.all()
    assert directions.n_trained == round(0.25 * 2 * 40 * 3)


def test_columns_are_the_seeds(adapter: Adapter) -> None:
    thetas = []
    for seed in (5, 5, 6):
        spiel(adapter, CONFIG, seed)
        thetas.append(adapter.theta.tobytes())
    assert thetas[0] == thetas[1] != thetas[2]


def test_a_scope_leaves_other_targets_alone(adapter: Adapter) -> None:
    before = adapter.factors(adapter.targets[0]).a.copy()
    directions = spiel(adapter, DirectionsConfig("spiel", scope=Scope(layers=(1,))), 5)
    np.testing.assert_array_equal(adapter.factors(adapter.targets[0]).a, before)
    assert directions.mask.sum() == 40 * 3


def test_more_columns_than_there_are_are_refused() -> None:
    wide = Adapter.create(
        "llama",
        {"blk.0.attn_q": (40, 24), "blk.0.attn_v": (40, 8)},
        LoRAConfig(10, targets=("attn_q", "attn_v")),
        1,
        cpu,
    )
    with pytest.raises(ConfigError, match="attn_v has no 10 columns"):
        spiel(wide, CONFIG, 5)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "forward-difference"])
def test_it_learns_by_few_entries_of_the_weights(data: Path, tmp_path: Path, method: str) -> None:
    result = run(data, tmp_path / "a.gguf", method)
    assert result.loss_after < result.loss_before
    changed, total = entries(result.adapter)
    assert 0.9 * result.n_trainable < changed <= result.n_trainable == round(0.25 * total)
    assert evaluate(MODEL, data, adapter=result.adapter).loss < evaluate(MODEL, data).loss


def test_a_folder_of_peft_has_the_same_entries(data: Path, tmp_path: Path) -> None:
    gguf, peft = (run(data, tmp_path / name, "backprop", 4) for name in ("a.gguf", "folder"))
    assert entries(gguf.adapter) == entries(peft.adapter)
    losses = [evaluate(MODEL, data, adapter=r.adapter).loss for r in (gguf, peft)]
    assert losses[0] == losses[1]


def test_llama_cpp_computes_with_it(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path / "a.gguf", "backprop")
    ids = Engine.load(MODEL).encode(read_jsonl(data)[:1]).ids.tolist()
    plain, want, found = (
        Engine.load(MODEL, exact=True).logits(ids),
        Engine.load(MODEL, adapter=result.adapter, exact=True).logits(ids),
        generation.logits(MODEL, ids, result.adapter),
    )
    moved = np.linalg.norm(want - plain)
    assert np.linalg.norm(found - want) < 0.1 * moved


def test_a_run_stopped_anywhere_comes_to_the_same_bytes(data: Path, tmp_path: Path) -> None:
    """Before a choice, while all candidates are estimated, and after it."""
    config = DirectionsConfig("spiel", keep=0.25, reselect=8)
    options: dict[str, Any] = {"method": "backprop", "steps": 16, "directions": config}
    want = run(data, tmp_path / "whole.gguf", **options).adapter.read_bytes()
    for stop in (1, 7, 9):
        seen = 0

        def count(event: object) -> None:
            nonlocal seen
            seen += isinstance(event, StepResult)

        output = tmp_path / f"{stop}.gguf"
        stopped = {**options, "on_event": count, "should_stop": lambda: seen == stop}  # noqa: B023
        assert run(data, output, **stopped).stopped_early
        assert run(data, output, **options, resume=True).adapter.read_bytes() == want


def test_a_checkpoint_of_other_directions_is_refused(data: Path, tmp_path: Path) -> None:
    result = run(data, tmp_path / "a.gguf", "backprop", 4)
    config = result.run_dir / "config.json"
    config.write_text(config.read_text().replace('"spiel"', '"normal"'))
    with pytest.raises(ConfigError, match="does not fit: it is of a sparse adapter"):
        run(data, result.adapter, "backprop", 4, directions=DirectionsConfig(
            "normal", keep=0.25, reselect=4), resume=True)  # fmt: skip


def test_a_run_that_an_older_version_began_goes_on(data: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 2, "directions": DirectionsConfig("lora-fa")}
    result = run(data, tmp_path / "a.gguf", "backprop", **options)
    config = result.run_dir / "config.json"
    recorded = json.loads(config.read_text())
    del recorded["directions"]["reselect"]
    config.write_text(json.dumps(recorded))
    assert run(data, tmp_path / "a.gguf", "backprop", **options, resume=True).steps == 2


def test_a_run_too_short_to_choose_leaves_a_sentence_and_no_files(
    data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "a.gguf"
    found = make_cli(capfd)("tune", MODEL, data, "-o", output, "--held-out", "4", "--steps", "10",
                            "--directions", "spiel")  # fmt: skip
    assert found.code == 2
    assert "10 updates are over before what is trained has been chosen, after 10" in found.err
    assert [path.name for path in tmp_path.iterdir()] == ["pirate.jsonl"]
