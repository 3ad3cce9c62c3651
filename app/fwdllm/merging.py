"""A model with an adapter merged into it, as one GGUF file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from fwdllm.engine.adapters import merge as merging
from fwdllm.engine.adapters.io import read_adapter
from fwdllm.engine.backends import choose
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import check_destination
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.hub import local_path
from fwdllm.inference import evaluate

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Merged:
    """A merged model. loss_before: of the model with the adapter, loss_after: of the merged file,
    both in nats a token; None without data."""

    path: Path
    loss_before: float | None
    loss_after: float | None


def merge(
    adapter: _Path, output: _Path, model: _Path, type: str = "f16", data: _Path | None = None
) -> Merged:
    """Write a model with an adapter merged into it; see ``engine.adapters.merge.merge``.

    adapter: a GGUF file or PEFT folder.  model: a GGUF file or hf://owner/repo/file.gguf.
    type: of the tensors that the adapter changes, "f16", "q8_0", or "own" for those they have.
    data: a JSONL file to evaluate before and after.
    Errors: ModelError, AdapterError, ConfigError, DataError, NumericsError, OSError. No partial
    file is left, whatever happens.
    """
    path, base = Path(output), local_path(model)
    if path.suffix != ".gguf":
        raise ConfigError(f"a merged model is a GGUF file: end the name {path} in .gguf")
    check_destination(path)
    if path.exists() and any(
        path.samefile(used) for used in (base, adapter) if Path(used).exists()
    ):
        raise ConfigError(f"{path} is what is merged: choose another name for the result")
    file = GGUFFile.open(base)
    backend = choose(file)
    args = backend.args
    stored = read_adapter(Path(adapter), backend.architecture, args.n_heads, args.n_kv_heads)
    before = None if data is None else evaluate(base, data, adapter=adapter).loss
    merging.merge(file, stored, path, type)
    after = None if data is None else evaluate(path, data).loss
    return Merged(path, before, after)
