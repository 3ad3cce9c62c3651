"""Model families: what an architecture's name in a GGUF file means."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fwdllm.engine.errors import UnsupportedError
from fwdllm.engine.models import bert, llama, qwen
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.weights import Shapes

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile


@dataclass(frozen=True)
class Family:
    """The functions of one architecture, from embedding to output.

    unembed: of a decoder.  pool: of an encoder, which yields features, not next tokens.
    """

    read_args: Callable[[GGUFFile], Any]
    shapes: Callable[[Any], tuple[Shapes, Shapes]]
    embed: Callable[[Any, Pass], np.ndarray]
    layer: Callable[[Any, Pass, int, np.ndarray], np.ndarray]
    unembed: Callable[[Any, Pass, np.ndarray], tuple[np.ndarray, Any]] | None = None
    pool: Callable[[Any, np.ndarray, np.ndarray], np.ndarray] | None = None

    @property
    def encoder(self) -> bool:
        return self.pool is not None


FAMILIES = {
    "llama": Family(llama.read_args, llama.shapes, llama.embed, llama.layer, llama.unembed),
    "qwen2": Family(qwen.read_qwen2, llama.shapes, llama.embed, llama.layer, llama.unembed),
    "qwen3": Family(qwen.read_qwen3, llama.shapes, llama.embed, llama.layer, llama.unembed),
    "bert": Family(bert.read_args, bert.shapes, bert.embed, bert.layer, pool=bert.pool),
}


def family_of(file: GGUFFile) -> tuple[str, Family]:
    """The architecture of a file and its family; UnsupportedError if it has no graph."""
    arch = file.string("general.architecture")
    if arch not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(file.path, f"architecture {arch!r} is not one of {known}")
    return arch, FAMILIES[arch]
