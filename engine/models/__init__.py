"""Model families: the graph for each architecture name in a GGUF file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np

from fwdllm.engine.errors import UnsupportedError
from fwdllm.engine.models import (
    bert,
    gemma,
    granite,
    llama,
    modern_bert,
    nomic,
    phi3,
    qwen,
    smollm3,
)
from fwdllm.engine.models.dimensions import Dimensions
from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.weights import Shapes
from fwdllm.kernels.api import Array, Matrix

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

Args = TypeVar("Args", bound=Dimensions)


@dataclass(frozen=True)
class Family(Generic[Args]):
    """The functions of one architecture, from embedding to output, and the ``Args`` they share.

    unembed: of a decoder.  pool, pool_vjp: of an encoder, which yields features, not next tokens.
    """

    read_args: Callable[[GGUFFile], Args]
    shapes: Callable[[Args], tuple[Shapes, Shapes]]
    embed: Callable[[Args, Pass], Array]
    layer: Callable[[Args, Pass, int, Array], Array]
    unembed: Callable[[Args, Pass, Array], tuple[Array, Matrix]] | None = None
    pool: Callable[[Args, np.ndarray, np.ndarray], np.ndarray] | None = None
    pool_vjp: Callable[[Args, np.ndarray, np.ndarray], np.ndarray] | None = None

    @property
    def encoder(self) -> bool:
        return self.pool is not None


# Any, because Args differ: a family must get what its own ``read_args`` has returned.
FAMILIES: dict[str, Family[Any]] = {
    "llama": Family(llama.read_args, llama.shapes, llama.embed, llama.layer, llama.unembed),
    "qwen2": Family(qwen.read_qwen2, llama.shapes, llama.embed, llama.layer, llama.unembed),
    "qwen3": Family(qwen.read_qwen3, llama.shapes, llama.embed, llama.layer, llama.unembed),
    "gemma": Family(gemma.read_gemma, gemma.shapes, gemma.embed, gemma.layer, gemma.unembed),
    "gemma2": Family(gemma.read_gemma2, gemma.shapes, gemma.embed, gemma.layer, gemma.unembed),
    "gemma3": Family(gemma.read_gemma3, gemma.shapes, gemma.embed, gemma.layer, gemma.unembed),
    "granite": Family(
        granite.read_args, llama.shapes, granite.embed, granite.layer, granite.unembed
    ),
    "smollm3": Family(smollm3.read_args, smollm3.shapes, llama.embed, smollm3.layer, llama.unembed),
    "phi3": Family(phi3.read_args, phi3.shapes, llama.embed, phi3.layer, llama.unembed),
    "bert": Family(
        bert.read_args, bert.shapes, bert.embed, bert.layer, None, bert.pool, bert.pool_vjp
    ),
    "nomic-bert": Family(
        nomic.read_args, nomic.shapes, nomic.embed, nomic.layer, None, bert.pool, bert.pool_vjp
    ),
    "modern-bert": Family(
        modern_bert.read_args,
        modern_bert.shapes,
        modern_bert.embed,
        modern_bert.layer,
        None,
        bert.pool,
        bert.pool_vjp,
    ),
}


def family_of(file: GGUFFile) -> tuple[str, Family[Any]]:
    """The architecture of a file and its family; UnsupportedError if it has no graph.

    As for a decoder whose attention is made to look ahead, and an encoder's that is not.
    """
    arch = file.string("general.architecture")
    if arch not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UnsupportedError(file.path, f"architecture {arch!r} is not one of {known}")
    family = FAMILIES[arch]
    causal = file.boolean(f"{arch}.attention.causal", not family.encoder)
    if causal == family.encoder:
        raise UnsupportedError(
            file.path, f"its attention is {'causal' if causal else 'not causal'}, unlike {arch}'s"
        )
    return arch, family
