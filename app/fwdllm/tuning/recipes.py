"""Which method and settings suit a model; docs/estimators.md has the measurements behind them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from fwdllm.engine.backends import Backend, choose
from fwdllm.engine.data.jsonl import labels_of, read_jsonl
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.settings import LoRAConfig
from fwdllm.hub import local_path
from fwdllm.protocol.config import TrainConfig

DEFAULT_STEPS = 200

# Layers to adapt: the first of these tuples that a model has completely, else all linear layers.
_TARGETS = (LoRAConfig().targets, ("attn_qkv",), ("ssm_in", "ssm_out"))

# A higher rank would need more tangents than it is worth.
_MAX_ACTIVATION_RANK = 8


class Recipe(NamedTuple):
    """An adapter's shape and a run's settings."""

    lora: LoRAConfig
    train: TrainConfig


def recipe(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str],
    method: str | None = None,
    backend: str = "auto",
) -> Recipe:
    """The defaults for a model, JSONL data and a method of ``TrainConfig``.

    method: None: on fwdllm's own backend "activation" for an encoder and "forward-ad" otherwise; on
    llama.cpp "central".  backend: see ``Engine.load``.
    Errors: ModelError, DataError, ConfigError.
    """
    chosen = choose(GGUFFile.open(local_path(model)), backend)
    labels = labels_of(read_jsonl(Path(data))) if chosen.encoder else ()
    return recipe_for(chosen, len(labels), method)


def recipe_for(backend: Backend, n_labels: int, method: str | None = None) -> Recipe:
    """As ``recipe``, for a model's backend and a number of labels."""
    if method is None:
        method = "activation" if backend.encoder and backend.own else backend.method
    backend.check_method(method)
    if method != "activation":
        lora = LoRAConfig(targets=_targets(backend.linear))
        return Recipe(lora, TrainConfig(DEFAULT_STEPS, method=method))
    rank = min(max(1, n_labels - 1), _MAX_ACTIVATION_RANK) if backend.encoder else 1
    targets = ("attn_v", "attn_output", "ffn_up", "ffn_down")
    train = TrainConfig(
        DEFAULT_STEPS, batch_size=32, perturbations=62, method=method, learning_rate=1e-2
    )
    return Recipe(LoRAConfig(rank, float(rank), targets), train)


def _targets(linear: Iterable[str]) -> tuple[str, ...]:
    known = {name.split(".", 2)[2] for name in linear}
    for targets in _TARGETS:
        if known.issuperset(targets):
            return targets
    return tuple(sorted(known))
