"""fwdllm: fine-tune quantized language models where they run, forward and back or forward only.

    import fwdllm

    result = fwdllm.tune("model.gguf", "data.jsonl", "adapter.gguf")
    print(result.loss_before, result.loss_after)

Names are imported when they are first used, so that ``import fwdllm`` itself is quick. The version
is also read at first use, from the installed package's metadata.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwdllm.engine.classification import Classification
    from fwdllm.engine.data.jsonl import Example, read_jsonl
    from fwdllm.engine.engine import Engine
    from fwdllm.engine.errors import (
        AdapterError,
        ConfigError,
        DataError,
        FwdllmError,
        LlamaCppError,
        ModelError,
        NumericsError,
    )
    from fwdllm.engine.evaluation import Evaluation
    from fwdllm.engine.settings import DirectionsConfig, LoRAConfig
    from fwdllm.federation.channel import Channel
    from fwdllm.federation.fleet import Fleet
    from fwdllm.federation.simulation import Partition, SimulationResult, simulate
    from fwdllm.inference import classify, evaluate, generate
    from fwdllm.protocol.config import TrainConfig
    from fwdllm.protocol.federation import FederationConfig
    from fwdllm.protocol.presets import preset
    from fwdllm.tuning.recipes import Recipe, recipe
    from fwdllm.tuning.tune import TuneResult, tune

    __version__: str

__all__ = [
    "AdapterError",
    "Channel",
    "Classification",
    "ConfigError",
    "DataError",
    "DirectionsConfig",
    "Engine",
    "Evaluation",
    "Example",
    "FederationConfig",
    "Fleet",
    "FwdllmError",
    "LlamaCppError",
    "LoRAConfig",
    "ModelError",
    "NumericsError",
    "Partition",
    "Recipe",
    "SimulationResult",
    "TrainConfig",
    "TuneResult",
    "__version__",
    "classify",
    "evaluate",
    "generate",
    "preset",
    "read_jsonl",
    "recipe",
    "simulate",
    "tune",
]

_MODULES = {
    "Channel": "federation.channel",
    "Classification": "engine.classification",
    "DirectionsConfig": "engine.settings",
    "Engine": "engine.engine",
    "Evaluation": "engine.evaluation",
    "Example": "engine.data.jsonl",
    "FederationConfig": "protocol.federation",
    "Fleet": "federation.fleet",
    "LoRAConfig": "engine.settings",
    "Partition": "federation.simulation",
    "Recipe": "tuning.recipes",
    "SimulationResult": "federation.simulation",
    "TrainConfig": "protocol.config",
    "TuneResult": "tuning.tune",
    "classify": "inference",
    "evaluate": "inference",
    "generate": "inference",
    "preset": "protocol.presets",
    "read_jsonl": "engine.data.jsonl",
    "recipe": "tuning.recipes",
    "simulate": "federation.simulation",
    "tune": "tuning.tune",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fwdllm' has no attribute {name!r}")
    if name == "__version__":
        value = import_module("importlib.metadata").version("fwdllm")
    else:
        module = import_module(f"fwdllm.{_MODULES.get(name, 'engine.errors')}")
        value = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
