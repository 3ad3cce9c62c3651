"""PEFT adapters: a folder with adapter_model.safetensors and adapter_config.json.

Names and formats: https://huggingface.co/docs/peft/developer_guides/checkpoint. A
classification head goes into a file of its own, because PEFT's classifiers read other
features than ours: one must not be loaded as the other.

The files of a folder are replaced one after another, and a process can die in between. So the
weights say what they were saved with, in metadata that PEFT passes over, and are refused beside
anything else. Other files in the folder are the user's, and stay.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.adapters import safetensors
from fwdllm.engine.adapters.adapter import Adapter, Head
from fwdllm.engine.adapters.stored import StoredAdapter, check_inside_layers
from fwdllm.engine.errors import AdapterError, ConfigError, NumericsError
from fwdllm.engine.files import atomic_write, sha256
from fwdllm.kernels.types import Weight

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
HEAD_FILE = "fwdllm_head.safetensors"
HEAD_LABELS = "labels"
COMPANIONS = "fwdllm.saved_with"
MAX_CONFIG_BYTES = 1 << 20

_DECODER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FUSED_DECODER = {
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_up": "mlp.gate_up_proj",
    "ffn_down": "mlp.down_proj",
}
_ENCODER = {
    "attn_q": "attention.self.query",
    "attn_k": "attention.self.key",
    "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense",
    "ffn_up": "intermediate.dense",
    "ffn_down": "output.dense",
}
_MODERN_ENCODER = {
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.Wo",
    "ffn_up": "mlp.Wi",
    "ffn_down": "mlp.Wo",
}
# Where the layers of models without a head are; those of decoders are in a model with one.
_STACKS = {"bert": "encoder.layer", "modern-bert": "layers"}
MODULES: dict[str, dict[str, str]] = {
    "llama": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
    "gemma": _DECODER,
    "gemma2": _DECODER,
    "gemma3": _DECODER,
    "granite": _DECODER,
    "smollm3": _DECODER,
    "phi3": _FUSED_DECODER,
    "bert": _ENCODER,
    "modern-bert": _MODERN_ENCODER,
}

# Of which llama.cpp's converter permutes rows, see ``row_order``.
_INTERLEAVED = ("llama", "granite", "smollm3")

# "model." is there for LlamaForCausalLM and not for LlamaModel; "bert." likewise.
_KEY = re.compile(
    r"base_model\.model\.(?:model\.|bert\.)?(?:encoder\.layer|layers)\."
    r"(?P<layer>0|[1-9][0-9]{0,5})\.(?P<module>.+)\.lora_(?P<half>[AB])\.weight"
)

# Options under which the saved factors mean something other than "add alpha / r * B A".
_REFUSED_OPTIONS = (
    "use_dora",
    "fan_in_fan_out",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
)
# Initialisations that also change the base model's weights, which a GGUF file has unchanged.
_REFUSED_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_peft(
    adapter: Adapter, folder: str | Path, n_heads: int, n_kv_heads: int, base_model_name: str
) -> None:
    """Write a PEFT folder, made if it is not there; equal adapters give equal bytes.

    n_heads, n_kv_heads: of the model, see ``row_order``.  base_model_name: the Hugging Face
    name or path of the model, which PEFT loads by default.
    Errors: AdapterError if PEFT's names for the architecture are not known, NumericsError if
    the adapter holds values that are not finite, ConfigError if the folder cannot be made.
    """
    if not np.isfinite(adapter.theta).all():
        raise NumericsError("the adapter holds values that are not finite, so it is not saved")
    arrays: dict[str, np.ndarray] = {}
    for target in adapter.targets:
        suffix = _suffix(target.name)
        factors = adapter.factors(target)
        order = row_order(adapter.architecture, suffix, target.n_out, n_heads, n_kv_heads)
        module = f"base_model.model.{_module(adapter.architecture, target.layer, suffix)}"
        arrays[f"{module}.lora_A.weight"] = factors.a
        arrays[f"{module}.lora_B.weight"] = factors.b[np.argsort(order)]
    config = _config(adapter, base_model_name)
    folder = Path(folder)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the folder {folder}: {error.strerror}") from error
    # All are written before the first takes its place: the weights, as contexts end inside out.
    with (
        atomic_write(folder / CONFIG_FILE) as new_config,
        _head_file(adapter, folder / HEAD_FILE) as new_head,
        atomic_write(folder / WEIGHTS_FILE) as new_weights,
    ):
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        new_config.write_text(text, encoding="utf-8")
        companions = _companions(config, None if new_head is None else sha256(new_head))
        safetensors.write(new_weights, arrays, {"format": "pt", COMPANIONS: companions})


def read_peft(path: Path, architecture: str, n_heads: int, n_kv_heads: int) -> StoredAdapter:
    """Read a PEFT folder, or the .safetensors file in it, with rows in GGUF order.

    Errors: AdapterError if a file is missing or damaged, if the adapter is not plain LoRA, or
    if it holds anything but LoRA factors of linear layers.
    """
    if architecture not in MODULES:
        known = ", ".join(MODULES)
        raise AdapterError(
            f"PEFT adapters are supported for {known}, but this model is {architecture!r}; "
            "convert the adapter to GGUF with llama.cpp's convert_lora_to_gguf.py"
        )
    weights = path / WEIGHTS_FILE if path.is_dir() else path
    config = _read_config(weights.parent / CONFIG_FILE)
    file = safetensors.read(weights)
    check_inside_layers(weights, file.tensors)
    try:
        pairs = _pairs(file.tensors, architecture)
        for name, (a, b) in pairs.items():
            order = row_order(architecture, _suffix(name), b.n_out, n_heads, n_kv_heads)
            pairs[name] = (a, Weight(b.data[order], b.type, b.n_out, b.n_in))
    except AdapterError as error:
        raise AdapterError(f"{weights}: {error}") from error
    ranks = {a.n_out for a, _ in pairs.values()}
    alpha = _alpha(weights.parent / CONFIG_FILE, config, ranks)
    _check_companions(weights, file.metadata, config)
    head, values = _read_head(weights.parent / HEAD_FILE)
    return StoredAdapter(weights, pairs, alpha, head, values)


def row_order(
    architecture: str, suffix: str, n_out: int, n_heads: int, n_kv_heads: int
) -> np.ndarray:
    """int [n_out]: row i of the GGUF tensor is row ``order[i]`` of the Hugging Face tensor.

    RoPE rotates pairs of elements of a head. Hugging Face pairs an element of the first half
    with one of the second; llama.cpp's "llama" architecture and some others pair neighbours. So
    its converter interleaves the halves of the q and k rows (``permute`` in its
    convert_hf_to_gguf.py). Other rows stay where they are.
    Errors: AdapterError if the rows are not whole heads.
    """
    heads = {"attn_q": n_heads, "attn_k": n_kv_heads}.get(suffix)
    if architecture not in _INTERLEAVED or heads is None:
        return np.arange(n_out)
    if n_out % (2 * heads):
        raise AdapterError(f"{suffix} has {n_out} rows, which are not {heads} heads of even size")
    return np.arange(n_out).reshape(heads, 2, -1).swapaxes(1, 2).ravel()


def _suffix(name: str) -> str:
    return name.split(".", 2)[2]


def _module(architecture: str, layer: int, suffix: str) -> str:
    modules = MODULES.get(architecture, {})
    if suffix not in modules:
        raise AdapterError(
            f"there is no PEFT name for {suffix} of {architecture!r} models; save as GGUF instead"
        )
    stack = _STACKS.get(architecture, "model.layers")
    return f"{stack}.{layer}.{modules[suffix]}"


def _config(adapter: Adapter, base_model_name: str) -> dict[str, object]:
    """adapter_config.json, with PEFT's defaults spelled out where other readers expect them."""
    alpha = adapter.config.file_alpha
    layers = adapter.config.layers
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base_model_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_to_transform": None if layers is None else list(layers),
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": adapter.config.rank,
        "rank_pattern": {},
        "target_modules": _target_modules(adapter),
        "task_type": "FEATURE_EXTRACTION" if adapter.architecture in _STACKS else "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def _target_modules(adapter: Adapter) -> list[str]:
    """PEFT matches these against the ends of module paths."""
    modules = MODULES[adapter.architecture]
    names = [modules[suffix].split(".")[-1] for suffix in adapter.config.targets]
    if adapter.architecture not in _STACKS:
        return sorted(names)
    # "output.dense" and "Wo" end the paths of two modules of a layer, so all are named in full.
    targets = adapter.targets
    return sorted(_module(adapter.architecture, t.layer, _suffix(t.name)) for t in targets)


@contextlib.contextmanager
def _head_file(adapter: Adapter, path: Path) -> Iterator[Path | None]:
    """As ``atomic_write``, with the head written; None, and no file at the end, without a head."""
    if adapter.head is None:
        yield None
        path.unlink(missing_ok=True)  # left by an adapter saved here before
        return
    labels = adapter.head.labels
    weight, bias = np.split(adapter.theta[adapter.n_lora :], [adapter.head.n_weight])
    arrays = {"weight": weight.reshape(len(labels), -1), "bias": bias}
    with atomic_write(path) as temporary:
        safetensors.write(temporary, arrays, {HEAD_LABELS: json.dumps(labels)})
        yield temporary


def _companions(config: Mapping[str, Any], head: str | None) -> str:
    """What weights need beside them: the scale of a configuration, the SHA-256 of a head's file."""
    found = {name: config.get(name) for name in ("r", "lora_alpha", "use_rslora")}
    return json.dumps({**found, "head": head}, sort_keys=True)


def _check_companions(
    weights: Path, metadata: Mapping[str, str], config: Mapping[str, Any]
) -> None:
    if COMPANIONS not in metadata:  # PEFT's own, or saved by an older version
        return
    head = weights.parent / HEAD_FILE
    try:
        found = _companions(config, sha256(head) if head.exists() else None)
    except OSError as error:
        raise AdapterError(f"cannot read {head}: {error}") from error
    if found != metadata[COMPANIONS]:
        raise AdapterError(
            f"{weights} was not saved with the {CONFIG_FILE} and {HEAD_FILE} beside it: saving was "
            "interrupted, or one was changed; save the adapter again"
        )


def _read_head(path: Path) -> tuple[Head | None, np.ndarray | None]:
    if not path.exists():
        return None, None
    file = safetensors.read(path)
    weight, bias = file.tensors.get("weight"), file.tensors.get("bias")
    try:
        labels = json.loads(file.metadata[HEAD_LABELS])
        if not isinstance(labels, list) or weight is None or bias is None:
            raise ConfigError("the labels, the weight or the bias are missing")
        head = Head(tuple(labels), weight.shape[-1] if weight.shape else 0)
    except (KeyError, ValueError, RecursionError, ConfigError) as error:
        raise AdapterError(f"{path} is not a classification head: {error}") from error
    fits = (weight.shape, bias.shape) == ((len(labels), head.n_in), (len(labels),))
    if not fits or weight.dtype != "F32" or bias.dtype != "F32":
        raise AdapterError(f"{path} is damaged: its tensors do not match its labels")
    return head, np.concatenate([weight.data, bias.data]).view("<f4").astype(np.float32)


def _pairs(
    tensors: Mapping[str, safetensors.Tensor], architecture: str
) -> dict[str, tuple[Weight, Weight]]:
    suffixes = {module: suffix for suffix, module in MODULES[architecture].items()}
    halves: dict[tuple[str, str], Weight] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match["module"] not in suffixes:
            raise AdapterError(f"it holds {key[:120]!r}, which is not a LoRA factor of this model")
        place = (f"blk.{match['layer']}.{suffixes[match['module']]}", match["half"])
        if place in halves:
            raise AdapterError(f"it holds factor {place[1]} of {place[0]} twice")
        halves[place] = tensor.weight()
    names = sorted({name for name, _ in halves})
    missing = [f"{half} of {name}" for name in names for half in "AB" if (name, half) not in halves]
    if missing:
        raise AdapterError(f"it is incomplete: factor {missing[0]} is missing")
    return {name: (halves[name, "A"], halves[name, "B"]) for name in names}


def _read_config(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_CONFIG_BYTES:
            raise AdapterError(f"{path} does not exist or is not a PEFT configuration")
        config = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"cannot read {path}: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise AdapterError(f"{path} is not the configuration of a LoRA adapter")
    used = [option for option in _REFUSED_OPTIONS if config.get(option)]
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_REFUSED_INITS):
        used.append("init_lora_weights")
    if used:
        raise AdapterError(f"{path} uses {used[0]}, which is not supported")
    return config


def _alpha(path: Path, config: Mapping[str, Any], ranks: set[int]) -> float:
    rank, alpha = config.get("r", 8), config.get("lora_alpha", 8)  # PEFT's defaults
    if type(rank) is not int or ranks != {rank}:
        found = ", ".join(str(rank) for rank in sorted(ranks)) or "none"
        raise AdapterError(f"{path} does not give the rank of the factors beside it, {found}")
    if type(alpha) not in (int, float) or not 0 < alpha < float(np.finfo(np.float32).max):
        raise AdapterError(f"{path} is damaged: its lora_alpha is not a usable number")
    # rsLoRA scales by alpha / sqrt(r).
    return float(alpha * math.sqrt(rank) if config.get("use_rslora") else alpha)
