"""Which method and settings suit a model; docs/estimators.md has the measurements behind them."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import NamedTuple

from fwdllm.engine.backends import Backend, choose
from fwdllm.engine.data.jsonl import Data, labels_of, read_data
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.estimators import readout
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.settings import EXACT_METHODS, LoRAConfig
from fwdllm.hub import local_path
from fwdllm.protocol.config import AUTO, TrainConfig

DEFAULT_STEPS = 200

# Layers to adapt: the first of these tuples that a model has completely, else all linear layers.
_TARGETS = (LoRAConfig().targets, ("attn_qkv",), ("ssm_in", "ssm_out"))

# A higher rank would need more tangents than it is worth.
_MAX_ACTIVATION_RANK = 8


# Settings of what a gradient is estimated from.
_OF_DIRECTIONS = ("perturbations", "epsilon", "per_example")


class Recipe(NamedTuple):
    """An adapter's shape and a run's settings."""

    lora: LoRAConfig
    train: TrainConfig


def recipe(
    model: str | os.PathLike[str],
    data: str | os.PathLike[str] | Data,
    method: str = AUTO,
    backend: str = "auto",
    given: Iterable[str] = (),
) -> Recipe:
    """The defaults for a model, JSONL data and a method of ``TrainConfig``.

    method: "auto" is what learns most: "backprop" with a graph of our own, with llama.cpp
    "readout", or "central" if the model or what is given is not for that.  backend: see
    ``Engine.load``.  given: names of the settings that have a value already.
    Errors: ModelError, DataError, ConfigError.
    """
    chosen = choose(GGUFFile.open(local_path(model)), backend)
    return recipe_for(chosen, len(labels_of(read_data(data).examples)), method, given)


def recipe_for(
    backend: Backend, n_labels: int, method: str = AUTO, given: Iterable[str] = ()
) -> Recipe:
    """As ``recipe``, for a model and a number of labels."""
    if method == AUTO:
        method = _best(backend, given)
    backend.check_method(method)
    if method == "readout":
        return _readout(backend)
    if method != "activation":
        lora = LoRAConfig(targets=_targets(backend.linear))
        return Recipe(lora, TrainConfig(DEFAULT_STEPS, method=method))
    rank = min(max(1, n_labels - 1), _MAX_ACTIVATION_RANK) if backend.encoder else 1
    targets = ("attn_v", "attn_output", "ffn_up", "ffn_down")
    train = TrainConfig(
        DEFAULT_STEPS, batch_size=32, perturbations=62, method=method, learning_rate=1e-2
    )
    return Recipe(LoRAConfig(rank, float(rank), targets), train)


def _best(backend: Backend, given: Iterable[str]) -> str:
    if backend.own:
        return "backprop"
    free = {*_OF_DIRECTIONS, "targets", "layers"}.isdisjoint(given)
    return "readout" if free and _has_readout(backend) else "central"


def _has_readout(backend: Backend) -> bool:
    last = backend.args.n_layers - 1
    return not backend.encoder and f"blk.{last}.{readout.TARGET}" in backend.linear


def _readout(backend: Backend) -> Recipe:
    last = backend.args.n_layers - 1
    if not _has_readout(backend):
        raise ConfigError(
            f"method readout trains {readout.TARGET} of a decoder's last layer, and this model "
            "has none: choose another method"
        )
    lora = LoRAConfig(32, 64.0, (readout.TARGET,), (last,))
    return Recipe(lora, TrainConfig(DEFAULT_STEPS, method="readout", learning_rate=5e-3))


def check_given(method: str, given: Iterable[str]) -> None:
    """ConfigError for settings of random directions, given to a method that has none."""
    for name in given:
        if method in EXACT_METHODS and name in _OF_DIRECTIONS:
            raise ConfigError(
                f"method {method} goes along no random directions, so {name} has no meaning: "
                "leave it out, or choose method forward-ad"
            )


def _targets(linear: Iterable[str]) -> tuple[str, ...]:
    known = {name.split(".", 2)[2] for name in linear}
    for targets in _TARGETS:
        if known.issuperset(targets):
            return targets
    return tuple(sorted(known))
