"""Dimensions that every model has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Dimensions:
    """Dimensions of a model. Each is the largest where layers differ (some llama.cpp models).

    Of our own graphs: logit_softcap, c > 0 makes c tanh(l / c) of a logit l. For the plan of
    memory: hidden_arrays, how many arrays [rows, hidden] exist at once, by default gate, up and
    their product; fused_qkv, whether one matrix makes q, k and v; further_values, what a layer's
    way back reads of each row besides what it does in llama and BERT.
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    n_vocab: int
    context: int
    hidden_arrays: int = 3
    fused_qkv: bool = False
    logit_softcap: float = 0.0
    further_values: int = 0
