"""A model's shapes small enough to count by hand, and adapters for it with random values."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.adapters.io import load_adapter, save_gguf, save_peft
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import reference

# Width 16, 2 heads of 8 over 1 key/value head, feed-forward 24.
N_HEADS, N_KV_HEADS, WIDTH = 2, 1, 16
BLOCK = {
    "attn_q": (16, 16),
    "attn_k": (8, 16),
    "attn_v": (8, 16),
    "attn_output": (16, 16),
    "ffn_gate": (24, 16),
    "ffn_up": (24, 16),
    "ffn_down": (16, 24),
}


def shapes(n_layers: int = 3) -> dict[str, tuple[int, int]]:
    return {f"blk.{layer}.{name}": BLOCK[name] for layer in range(n_layers) for name in BLOCK}


def random_adapter(
    config: LoRAConfig | None = None, architecture: str = "llama", head: Head | None = None
) -> Adapter:
    config = config or LoRAConfig(rank=2, alpha=3.0)
    adapter = Adapter.create(architecture, shapes(), config, 1, reference, head)
    adapter.theta[:] = np.random.default_rng(5).standard_normal(len(adapter.theta))
    return adapter


def load(path: Path, architecture: str = "llama") -> Adapter:
    return load_adapter(path, architecture, shapes(), N_HEADS, N_KV_HEADS, reference)


def save(adapter: Adapter, path: Path) -> Path:
    """Write a GGUF file if the name says so, else a PEFT folder."""
    if path.suffix == ".gguf":
        save_gguf(adapter, path)
    else:
        save_peft(adapter, path, N_HEADS, N_KV_HEADS, "someone/a-model")
    return path
