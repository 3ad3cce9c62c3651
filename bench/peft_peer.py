"""MeZO with PyTorch and PEFT as a side of a measurement; see ``bench.worker``.

The model has the GGUF file's weights decoded, as users of these libraries would run it. The step is
Algorithm 1 of MeZO (arXiv 2305.17333): the adapter is perturbed in place from a seed, with one
forward pass after another.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import peft
import psutil
import torch
import transformers

from fwdllm.bench.inputs import UPDATE_RATE, half_trained
from fwdllm.engine import DEFAULT_EPSILON, Engine, LoRAConfig
from fwdllm.engine.adapters.peft import MODULES, row_order, save_peft
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.models import llama

_NAMES = {
    **MODULES["llama"],
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_OUTER_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


class Step:
    """Derivatives of the batch's loss along ``perturbations`` seeds, and an update.

    lora: rank and targets.  dtype: of the decoded weights, "bfloat16" or "float32"; PEFT keeps
    the adapter in float32.  folder: for the adapter's file.
    """

    def __init__(
        self,
        model: str,
        ids: Sequence[Sequence[int]],
        lora: Mapping[str, Any],
        perturbations: int,
        method: str,
        threads: int,
        folder: str,
        dtype: str,
    ) -> None:
        warnings.simplefilter("ignore", FutureWarning)  # PEFT's use of transformers
        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        engine = half_trained(Engine.load(model, LoRAConfig(**lora)))
        assert engine.adapter is not None
        save_peft(engine.adapter, folder, engine.args.n_heads, engine.args.n_kv_heads, "")
        decoded = decode(engine, getattr(torch, dtype))
        self.model = peft.PeftModel.from_pretrained(decoded, folder, is_trainable=True).eval()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.ids = torch.tensor(ids)
        self.seeds = range(perturbations)
        self.slopes = self._central if method == "central" else self._forward
        version = f"peft {peft.__version__}, torch {torch.__version__}"
        self.facts = {"version": version, "dtype": dtype, "loss": self._loss()}

    def run(self) -> None:
        slopes = self.slopes()
        for seed, slope in zip(self.seeds, slopes, strict=True):
            self._perturb(seed, -UPDATE_RATE / len(slopes) * slope)

    def _central(self) -> list[float]:
        slopes = []
        for seed in self.seeds:
            self._perturb(seed, DEFAULT_EPSILON)
            above = self._loss()
            self._perturb(seed, -2 * DEFAULT_EPSILON)
            slopes.append((above - self._loss()) / (2 * DEFAULT_EPSILON))
            self._perturb(seed, DEFAULT_EPSILON)
        return slopes

    def _forward(self) -> list[float]:
        loss, slopes = self._loss(), []
        for seed in self.seeds:
            self._perturb(seed, DEFAULT_EPSILON)
            slopes.append((self._loss() - loss) / DEFAULT_EPSILON)
            self._perturb(seed, -DEFAULT_EPSILON)
        return slopes

    def _perturb(self, seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in self.parameters:
            z = torch.normal(0.0, 1.0, size=parameter.shape, dtype=parameter.dtype)
            parameter.data.add_(z, alpha=scale)

    def _loss(self) -> float:
        return float(self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss)


def decode(engine: Engine, dtype: torch.dtype) -> Any:
    """The engine's model as a transformers model, decoded tensor by tensor.

    Errors: ConfigError if the decoded model does not fit the free memory, or has scaled RoPE.
    """
    args, file = engine.args, engine.file
    assert isinstance(args, llama.Args)  # a decoder, as ``open_decoder`` has checked
    if args.rotary.scaling != "none" or args.rotary.factors:
        raise ConfigError("the peer peft does not know scaled RoPE")
    _check_memory(engine, dtype)
    config = transformers.AutoConfig.for_model(
        engine.architecture,
        vocab_size=args.n_vocab,
        hidden_size=args.width,
        intermediate_size=args.hidden,
        num_hidden_layers=args.n_layers,
        num_attention_heads=args.n_heads,
        num_key_value_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        max_position_embeddings=args.context,
        rms_norm_eps=args.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": args.rotary.base},
        tie_word_embeddings="output.weight" not in file.tensors,
    )
    with torch.device("meta"):  # allocates nothing for weights that are replaced below
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    state = {_name(name): _decoded(engine, name, dtype) for name in file.tensors}
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its tables were on meta, too
    return model


def _name(name: str) -> str:
    """The transformers name of a GGUF tensor."""
    stem, _, kind = name.rpartition(".")
    if stem in _OUTER_NAMES:
        return f"{_OUTER_NAMES[stem]}.{kind}"
    _, layer, suffix = stem.split(".")
    return f"model.layers.{layer}.{_NAMES[suffix]}.{kind}"


def _decoded(engine: Engine, name: str, dtype: torch.dtype) -> torch.Tensor:
    file, args = engine.file, engine.args
    if len(file.tensors[name].shape) == 1:
        values = file.vector(name)
    else:
        values = engine.ops.dequantize(file.weight(name))
    suffix = name.split(".")[-2]
    order = row_order(engine.architecture, suffix, len(values), args.n_heads, args.n_kv_heads)
    return torch.from_numpy(values[np.argsort(order)]).to(dtype)


def _check_memory(engine: Engine, dtype: torch.dtype) -> None:
    count = sum(int(np.prod(tensor.shape)) for tensor in engine.file.tensors.values())
    needed = count * dtype.itemsize
    free = psutil.virtual_memory().available
    if needed > free:
        raise ConfigError(
            f"decoded to {dtype} the model has {needed / 1e9:.1f} GB, "
            f"but {free / 1e9:.1f} GB of memory are free"
        )
