"""The sound models and adapters that are changed: small ones of many kinds."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from pathlib import Path

from children import run
from places import SHARED

from fwdllm.demo import asset
from fwdllm.kernels.types import QuantType

_REAL = {"tinymix": "tinymix-6m.Q4_0.gguf", "minilm": "minilm-l6-v2.Q4_0.gguf"}
_ENCODERS = ("minilm", "modern-bert")
# By name, how often each is taken; llama.cpp's own graphs have one of each of their features, and
# a name of a tensor type is llama with matrices of it.
MODELS = {"tiny": 8, "tinymix": 5, "minilm": 3, "qwen2": 1, "qwen3": 1, "gemma2": 1, "gemma3": 1,
    "olmo2": 1, "phi3": 1,
    "gpt2": 1, "gptneox": 1, "granite": 1, "stablelm": 1, "mixtral": 1, "qwen2moe": 1,
    "mamba": 1, "modern-bert": 1, "Q2_K": 1, "Q3_K": 1, "IQ4_XS": 1, "MXFP4": 1}  # fmt: skip
ROWS = [
    {"prompt": "What is a ship?", "completion": " A ship sails, matey."},
    {"prompt": "<s> Hällo 123", "completion": " It's the\n\t<0x0A> end."},
]
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Arr!"}]},
]
LABELLED = [{"text": "a fine film", "label": "good"}, {"text": "no", "label": "bad"}]


def names() -> list[str]:
    """The models there are here, each as often as it is to be taken."""
    return [name for name, n in MODELS.items() if _is_here(name) for _ in range(n)]


def source(folder: Path, name: str) -> Path:
    """The folder in ``folder`` of a model, its data and its adapter, made if it is not there."""
    found = folder / name
    if not found.is_dir():  # made in a child, as its kernels would leave threads here
        ended = run(lambda: _make(folder, name), folder / f"{name}.log", 300, 4 << 30)
        if ended.code != 0:
            raise RuntimeError(f"no source {name}: {ended}")
    return found


def _is_here(name: str) -> bool:
    return name not in _REAL or (SHARED / "models" / _REAL[name]).exists()


def _make(folder: Path, name: str) -> int:
    from llama_models import TARGETS, make_model

    from fwdllm.bench.inputs import half_trained
    from fwdllm.engine import Engine, LoRAConfig
    from fwdllm.engine.adapters.io import save_gguf, save_peft
    from fwdllm.engine.errors import FwdllmError

    new = Path(tempfile.mkdtemp(dir=folder))
    if name in _REAL:
        model = SHARED / "models" / _REAL[name]
    elif name == "tiny":
        model = asset("fwdllm-tiny.gguf")
    elif name in QuantType.__members__:
        model = make_model(folder, "llama", name)
    else:
        model = make_model(folder, name, "Q8_0")
    shutil.copy(model, new / "model.gguf")
    labels = ("bad", "good") if name in _ENCODERS else ()
    rows = LABELLED if labels else ROWS
    (new / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lora = LoRAConfig(2, targets=TARGETS.get(name, ("attn_q", "attn_v")))
    engine = half_trained(Engine.load(new / "model.gguf", lora, labels=labels))
    assert engine.adapter is not None
    save_gguf(engine.adapter, new / "adapter.gguf")
    with contextlib.suppress(FwdllmError, AttributeError):  # PEFT has names of few architectures
        save_peft(engine.adapter, new / "peft", engine.args.n_heads, engine.args.n_kv_heads, "x")
    with contextlib.suppress(OSError):  # another child has made it
        new.rename(folder / name)
    return 0
