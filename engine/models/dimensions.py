"""Dimensions that every model has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Dimensions of a model. Each is the largest where layers differ (some llama.cpp models).

    Of our own graphs: logit_softcap, c > 0 makes c tanh(l / c) of a logit l; further_values, what a
    layer's way back reads of each row besides what it does in llama and BERT.
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    n_vocab: int
    context: int
    logit_softcap: float = 0.0
    further_values: int = 0
