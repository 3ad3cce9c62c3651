"""The modules of kernels against their interface: the same names, parameters and defaults.

Types are for mypy, which checks all three where ``engine.devices`` returns them.
"""

from __future__ import annotations

import importlib.util
import inspect
from types import ModuleType
from typing import Any

import pytest

from fwdllm.kernels import cpu, reference
from fwdllm.kernels.api import BackwardKernels, HostKernels

# What a module has of its own.
OWN = {
    "cpu": {"activations", "compiler", "isa", "isas", "num_threads", "peak", "set_num_threads"},
    "reference": set(),
    "triton": {"usable"},
}


def operations(interface: type) -> dict[str, Any]:
    return {
        name: member
        for name, member in inspect.getmembers(interface, inspect.isfunction)
        if not name.startswith("_")
    }


def parameters(function: Any) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each but self."""
    found = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, p.default) for p in found if p.name != "self"]


def check(module: ModuleType, *interfaces: type) -> None:
    wanted = {name: f for i in interfaces for name, f in operations(i).items()}
    name = module.__name__.rpartition(".")[2]
    assert set(module.__all__) == set(wanted) | OWN[name]
    for operation, declared in wanted.items():
        assert parameters(getattr(module, operation)) == parameters(declared), operation


@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
def test_kernels_of_the_host_have_the_whole_interface(module: ModuleType) -> None:
    check(module, HostKernels, BackwardKernels)
    assert isinstance(module, HostKernels)


def test_kernels_of_gpus_have_all_but_the_hosts() -> None:
    if any(importlib.util.find_spec(name) is None for name in ("torch", "triton")):
        pytest.skip("torch or triton is not installed")
    from fwdllm.kernels import triton

    check(triton, BackwardKernels)
    assert not isinstance(triton, HostKernels)
