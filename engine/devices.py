"""The kernel backend of a device."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from fwdllm.engine.errors import ConfigError

# reference is NumPy: short, slow and exact, for tests.
DEVICES = {"cpu": "cpu", "cuda": "triton", "reference": "reference"}


def kernels_of(device: str) -> ModuleType:
    """The kernels for "cpu", "cuda" (an NVIDIA GPU) or "reference".

    Errors: ConfigError for another name, or if the packages or the GPU are missing.
    """
    if device not in DEVICES:
        raise ConfigError(f"device must be cpu or cuda, not {device!r}")
    if device == "cuda":
        missing = [name for name in ("torch", "triton") if find_spec(name) is None]
        if missing:
            raise ConfigError(f"device cuda needs {' and '.join(missing)}: pip install fwdllm[gpu]")
    ops = import_module(f"fwdllm.kernels.{DEVICES[device]}")
    if device == "cuda" and not ops.usable():
        raise ConfigError("device cuda needs an NVIDIA GPU that PyTorch can use: there is none")
    return ops
