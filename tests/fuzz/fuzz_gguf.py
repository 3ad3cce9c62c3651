"""Changed models through our own reader, ``inspect`` and our own graphs, in one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random
from typing import Any

import sources
from model_mutations import mutate
from target import Row, Target, refused_or_ok, without_warnings

_MODELS = ("tiny", "tiny", "tinymix", "minilm", "qwen2", "qwen3", "gemma2", "gemma3")


def _make(folder: Path) -> None:
    import fwdllm.inference
    import fwdllm.inspect  # noqa: F401


def _write(random: Random, folder: Path, case: Path) -> str:
    name = random.choice([name for name in _MODELS if name in sources.names()])
    found = sources.source(folder, name)
    kind, content = mutate(found / "model.gguf", random)
    (case / "model.gguf").write_bytes(content)
    for name in ("data.jsonl", "adapter.gguf"):
        shutil.copy(found / name, case)
    return kind


def _check(_: Any, case: Path) -> list[Row]:
    from fwdllm.engine.gguf.file import GGUFFile
    from fwdllm.inference import evaluate
    from fwdllm.inspect import inspect_model, render

    model, data = case / "model.gguf", case / "data.jsonl"
    adapter = case / "adapter.gguf" if b'"label"' in data.read_bytes() else None

    def read() -> None:
        file = GGUFFile.open(model)
        dict(file.metadata)
        for name, info in file.tensors.items():
            refused_or_ok("tensor", lambda n=name, i=info: _read(file, n, len(i.shape)))

    return [
        refused_or_ok("read", read),
        refused_or_ok("inspect", lambda: render(inspect_model(str(model)))),
        refused_or_ok("eval", lambda: evaluate(model, data, adapter=adapter, max_tokens=9)),
    ]


def _read(file: Any, name: str, n_dims: int) -> None:
    (file.vector if n_dims == 1 else file.weight)(name)


GGUF = Target(_make, _write, _check, without_warnings)
