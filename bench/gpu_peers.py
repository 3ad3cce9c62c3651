"""Peers of a step on a GPU: PyTorch, transformers and PEFT with decoded weights.

Backpropagation and Algorithm 1 of MeZO (arXiv 2305.17333), as users of these libraries would run
them, on the same weights, adapter and tokens. This module imports nothing from the repository, so
that it also runs where only PyTorch and these libraries are installed.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

EPSILON = 1e-3  # MeZO's
RATE = 1e-6  # so small that thousands of steps hardly change the model

_OUTER_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class PeerModel:
    """Shapes of a llama decoder, and functions that return its decoded weights and its adapter.

    weight: maps the name of a GGUF tensor, such as "blk.0.attn_q.weight" or
    "output_norm.weight", to a bfloat16 tensor on the device, [n_out, n_in] or [n]. If the
    embedding is tied, "output.weight" is "token_embd.weight". The result must not be an inference
    tensor, which cannot be saved for a backward pass.
    factors: maps a name such as "blk.0.attn_q" to the float32 matrices A [rank, n_in] and
    B [n_out, rank], which add alpha / rank * B A to the weight.  targets: GGUF names of the
    adapted matrices of every layer, such as ("attn_q", "attn_v").
    In weights and in B, rows of q and k are in the order of transformers, not of GGUF.
    """

    n_layers: int
    width: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    n_vocab: int
    context: int
    norm_eps: float
    rope_base: float
    weight: Callable[[str], torch.Tensor]
    factors: Callable[[str], tuple[torch.Tensor, torch.Tensor]]
    rank: int
    alpha: float
    targets: tuple[str, ...]


# A step of a side. It returns figures for the report, from before its update.
Step = Callable[[], dict[str, Any]]
# Makes a step. Arguments: a model with an adapter, ids int64 [examples, tokens], perturbations.
Side = Callable[[Any, torch.Tensor, int], Step]


def measure_peers(
    model: PeerModel, ids: torch.Tensor, perturbations: int, rounds: int, device: str
) -> dict[str, Any]:
    """Time and memory of a step of every side: one warm-up step, then ``rounds`` timed ones.

    ids: int64 [examples, tokens]; every token but the first of each is a label, and the loss is
    the mean over labels.  perturbations: seeds of a step of MeZO.
    Returns JSON-able values: the ``versions`` of packages, and for each side ``seconds``
    (median), ``seconds_range`` (lowest and highest), ``peak_bytes`` (PyTorch's peak allocation in
    a step, with the side's model, without what the caller held before; None on a CPU),
    ``loss`` (float, before the first step) and for MeZO ``slopes`` (of the first step, one per
    seed). A side that could not be run has only ``skipped``, the reason.
    All bf16 sides start at the same loss; the compiled one differs by rounding, because fused
    operations round to bfloat16 less often. The nf4 sides have other weights and another loss.
    """
    held = _allocated(device)
    ids = ids.to(device)
    results: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23
        # The compiled side comes last: it is the most likely to fail.
        for nf4, sides in ((True, _NF4_SIDES), (False, _BF16_SIDES)):
            results |= _measure(model, nf4, sides, ids, perturbations, rounds, held)
            _free()
    return {**results, "versions": {name: _version(name) for name in _PACKAGES}}


def _measure(
    model: PeerModel,
    nf4: bool,
    sides: Mapping[str, Side],
    ids: torch.Tensor,
    perturbations: int,
    rounds: int,
    held: int,
) -> dict[str, Any]:
    """Results of sides that share one model in memory."""
    try:
        peer = build(model, nf4)
    except Exception as error:  # a peer that fails must not stop the benchmark
        return {name: {"skipped": _reason(error)} for name in sides}
    results: dict[str, Any] = {}
    for name, side in sides.items():
        try:
            set_factors(peer, model)
            results[name] = _timed(side(peer, ids, perturbations), rounds, ids.device, held)
        except Exception as error:
            results[name] = {"skipped": _reason(error)}
        peer.zero_grad(set_to_none=True)  # a step that failed may have left gradients
        _free()
    return results


def _timed(step: Step, rounds: int, device: torch.device, held: int) -> dict[str, Any]:
    facts = step()  # warm-up: libraries choose, load and compile kernels
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = []
    for _ in range(rounds):
        _synchronize(device)
        start = time.perf_counter()
        step()
        _synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_bytes": _peak(device, held),
        **facts,
    }


def build(model: PeerModel, nf4: bool) -> Any:
    """A PEFT model of transformers' llama on the weights' device; see ``set_factors`` for A and B.

    nf4: the layers' matrices become bitsandbytes' 4-bit NormalFloats, with matmuls in bfloat16;
    embedding, norms and output are not quantized, as in QLoRA (arXiv 2305.14314).
    Errors: ImportError if a package is missing.
    """
    import peft
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=model.n_vocab,
        hidden_size=model.width,
        intermediate_size=model.hidden,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.n_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.context,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
        tie_word_embeddings=False,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):  # allocates nothing for weights that are replaced below
        llama = transformers.LlamaForCausalLM(config)
    for name, module in _modules(model.n_layers):
        _set_weight(llama, module, model.weight(f"{name}.weight"), nf4)
    rotary = type(llama.model.rotary_emb)(config)  # its tables were on the meta device, too
    llama.model.rotary_emb = rotary.to(llama.lm_head.weight.device)
    llama.is_loaded_in_4bit = nf4  # PEFT reads this to adapt 4-bit layers
    lora = peft.LoraConfig(
        r=model.rank,
        lora_alpha=model.alpha,
        target_modules=[_LAYER_MODULES[target] for target in model.targets],
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(llama, lora)


def _modules(n_layers: int) -> Iterator[tuple[str, str]]:
    """Names of all modules with a weight: GGUF's, without ".weight", and transformers'."""
    yield from _OUTER_MODULES.items()
    for layer in range(n_layers):
        for suffix, module in _LAYER_MODULES.items():
            yield f"blk.{layer}.{suffix}", f"model.layers.{layer}.{module}"


def _set_weight(llama: Any, name: str, weight: torch.Tensor, nf4: bool) -> None:
    module = llama.get_submodule(name)
    if nf4 and isinstance(module, nn.Linear) and module is not llama.lm_head:
        llama.set_submodule(name, _nf4_linear(weight))
    else:
        module.weight = nn.Parameter(weight, requires_grad=False)


def _nf4_linear(weight: torch.Tensor) -> nn.Module:
    # Not an import statement: mypy would need the package's types, and it may not be installed.
    bitsandbytes = importlib.import_module("bitsandbytes")
    n_out, n_in = weight.shape
    linear = bitsandbytes.nn.Linear4bit(
        n_in, n_out, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta"
    )
    values = bitsandbytes.nn.Params4bit(weight, quant_type="nf4", module=linear)
    linear.weight = values.to(weight.device)  # quantizes, although the device does not change
    return linear


def set_factors(peer: Any, model: PeerModel) -> None:
    """Set A and B of every target to those of ``model``, as at the start of each side."""
    llama = peer.get_base_model()
    for layer in range(model.n_layers):
        for target in model.targets:
            lora = llama.get_submodule(f"model.layers.{layer}.{_LAYER_MODULES[target]}")
            a, b = model.factors(f"blk.{layer}.{target}")
            lora.lora_A["default"].weight.data.copy_(a)
            lora.lora_B["default"].weight.data.copy_(b)


def trainable(peer: Any) -> list[nn.Parameter]:
    """The adapter's parameters: A and B of each target, which PEFT keeps in float32."""
    return [parameter for parameter in peer.parameters() if parameter.requires_grad]


def batch_loss(peer: Any, ids: torch.Tensor) -> torch.Tensor:
    """Mean loss over all labels, a scalar; ids: int64 [examples, tokens]."""
    return peer(input_ids=ids, labels=ids, use_cache=False).loss


def _backprop(peer: Any, ids: torch.Tensor, perturbations: int, checkpointing: bool) -> Step:
    """A step of gradient descent; ``perturbations`` is not used."""
    if checkpointing:
        peer.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    peer.train(checkpointing)  # only checkpointing depends on the mode: there is no dropout
    optimizer = torch.optim.SGD(trainable(peer), lr=RATE)

    def step() -> dict[str, Any]:
        loss = batch_loss(peer, ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": float(loss.detach())}

    return step


def _mezo(peer: Any, ids: torch.Tensor, perturbations: int) -> Step:
    """A step of MeZO."""
    peer.eval()
    parameters, seeds = trainable(peer), range(perturbations)
    with torch.no_grad():
        loss = float(batch_loss(peer, ids))

    def step() -> dict[str, Any]:
        slopes = central_slopes(peer, parameters, ids, seeds)
        for seed, slope in zip(seeds, slopes, strict=True):
            perturb(parameters, seed, -RATE / len(slopes) * slope)
        return {"loss": loss, "slopes": slopes}

    return step


def _compiled_mezo(peer: Any, ids: torch.Tensor, perturbations: int) -> Step:
    """A step of MeZO with compiled layers.

    All layers share one compilation. With ``fullgraph``, a layer that cannot be compiled is an
    error, instead of running slowly.
    """
    for layer in peer.get_base_model().model.layers:
        layer.compile(fullgraph=True)
    return _mezo(peer, ids, perturbations)


@torch.no_grad()
def central_slopes(
    peer: Any, parameters: Sequence[nn.Parameter], ids: torch.Tensor, seeds: Sequence[int]
) -> list[float]:
    """The derivative of the loss along the direction of each seed, by central differences.

    Two forward passes per seed. Parameters are perturbed in place and restored up to rounding
    errors.
    """
    above, below = [], []
    for seed in seeds:
        perturb(parameters, seed, EPSILON)
        above.append(batch_loss(peer, ids))
        perturb(parameters, seed, -2 * EPSILON)
        below.append(batch_loss(peer, ids))
        perturb(parameters, seed, EPSILON)
    # Losses are read at the end, so that the GPU does not wait for Python between passes.
    difference = torch.stack(above).double() - torch.stack(below).double()
    return (difference / (2 * EPSILON)).tolist()


@torch.no_grad()
def perturb(parameters: Sequence[nn.Parameter], seed: int, scale: float) -> None:
    """Add ``scale`` times the seed's standard normal direction to the parameters, in place."""
    generator = torch.Generator(parameters[0].device).manual_seed(seed)
    for parameter in parameters:
        z = torch.randn(
            parameter.shape, generator=generator, device=parameter.device, dtype=parameter.dtype
        )
        parameter.add_(z, alpha=scale)


_BF16_SIDES: dict[str, Side] = {
    "backprop bf16": partial(_backprop, checkpointing=False),
    "backprop bf16, checkpointing": partial(_backprop, checkpointing=True),
    "mezo bf16": _mezo,
    "mezo bf16, compiled": _compiled_mezo,
}
_NF4_SIDES: dict[str, Side] = {
    "backprop nf4": partial(_backprop, checkpointing=False),
    "mezo nf4": _mezo,
}


def _reason(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "it does not fit the memory of the GPU"
    message = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {message}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _free() -> None:
    """Free unused memory, so that it does not count in the next side's peak."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: str) -> int:
    return torch.cuda.memory_allocated(device) if torch.device(device).type == "cuda" else 0


def _peak(device: torch.device, held: int) -> int | None:
    return torch.cuda.max_memory_allocated(device) - held if device.type == "cuda" else None
