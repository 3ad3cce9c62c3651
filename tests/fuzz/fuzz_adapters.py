"""Changed adapters, GGUF files and PEFT folders, through every command that opens them."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from random import Random
from typing import Any

import commands
import numpy as np
import sources
from changes import change_bytes, change_json
from fuzz_models import check, make
from gguf_bytes import text
from gguf_parts import read_parts
from model_mutations import mutate
from target import Row, Target

_MODELS = ("tiny", "tiny", "tinymix", "minilm", "qwen2", "olmo2", "phi3", "mamba")
_KNOWN = ["lora_alpha", "r", "target_modules", "q_proj", "v_proj", "bias", "all", "lora_only",
    "use_rslora", "use_dora", "fan_in_fan_out", "rank_pattern", "alpha_pattern", "modules_to_save",
    "layers_to_transform", "peft_type", "LORA", "init_lora_weights", "all-linear", 0, 1, 2, 1e30,
    "F32", "F16", "BF16", "I64", "dtype", "shape", "data_offsets", "__metadata__"]  # fmt: skip


def _write(random: Random, folder: Path, case: Path) -> str:
    source = sources.source(folder, _of_here(random))
    for name in ("model.gguf", "data.jsonl"):
        shutil.copy(source / name, case)
    peft = source / "peft"
    if peft.is_dir() and random.random() < 0.45:
        shutil.copytree(peft, case / "peft")
        return _change_peft(random, case / "peft")
    if random.random() < 0.25:
        return _change_values(random, source / "adapter.gguf", case / "adapter.gguf")
    kind, content = mutate(source / "adapter.gguf", random)
    (case / "adapter.gguf").write_bytes(content)
    return kind


def _of_here(random: Random) -> str:
    return random.choice([name for name in _MODELS if name in sources.names()])


def _change_values(random: Random, source: Path, target: Path) -> str:
    """Wrong numbers, or names of tensors that stand for others."""
    parts = read_parts(source)
    one, other = random.choice(parts.tensors), random.choice(parts.tensors)
    way = random.randrange(4)
    if way == 0:
        one.name, other.name = other.name, one.name
    elif way == 1:  # any other matrix of the model
        new = random.choice(["attn_k", "attn_q", "ffn_down", "attn_norm", "output", "token_embd"])
        old = one.name.split(b".")[2]
        for t in parts.tensors:
            t.name = t.name.replace(old, new.encode())
    elif way == 2:
        values = [0.0, -1.0, 1e38, float("nan"), float("inf"), 1e-45]
        parts.put(b"adapter.lora.alpha", 6, struct.pack("<f", random.choice(values)))
    else:
        parts.put(b"general.architecture", 8, text(random.choice(["qwen2", "bert", "", "x"])))
    target.write_bytes(parts.content())
    return f"gguf values {way}"


def _change_peft(random: Random, folder: Path) -> str:
    path = random.choice(sorted(folder.iterdir()))
    content = path.read_bytes()
    if path.suffix == ".json":
        if random.random() < 0.8:
            content = json.dumps(change_json(json.loads(content), random, _KNOWN)).encode()
        else:
            content = change_bytes(content, random)
    else:
        content = _change_safetensors(content, random)
    if random.random() < 0.05:
        path.unlink()
    else:
        path.write_bytes(content)
    return path.name


def _change_safetensors(content: bytes, random: Random) -> bytes:
    if random.random() < 0.3:
        return change_bytes(content, random)
    (size,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    if random.random() < 0.5:
        header = change_json(header, random, _KNOWN)
    else:
        odd = np.array(random.choice([np.nan, np.inf, 1e38, 0]), "<f4").tobytes()
        for _ in range(random.choice([1, 100])):
            at = 4 * random.randrange(max(len(data) // 4, 1))
            data[at : at + 4] = odd
    raw = json.dumps(header).encode()
    size = len(raw) if random.random() < 0.9 else random.choice([0, 2**40, 2**63, size - 1])
    return struct.pack("<Q", size) + raw + data


def _check(_: Any, case: Path) -> list[Row]:
    return check(commands.of_adapter, case)


ADAPTERS = Target(make, _write, _check, seconds=60, chunk=10)
