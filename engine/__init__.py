"""Quantized models, LoRA adapters, losses and directional derivatives by forward passes."""

from fwdllm.engine.adapter import Adapter, LoRAConfig
from fwdllm.engine.data import Example, read_jsonl
from fwdllm.engine.engine import Engine
from fwdllm.engine.estimators import DEFAULT_EPSILON, Probe
from fwdllm.engine.evaluation import Evaluation

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
