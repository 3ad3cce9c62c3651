"""Which method and which settings suit a model; docs/estimators.md has what they come from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from fwdllm.engine.adapter import LoRAConfig
from fwdllm.engine.data import labels_of, read_jsonl
from fwdllm.engine.gguf_file import GGUFFile
from fwdllm.engine.models import family_of
from fwdllm.hub import local_path
from fwdllm.protocol.config import TrainConfig

DEFAULT_STEPS = 200

# More bottlenecks than this cost more tangents than they earn.
_MAX_ACTIVATION_RANK = 8


class Recipe(NamedTuple):
    """An adapter's shape and a run's settings."""

    lora: LoRAConfig
    train: TrainConfig


def recipe(
    model: str | os.PathLike[str], data: str | os.PathLike[str], method: str | None = None
) -> Recipe:
    """The defaults for a model, JSONL data and a method of ``TrainConfig``.

    method: None is "activation" for an encoder that learns labels and "forward-ad" otherwise.
    Errors: ModelError, DataError.
    """
    _, family = family_of(GGUFFile.open(local_path(model)))
    labels = labels_of(read_jsonl(Path(data))) if family.encoder else ()
    return recipe_for(family.encoder, len(labels), method)


def recipe_for(encoder: bool, n_labels: int, method: str | None = None) -> Recipe:
    """As ``recipe``, for a kind of model and a number of labels."""
    if method is None:
        method = "activation" if encoder else "forward-ad"
    if method != "activation":
        return Recipe(LoRAConfig(), TrainConfig(DEFAULT_STEPS, method=method))
    rank = min(max(1, n_labels - 1), _MAX_ACTIVATION_RANK) if encoder else 1
    targets = ("attn_v", "attn_output", "ffn_up", "ffn_down")
    train = TrainConfig(
        DEFAULT_STEPS, batch_size=32, perturbations=62, method=method, learning_rate=1e-2
    )
    return Recipe(LoRAConfig(rank, float(rank), targets), train)
