"""Quantized models, LoRA adapters, losses and directional derivatives by forward passes.

Names are imported when they are first used, so that code that needs only one module of the engine
does not load llama.cpp.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fwdllm.engine.adapters.adapter import Adapter
    from fwdllm.engine.data.jsonl import Example, read_jsonl
    from fwdllm.engine.engine import Engine
    from fwdllm.engine.estimators.plan import Probe
    from fwdllm.engine.evaluation import Evaluation
    from fwdllm.engine.settings import DEFAULT_EPSILON, LoRAConfig

__all__ = [
    "DEFAULT_EPSILON",
    "Adapter",
    "Engine",
    "Evaluation",
    "Example",
    "LoRAConfig",
    "Probe",
    "read_jsonl",
]

_MODULES = {
    "DEFAULT_EPSILON": "settings",
    "Adapter": "adapters.adapter",
    "Engine": "engine",
    "Evaluation": "evaluation",
    "Example": "data.jsonl",
    "LoRAConfig": "settings",
    "Probe": "estimators.plan",
    "read_jsonl": "data.jsonl",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'fwdllm.engine' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"fwdllm.engine.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
