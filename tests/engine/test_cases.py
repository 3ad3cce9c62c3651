"""Models and data as people bring them: the inputs of shared/cases, and what must happen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fwdllm.engine import Engine
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.errors import FwdllmError

TEXT = Example(text="The market opened higher on Monday, and shares of energy firms rose.")


def loss(path: Path, backend: str) -> float:
    return Engine.load(path, backend=backend).evaluate([TEXT]).loss


@pytest.mark.parametrize("name", ["rope-scale-linear", "rope-factor-without-type"])
def test_positions_are_scaled_as_by_llama_cpp(models: Path, shared: Path, name: str) -> None:
    """A factor under its old name, and one without a type, are of linear scaling."""
    ours, theirs = (loss(models / f"{name}.gguf", backend) for backend in ("fwdllm", "llama.cpp"))
    assert ours == pytest.approx(theirs, rel=0.01)
    assert abs(ours - loss(shared / "models/tinymix-6m.Q4_0.gguf", "fwdllm")) > 0.3


def test_a_decoder_that_looks_ahead_is_not_trained_as_causal(models: Path) -> None:
    path = models / "noncausal.gguf"
    with pytest.raises(FwdllmError, match="its attention is not causal, unlike llama's"):
        Engine.load(path, backend="fwdllm")
    with pytest.raises(FwdllmError):
        Engine.load(path).evaluate([Example(prompt="The market", completion=" fell")])


def test_a_matrix_of_one_row_may_have_one_dimension(models: Path, shared: Path) -> None:
    found = [
        Engine.load(path).embed(["a fine film", "dull"])
        for path in (models / "one-token-type.gguf", shared / "models/minilm-l6-v2.F16.gguf")
    ]
    np.testing.assert_allclose(*found, atol=1e-3)


def test_a_factor_of_rank_1_may_have_one_dimension(models: Path, shared: Path) -> None:
    model, adapter = shared / "models/tinymix-6m.Q4_0.gguf", "adapter-rank1-one-dimension.gguf"
    ours, theirs = (
        Engine.load(model, adapter=models / adapter, backend=backend).evaluate([TEXT]).loss
        for backend in ("fwdllm", "llama.cpp")
    )
    assert ours == pytest.approx(theirs, rel=0.01)
