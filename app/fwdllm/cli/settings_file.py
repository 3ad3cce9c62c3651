"""Files of settings: TOML that people write, and the JSON that a run directory keeps."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import settings_of, types_of

# Tables of a run's config.json that describe its inputs; the command gets inputs as arguments.
_INPUTS = ("model", "data", "held_out", "started")


def read_settings(
    path: Path | None, options: Mapping[str, Any] | None = None, **configs: type
) -> dict[str, dict[str, Any]]:
    """Settings from a file, by table; without a file, empty tables.

    configs: the configuration class of each table.  options: values of command line options that a
    run's config.json also records; they must equal the recorded ones.
    Errors: ConfigError for a file that cannot be read, for an unknown table or setting, and for an
    option that differs from the recorded one.
    """
    options = options or {}
    tables: dict[str, dict[str, Any]] = {name: {} for name in configs}
    if path is None:
        return tables
    found = _read(path)
    for name, table in found.items():
        if path.suffix == ".json" and name in _INPUTS:
            continue
        if path.suffix == ".json" and name in options:
            if table != options[name]:
                raise ConfigError(
                    f"{path}: the run had {name} {table}, not {options[name]}; "
                    f"give --{name} as it was"
                )
            continue
        if name not in configs or not isinstance(table, dict):
            raise ConfigError(f"{path}: tables are {', '.join(configs)}; there is no [{name}]")
        if name == "train" and "data" in found:  # a run's: see ``OptimizerConfig.recorded``
            table = {"literal": True, **table}
        tables[name] = {
            key: _value(path, configs[name], f"{name}.{key}", key, value)
            for key, value in table.items()
            if value is not None  # JSON has null for what is not set
        }
    return tables


def _value(path: Path, config: type, where: str, key: str, value: Any) -> Any:
    if key not in settings_of(config):
        raise ConfigError(f"{path}: there is no setting {where}")
    kind, _ = types_of(config)[key]
    if kind is tuple:
        if not isinstance(value, list):
            raise ConfigError(f"{path}: {where} must be a list, not {value!r}")
        return tuple(value)
    return value


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text) if path.suffix == ".json" else _toml(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read {path}: {reason}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no file of settings: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is no file of settings: it has no tables")
    return found


def _toml(text: str) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(text)
