"""The kernels of a device."""

from __future__ import annotations

from importlib.util import find_spec

from fwdllm.engine.errors import ConfigError
from fwdllm.kernels.api import BackwardKernels

# reference is NumPy: short, slow and exact, for tests.
DEVICES = ("cpu", "cuda", "reference")


def kernels_of(device: str) -> BackwardKernels:
    """The kernels for "cpu", "cuda" (an NVIDIA GPU) or "reference".

    Errors: ConfigError for another name, or if the packages or the GPU are missing.
    """
    if device not in DEVICES:
        raise ConfigError(f"device must be cpu or cuda, not {device!r}")
    if device == "cpu":
        from fwdllm.kernels import cpu

        return cpu
    if device == "cuda":
        missing = [name for name in ("torch", "triton") if find_spec(name) is None]
        if missing:
            raise ConfigError(f"device cuda needs {' and '.join(missing)}: pip install fwdllm[gpu]")
        from fwdllm.kernels import triton

        if not triton.usable():
            raise ConfigError("device cuda needs an NVIDIA GPU that PyTorch can use: there is none")
        return triton
    from fwdllm.kernels import reference

    return reference
