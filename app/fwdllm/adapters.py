"""Adapters on disk: GGUF files and PEFT folders, told apart by the name."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fwdllm.engine.adapters.io import save_gguf, save_peft
from fwdllm.engine.adapters.peft import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import check_destination, temporary_folder
from fwdllm.hub import local_path

_Path = str | os.PathLike[str]


def is_peft(name: _Path) -> bool:
    """Whether an output of this name is a PEFT folder: one that exists, or ends in "/", or has
    no suffix. Otherwise it is a GGUF file; ConfigError if its suffix is not ".gguf"."""
    text, path = os.fspath(name), Path(name)
    if text.endswith(("/", os.sep)) or path.is_dir() or not path.suffix:
        return True
    if path.suffix != ".gguf":
        raise ConfigError(
            f"cannot tell the format of {text}: end the name in .gguf for a GGUF file, or in / "
            "for a PEFT folder"
        )
    return False


def check_output(name: _Path) -> None:
    """Raise ConfigError if no adapter can be written under this name; nothing is written."""
    path = Path(name)
    if not is_peft(name):
        check_destination(path)
    elif path.is_dir():
        for file in (WEIGHTS_FILE, HEAD_FILE, CONFIG_FILE):
            check_destination(path / file)
    elif path.exists():
        raise ConfigError(f"cannot write the folder {path}: there is a file of that name")
    else:
        check_destination(path)


def write_adapter(engine: Engine, name: _Path) -> Path:
    """Write the engine's adapter under this name, see ``is_peft``; returns the path.

    Errors: ConfigError if it cannot be written there, NumericsError if its values are not finite,
    OSError for a full disk. No partial file is left, whatever happens.
    """
    assert engine.adapter is not None
    check_output(name)
    path = Path(name)
    if not is_peft(name):
        save_gguf(engine.adapter, path)
        return path
    is_new = not path.exists()
    try:
        args = engine.args
        save_peft(engine.adapter, path, args.n_heads, args.n_kv_heads, _base_model(engine))
    except BaseException:
        if is_new:
            shutil.rmtree(path, ignore_errors=True)
        raise
    return path


def export(adapter: _Path, output: _Path, model: _Path) -> Path:
    """Convert an adapter of a model, GGUF or PEFT, to the format of ``output``; returns its path.

    Errors: ModelError, AdapterError, ConfigError, and as ``write_adapter``.
    """
    check_output(output)
    return write_adapter(Engine.load(local_path(model), adapter=adapter), output)


@contextlib.contextmanager
def as_gguf(adapter: _Path, model: _Path) -> Iterator[Path]:
    """The adapter as a GGUF file: its own path, or a temporary file if it is a PEFT folder."""
    path = Path(adapter)
    if not path.is_dir() and path.suffix != ".safetensors":
        yield path
        return
    with temporary_folder() as folder:
        yield export(path, folder / "adapter.gguf", model)


def _base_model(engine: Engine) -> str:
    """The base model's name for PEFT: on Hugging Face if the file has it, else its own name."""
    url = engine.file.metadata.get("general.base_model.0.repo_url", "")
    if isinstance(url, str) and url.startswith("https://huggingface.co/"):
        return url.removeprefix("https://huggingface.co/")
    return engine.file.name or engine.file.path.stem
