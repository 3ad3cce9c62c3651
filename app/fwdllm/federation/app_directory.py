"""``federate init``: a Flower app directory for a model and data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from fwdllm.engine.data.jsonl import labels_of, read_jsonl
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import atomic_write
from fwdllm.engine.settings import LoRAConfig
from fwdllm.protocol.presets import PRESETS, preset
from fwdllm.tuning.recipes import recipe

_Path = str | os.PathLike[str]

_PYPROJECT = """\
# A Flower app that fine-tunes {model_name} by forward passes. Start it with
#     flwr run {folder} YOUR-SUPERLINK
# docs/deployment.md of fwdllm has the whole way, with TLS and authenticated nodes.
[project]
name = "fwdllm-federation"
version = "1.0.0"
description = "Federated fine-tuning with forward passes only"
license = "Apache-2.0"
dependencies = ["fwdllm[federation]"]

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "fwdllm"

[tool.flwr.app.components]
serverapp = "federation.server:app"
clientapp = "federation.client:app"

# Nodes name their data, and their model if it lies elsewhere, in their own configuration:
#     flower-supernode ... --node-config 'data="/path/of/data.jsonl"'
[tool.flwr.app.config]
{config}
# Settings of fwdllm.protocol.federation.FederationConfig.
[tool.flwr.app.config.federation]
{federation}
[tool.flwr.app.config.lora]
{lora}"""

_SHIM = '''"""The {what} of fwdllm; one of your own can use fwdllm.protocol.flower instead."""

from fwdllm.protocol.flower.{what_module} import app

__all__ = ["app"]
'''


def init(
    folder: _Path,
    model: _Path,
    data: _Path,
    name: str = "spry",
    *,
    rounds: int = 100,
    lora: LoRAConfig | None = None,
    eval_data: _Path | None = None,
    min_nodes: int = 2,
    changes: dict[str, Any] | None = None,
) -> Path:
    """Write a Flower app directory; returns its path.

    folder: new or empty.  model: a GGUF file.  data: JSONL with the same labels as the nodes' data;
    only its labels are used.  name: a preset.  changes: settings that differ from the preset's.
    lora: shape of the adapter, by default that of the method's recipe.  eval_data: JSONL on which
    the server evaluates.  Errors: ConfigError, ModelError, DataError.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path} is not an empty folder; name a new one")
    labels = labels_of(read_jsonl(data))
    if eval_data is not None:
        read_jsonl(eval_data)
    config = preset(name, **{"rounds": rounds, **(changes or {})})
    lora = lora or recipe(model, data, config.method).lora
    engine = Engine.load(model, lora, labels=labels, seed=config.seed)
    engine.check_method(config.method)  # fail now, not in the run
    settings = {
        "model": str(Path(model).resolve()),
        "run-dir": str(path.resolve() / "run"),
        "eval-data": "" if eval_data is None else str(Path(eval_data).resolve()),
        "labels": json.dumps(labels, ensure_ascii=False),
        "min-nodes": min_nodes,
    }
    # Settings that people often change are written out, even if the preset has the same value.
    shown = {**PRESETS[name], "rounds": rounds, "per_round": config.per_round, "seed": config.seed}
    federation = {"preset": name, **shown, **(changes or {})}
    shape: dict[str, Any] = {
        "rank": lora.rank,
        "alpha": lora.alpha,
        "targets": json.dumps(lora.targets),
    }
    if lora.layers is not None:
        shape["layers"] = json.dumps(lora.layers)
    if lora.rslora:
        shape["rslora"] = True
    text = _PYPROJECT.format(
        model_name=Path(model).name,
        folder=path.name,
        config=_toml(settings),
        federation=_toml(federation),
        lora=_toml(shape),
    )
    package = path / "federation"
    package.mkdir(parents=True)
    _write(package / "__init__.py", "")
    _write(package / "server.py", _SHIM.format(what="ServerApp", what_module="server_app"))
    _write(package / "client.py", _SHIM.format(what="ClientApp", what_module="client_app"))
    _write(path / "pyproject.toml", text)
    return path


def _toml(values: dict[str, Any]) -> str:
    """Lines of a TOML table; JSON's strings, numbers and booleans are TOML's too."""
    known = {key: value for key, value in values.items() if value is not None}
    return "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in known.items())


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
