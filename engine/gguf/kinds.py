"""GGUF files that are no language models, although people give them as such."""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    Or if its layers differ where those of the architecture cannot: llama.cpp asserts that.
    """
    kind = file.metadata.get("general.type")
    if file.metadata.get("general.architecture") == _PROJECTOR:
        kind = "mmproj"
    if kind in _KINDS:
        raise ModelError(f"{file.path} is no model but {_KINDS[kind]}")
    if not file.tensors and "tokenizer.ggml.tokens" in file.metadata:
        raise ModelError(f"{file.path} is no model but a vocabulary, without weights")
    arch = file.metadata.get("general.architecture")
    if arch in _EVEN:
        for key in ("head_count", "head_count_kv"):
            file.positive_of_layers(f"{arch}.attention.{key}", 1)
