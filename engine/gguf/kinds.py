"""GGUF files that are no language models, although people give them as such."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gguf import GGML_QUANT_SIZES

from fwdllm.engine.errors import ModelError

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

# Projectors had no type of their own at first, but this architecture.
_PROJECTOR = "clip"
_EVEN = ("llama", "qwen2", "qwen3")
_KINDS = {
    "adapter": "an adapter: name its model, and the file itself as the adapter",
    "mmproj": "the projector of a model that sees or hears: name the model beside it",
    "imatrix": "an importance matrix, which quantizing a model makes use of",
}


def check_model(file: GGUFFile) -> None:
    """ModelError if the file says that it is something else than a model, or has no weights.

    Or for what llama.cpp takes for granted and would end the process on: layers that differ where
    those of the architecture cannot, a mixture that uses no expert, vectors in blocks, numbers that
    are not finite, a context of no use.
    """
    kind = file.string("general.type", "model")
    if file.string("general.architecture", "") == _PROJECTOR:
        kind = "mmproj"
    if kind in _KINDS:
        raise ModelError(f"{file.path} is no model but {_KINDS[kind]}")
    if not file.tensors and "tokenizer.ggml.tokens" in file.metadata:
        raise ModelError(f"{file.path} is no model but a vocabulary, without weights")
    arch = file.string("general.architecture")
    _check_numbers(file, f"{arch}.")
    if arch in _EVEN:
        for key in ("head_count", "head_count_kv"):
            file.positive_of_layers(f"{arch}.attention.{key}", 1)
    if (context := file.integer(f"{arch}.context_length", 2)) < 2:
        raise ModelError(f"{file.path} reads {context} tokens at once, too few to predict another")
    n_experts = file.integer(f"{arch}.expert_count", 0)
    if n_experts and not 1 <= file.integer(f"{arch}.expert_used_count", 0) <= n_experts:
        raise ModelError(f"{file.path}: '{arch}.expert_used_count' is not 1 to {n_experts} experts")
    for name, tensor in file.tensors.items():
        if len(tensor.shape) == 1 and GGML_QUANT_SIZES[tensor.type][0] > 1:
            raise ModelError(f"{file.path}: tensor {name!r} is a vector of type {tensor.type.name}")


def _check_numbers(file: GGUFFile, prefix: str) -> None:
    for key in file.metadata:
        if key.startswith(prefix) and isinstance(file.metadata[key], float):
            value = file.number(key)
            if value < 0 and key.endswith("epsilon"):
                raise ModelError(f"{file.path}: metadata {key!r} is {value}, below 0")
