"""Small models with random weights, of architectures that llama.cpp has graphs of.

The tables have what llama.cpp expects of each architecture (its ``src/models/*.cpp``): metadata,
and tensors by name and shape; a matrix's shape ends with n_out, n_in. Every feature in which model
families differ is in one of the architectures: fused and single matrices, biases, scales, sliding
windows, learned positions, parallel residuals, experts, a recurrent state, an
encoder.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fwdllm.bench.shapes import SHAPES
from fwdllm.bench.synthetic import Matrix, Metadata, make_decoder, write_model
from fwdllm.engine.errors import ConfigError
from fwdllm.kernels.types import QuantType

Shapes = Mapping[str, tuple[int, ...]]

LAYERS, VOCAB, CONTEXT = 2, 512, 512
# Rows of 256 are whole blocks of every type.
WIDTH, HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 256, 512, 4, 2, 64
KV = KV_HEADS * HEAD_DIM
WINDOW = 16  # shorter than the tests' sequences
EXPERTS, EXPERTS_USED, EXPERT_HIDDEN = 4, 2, 256
# Mamba: llama.cpp requires an inner size of twice the width.
INNER, STATE, STEP_RANK, KERNEL = 2 * WIDTH, 16, 16, 4


@dataclass(frozen=True)
class Architecture:
    """What a model file of an architecture needs.

    model: tensors outside the layers.  layer: tensors of each layer.  metadata: added to
    ``_DIMENSIONS``, or replacing them.  gguf_name: llama.cpp's name, if it differs.
    """

    model: Shapes
    layer: Shapes
    metadata: Metadata = field(default_factory=dict)
    gguf_name: str | None = None


def _biased(tensors: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors, and a bias for each weight."""
    biases = {name.replace(".weight", ".bias"): shape[:1] for name, shape in tensors.items()}
    return {**tensors, **biases}


_EMBEDDING: Shapes = {"token_embd.weight": (VOCAB, WIDTH)}
_OUTPUT: Shapes = {"output.weight": (VOCAB, WIDTH)}
_OUTPUT_NORM: Shapes = {"output_norm.weight": (WIDTH,)}
_TIED: Shapes = {**_EMBEDDING, **_OUTPUT_NORM}
_UNTIED: Shapes = {**_TIED, **_OUTPUT}
_ATTENTION_NORM: Shapes = {"attn_norm.weight": (WIDTH,)}
_FFN_NORM: Shapes = {"ffn_norm.weight": (WIDTH,)}
_NORMS: Shapes = {**_ATTENTION_NORM, **_FFN_NORM}
_QKV: Shapes = {
    "attn_q.weight": (WIDTH, WIDTH),
    "attn_k.weight": (KV, WIDTH),
    "attn_v.weight": (KV, WIDTH),
}
_ATTENTION_OUTPUT: Shapes = {"attn_output.weight": (WIDTH, WIDTH)}
_ATTENTION: Shapes = {**_QKV, **_ATTENTION_OUTPUT}
# Without grouped KV heads: q, k and v have the same size.
_FUSED_ATTENTION: Shapes = {"attn_qkv.weight": (3 * WIDTH, WIDTH), **_ATTENTION_OUTPUT}
_MLP: Shapes = {"ffn_up.weight": (HIDDEN, WIDTH), "ffn_down.weight": (WIDTH, HIDDEN)}
_GATED_MLP: Shapes = {"ffn_gate.weight": (HIDDEN, WIDTH), **_MLP}
_FUSED_GATED_MLP: Shapes = {**_MLP, "ffn_up.weight": (2 * HIDDEN, WIDTH)}
_EXPERTS: Shapes = {
    "ffn_gate_inp.weight": (EXPERTS, WIDTH),
    "ffn_gate_exps.weight": (EXPERTS, EXPERT_HIDDEN, WIDTH),
    "ffn_up_exps.weight": (EXPERTS, EXPERT_HIDDEN, WIDTH),
    "ffn_down_exps.weight": (EXPERTS, WIDTH, EXPERT_HIDDEN),
}
_SHARED_EXPERT: Shapes = {
    "ffn_gate_inp_shexp.weight": (WIDTH,),
    "ffn_gate_shexp.weight": (HIDDEN, WIDTH),
    "ffn_up_shexp.weight": (HIDDEN, WIDTH),
    "ffn_down_shexp.weight": (WIDTH, HIDDEN),
}
_MAMBA: Shapes = {
    "ssm_in.weight": (2 * INNER, WIDTH),
    "ssm_conv1d.weight": (INNER, KERNEL),
    "ssm_conv1d.bias": (INNER,),
    "ssm_x.weight": (STEP_RANK + 2 * STATE, INNER),
    "ssm_dt.weight": (INNER, STEP_RANK),
    "ssm_dt.bias": (INNER,),
    "ssm_a": (INNER, STATE),
    "ssm_d": (INNER,),
    "ssm_out.weight": (WIDTH, INNER),
}

_RMS: Metadata = {"attention.layer_norm_rms_epsilon": 1e-6}
_LAYER_NORM: Metadata = {"attention.layer_norm_epsilon": 1e-5}
_UNGROUPED: Metadata = {"attention.head_count_kv": HEADS}
_PARTIAL_ROPE: Metadata = {"rope.dimension_count": HEAD_DIM // 4}
_ROUTED: Metadata = {"expert_count": EXPERTS, "expert_used_count": EXPERTS_USED}

_DIMENSIONS: Metadata = {
    "context_length": CONTEXT,
    "embedding_length": WIDTH,
    "block_count": LAYERS,
    "feed_forward_length": HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": KV_HEADS,
    "vocab_size": VOCAB,
}

ARCHITECTURES = {
    "olmo2": Architecture(
        _UNTIED,
        {
            **_ATTENTION,
            **_GATED_MLP,
            "attn_q_norm.weight": (WIDTH,),
            "attn_k_norm.weight": (KV,),
            "post_attention_norm.weight": (WIDTH,),
            "post_ffw_norm.weight": (WIDTH,),
        },
        {
            **_RMS,
            "attention.sliding_window": WINDOW,
            "attention.sliding_window_pattern": 2,  # on every other layer
        },
    ),
    "phi3": Architecture(
        _UNTIED, {**_NORMS, **_FUSED_ATTENTION, **_FUSED_GATED_MLP}, {**_RMS, **_UNGROUPED}
    ),
    "gpt2": Architecture(
        {**_EMBEDDING, "position_embd.weight": (CONTEXT, WIDTH), **_biased(_OUTPUT_NORM)},
        _biased({**_NORMS, **_FUSED_ATTENTION, **_MLP}),
        {**_LAYER_NORM, **_UNGROUPED},
    ),
    "gptneox": Architecture(
        {**_EMBEDDING, **_OUTPUT, **_biased(_OUTPUT_NORM)},
        _biased({**_NORMS, **_FUSED_ATTENTION, **_MLP}),
        {**_LAYER_NORM, **_UNGROUPED, **_PARTIAL_ROPE, "use_parallel_residual": True},
    ),
    "granite": Architecture(
        _TIED,
        {**_NORMS, **_ATTENTION, **_GATED_MLP},
        {
            **_RMS,
            "embedding_scale": 4.0,
            "attention.scale": 1 / HEAD_DIM,
            "residual_scale": 0.5,
            "logit_scale": 2.0,  # a divisor
        },
    ),
    "stablelm": Architecture(
        {**_EMBEDDING, **_OUTPUT, **_biased(_OUTPUT_NORM)},
        {**_biased(_NORMS), **_ATTENTION, **_GATED_MLP},
        {**_LAYER_NORM, **_PARTIAL_ROPE},
    ),
    "mixtral": Architecture(
        _UNTIED,
        {**_NORMS, **_ATTENTION, **_EXPERTS},
        {**_RMS, **_ROUTED, "feed_forward_length": EXPERT_HIDDEN},
        gguf_name="llama",
    ),
    "qwen2moe": Architecture(
        _UNTIED,
        {**_NORMS, **_biased(_QKV), **_ATTENTION_OUTPUT, **_EXPERTS, **_SHARED_EXPERT},
        {
            **_RMS,
            **_ROUTED,
            "expert_feed_forward_length": EXPERT_HIDDEN,
            "expert_shared_feed_forward_length": HIDDEN,
        },
    ),
    "mamba": Architecture(
        _TIED,
        {**_ATTENTION_NORM, **_MAMBA},
        {
            **_RMS,
            "feed_forward_length": 0,
            "attention.head_count": 0,
            "attention.head_count_kv": 0,
            "ssm.conv_kernel": KERNEL,
            "ssm.inner_size": INNER,
            "ssm.state_size": STATE,
            "ssm.time_step_rank": STEP_RANK,
        },
    ),
    "modern-bert": Architecture(
        {**_TIED, "token_embd_norm.weight": (WIDTH,)},
        {**_NORMS, **_FUSED_ATTENTION, **_FUSED_GATED_MLP},
        {
            **_LAYER_NORM,
            **_UNGROUPED,
            "attention.causal": False,
            "attention.sliding_window": WINDOW,  # on all layers but the first of every three
            "rope.freq_base": 160000.0,
            "rope.freq_base_swa": 10000.0,
            "pooling_type": 1,  # the mean
        },
    ),
}

# Tensors that are multiplied element by element, or added: by the end of the name, the mean of the
# random values. With a negative ssm_a the state decays.
_VECTORS = {".bias": 0.0, "norm.weight": 1.0, "ssm_d": 1.0, "ssm_a": -1.0}
_VECTOR_STD = 0.1

# Matrices that stay float32: llama.cpp's converter never quantizes them, and rows of ssm_dt are
# shorter than a block.
_FLOAT32 = ("position_embd", "ffn_gate_inp", "ffn_gate_inp_shexp", "ssm_conv1d", "ssm_dt")

# Where a block's output joins the residual stream.
_RESIDUAL = ("attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp", "ssm_out")


def make_named(path: str | os.PathLike[str], name: str, type: QuantType, seed: int = 0) -> None:
    """Write the model with a name in ``SHAPES`` or ``ARCHITECTURES``, all matrices of ``type``.

    Errors: those of ``make_decoder``; ConfigError, listing the names, for an unknown name.
    """
    if name in SHAPES:
        make_decoder(path, SHAPES[name], type, seed)
    elif name in ARCHITECTURES:
        make_small(path, name, type, seed)
    else:
        names = ", ".join((*SHAPES, *ARCHITECTURES))
        raise ConfigError(f"there is no shape {name!r}; these are: {names}")


def make_small(
    path: str | os.PathLike[str], name: str, type: QuantType = QuantType.Q8_0, seed: int = 0
) -> None:
    """Write a model of an architecture in ``ARCHITECTURES``: 2 layers, 512 tokens, a few MB.

    Weights are random, scaled so that activations and logits stay in range. Matrices that
    llama.cpp's converter keeps in float32 are float32, all others are of ``type``. The tokenizer
    has the bundled model's first 512 tokens. "modern-bert" is an encoder, the others are decoders.
    Errors: ConfigError for an unknown name, or a folder that does not exist. A write that fails
    leaves no file.
    """
    if name not in ARCHITECTURES:
        names = ", ".join(ARCHITECTURES)
        raise ConfigError(f"there is no architecture {name!r}; these are: {names}")
    architecture = ARCHITECTURES[name]
    metadata = {**_DIMENSIONS, **architecture.metadata}
    tensors = _tensors(architecture)
    tied = "output.weight" not in tensors
    rng = np.random.default_rng(seed)
    small: dict[str, np.ndarray] = {}
    large: list[Matrix] = []
    for tensor, shape in tensors.items():
        mean = next((_VECTORS[end] for end in _VECTORS if tensor.endswith(end)), None)
        std = _std(_kind(tensor), shape[-1], tied)
        if mean is not None:
            small[tensor] = rng.normal(mean, _VECTOR_STD, shape).astype(np.float32)
        elif _kind(tensor) in _FLOAT32:
            small[tensor] = rng.normal(0, std, shape).astype(np.float32)
        else:
            large.append(Matrix(tensor, shape, std))
    write_model(path, architecture.gguf_name or name, metadata, VOCAB, large, small, type, rng)


def _tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors, by full name."""
    layers = {
        f"blk.{i}.{tensor}": shape
        for i in range(LAYERS)
        for tensor, shape in architecture.layer.items()
    }
    return {**architecture.model, **layers}


def _kind(tensor: str) -> str:
    """The name without the layer and ".weight"."""
    return tensor.removesuffix(".weight").split(".")[-1]


def _std(kind: str, n_in: int, tied: bool) -> float:
    """Standard deviation of a matrix's weights with which activations and logits stay in range."""
    if kind.endswith("_embd") and not tied:
        return 1.0
    return (0.5 if kind in _RESIDUAL else 1.0) / math.sqrt(n_in)
