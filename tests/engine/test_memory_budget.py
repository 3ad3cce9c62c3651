"""A memory budget changes the order of work and the pages kept, but no bit of a result."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.data.batch import Batch, Tokens, pack, split
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import SLOPE_METHODS
from fwdllm.kernels.types import QuantType

SHAPE = Shape(3, 256, 4, 2, 64, 512, 2048)


def random_batch(lengths: list[int]) -> Batch:
    rng = np.random.default_rng(0)
    return pack([Tokens(rng.integers(5, 300, n).tolist(), [True] * n) for n in lengths])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "model.gguf"
    make_decoder(path, SHAPE, QuantType.Q4_0)
    return path


@pytest.mark.parametrize("max_rows", [1, 12, 20, 1000])
def test_split_keeps_every_row_and_label(max_rows: int) -> None:
    batch = random_batch([5, 7, 3, 9])
    parts = split(batch, max_rows)
    assert all(p.n_rows <= max_rows or p.n_sequences == 1 for p in parts)
    np.testing.assert_array_equal(np.concatenate([p.ids for p in parts]), batch.ids)
    np.testing.assert_array_equal(np.concatenate([p.label_ids for p in parts]), batch.label_ids)
    for part in parts:
        np.testing.assert_array_equal(part.ids[part.label_rows + 1], part.label_ids)


@pytest.mark.parametrize("method", [*SLOPE_METHODS, "backprop"])
@pytest.mark.parametrize("block_rows", [8, 300])
def test_blocks_and_several_passes_change_no_bit(
    model: Path, monkeypatch: pytest.MonkeyPatch, method: str, block_rows: int
) -> None:
    batch, seeds = random_batch([40, 33, 21, 40, 9]), np.arange(9, dtype=np.uint64)
    engine = Engine.load(model, LoRAConfig(layers=(1, 2)))
    want = engine.directional_derivatives(batch, seeds, method)
    memory = engine.graph.plan(batch, 4)
    plan = type(memory)(block_rows, 5, 0)  # no layer fits
    monkeypatch.setattr(engine.graph, "plan", lambda batch, n_lanes: plan)
    got = engine.directional_derivatives(batch, seeds, method)
    assert got.loss == pytest.approx(want.loss, rel=1e-12)
    np.testing.assert_array_equal(got.derivative, want.derivative)


def test_an_impossible_budget_is_one_sentence(model: Path) -> None:
    engine = Engine.load(model, LoRAConfig(), memory_budget=30 * 2**20)
    with pytest.raises(ConfigError, match=r"needs about .* MiB .* fewer or shorter examples"):
        engine.directional_derivatives(random_batch([40]), np.arange(2, dtype=np.uint64))


MEASURE = """
import sys
import numpy as np
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.data.batch import Tokens, pack
from fwdllm.resources import peak_rss_bytes

budget = int(sys.argv[2]) or None
engine = Engine.load(sys.argv[1], LoRAConfig(), memory_budget=budget)
ids = np.random.default_rng(0).integers(5, 2000, 32).tolist()
batch = pack([Tokens(ids, [True] * len(ids))])
for step in range(2):
    probe = engine.directional_derivatives(batch, np.arange(3, dtype=np.uint64))
print(peak_rss_bytes(), probe.loss, *probe.derivative)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_the_budget_holds(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    make_decoder(path, Shape(8, 2048, 32, 4, 64, 5632, 32000), QuantType.Q4_0)
    budget = 220 * 2**20

    def run(budget: int) -> list[str]:
        command = [sys.executable, "-c", MEASURE, str(path), str(budget)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()

    within, free = run(budget), run(0)
    assert int(within[0]) <= budget < int(free[0])
    assert within[1:] == free[1:]
