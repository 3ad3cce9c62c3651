"""The backend of a model file, our own graph or llama.cpp, chosen by the file's header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fwdllm.engine.errors import ConfigError, UnsupportedError
from fwdllm.engine.gguf.kinds import check_model
from fwdllm.engine.models import family_of
from fwdllm.engine.models.dimensions import Dimensions
from fwdllm.engine.settings import METHODS, OWN_METHODS

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

OWN, LLAMA_CPP = "fwdllm", "llama.cpp"
BACKENDS = ("auto", OWN, LLAMA_CPP)

_ENCODERS, _ENCODER_DECODERS = ("t5encoder",), ("t5",)
# Matrices of layers that llama.cpp uses as convolution kernels or lookup tables, not in a matmul.
_NOT_MULTIPLIED = ("ssm_conv1d", "shortconv.conv", "attn_rel_b")
# Of encoders made for classes or ranks. Their features, which are all that we use, are before it.
_CLASSIFIER = "cls."


@dataclass(frozen=True)
class Backend:
    """The backend of a file, and facts about its model.

    name: ``OWN`` or ``LLAMA_CPP``.  reason: why no graph of our own can compute the model; None if
    one can, or if llama.cpp was asked for by name.  args: the arguments of our own graph, or for
    llama.cpp the model's dimensions.  encoder: whether the model yields features, not next tokens.
    linear: (n_out, n_in) of each linear layer that an adapter can target, by tensor name without
    ".weight".
    """

    name: str
    reason: str | None
    architecture: str
    args: Dimensions
    encoder: bool
    linear: Mapping[str, tuple[int, int]]

    @property
    def own(self) -> bool:
        """Whether the backend is our own graph, which has tangents and memory budgets."""
        return self.name == OWN

    @property
    def method(self) -> str:
        """The best method for directional derivatives that this backend has."""
        return "forward-ad" if self.own else "central"

    def check_method(self, method: str) -> None:
        """ConfigError for a method that needs tangents or a way back, if it has none."""
        if method in OWN_METHODS and not self.own:
            others = " or ".join(m for m in METHODS if m not in OWN_METHODS)
            raise ConfigError(
                f"method {method} needs a graph of our own, but {self.architecture} is computed by "
                f"llama.cpp: use method {others}"
            )


def choose(file: GGUFFile, name: str = "auto") -> Backend:
    """The backend for a file: "auto" is our own graph where there is one.

    Errors: ConfigError for a name that does not exist, ModelError for a damaged or incomplete file,
    UnsupportedError if the backend does not know such models.
    """
    if name not in BACKENDS:
        raise ConfigError(f"backend must be one of {', '.join(BACKENDS)}, not {name!r}")
    check_model(file)
    if name == LLAMA_CPP:
        return _llama_cpp(file, None)
    try:
        return _own(file)
    except UnsupportedError as error:
        if name == OWN:
            raise
        return _llama_cpp(file, error.reason)


def _own(file: GGUFFile) -> Backend:
    architecture, family = family_of(file)
    args = family.read_args(file)
    required, optional = family.shapes(args)
    known = {*required, *optional}
    for tensor in file.tensors:
        if tensor in known:
            file.check_type(tensor)
        elif not tensor.startswith(_CLASSIFIER):
            raise UnsupportedError(
                file.path, f"tensor {tensor!r} is none that our graph of {architecture} reads"
            )
    linear = {
        tensor.removesuffix(".weight"): (shape[0], shape[1])
        for tensor, shape in required.items()
        if tensor.startswith("blk.") and len(shape) == 2
    }
    return Backend(OWN, None, architecture, args, family.encoder, linear)


def _llama_cpp(file: GGUFFile, reason: str | None) -> Backend:
    arch = file.string("general.architecture")
    if arch in _ENCODER_DECODERS:
        raise UnsupportedError(
            file.path, f"{arch} is an encoder with a decoder, which is not tuned"
        )
    linear = {
        name.removesuffix(".weight"): (tensor.shape[0], tensor.shape[1])
        for name, tensor in file.tensors.items()
        if name.startswith("blk.")
        and name.endswith(".weight")
        and len(tensor.shape) == 2
        and not name.removesuffix(".weight").endswith(_NOT_MULTIPLIED)
    }
    encoder = arch in _ENCODERS or not file.boolean(f"{arch}.attention.causal", True)
    return Backend(LLAMA_CPP, reason, arch, _dimensions(file, arch), encoder, linear)


def _dimensions(file: GGUFFile, arch: str) -> Dimensions:
    width = file.positive(f"{arch}.embedding_length")
    n_heads = _largest(file, f"{arch}.attention.head_count", 0)
    head_dim = width // n_heads if n_heads else 0
    return Dimensions(
        n_layers=file.positive(f"{arch}.block_count"),
        width=file.positive(f"{arch}.embedding_length_out", width),
        n_heads=n_heads,
        n_kv_heads=_largest(file, f"{arch}.attention.head_count_kv", n_heads),
        head_dim=file.integer(f"{arch}.attention.key_length", head_dim),
        hidden=_largest(file, f"{arch}.feed_forward_length", 0),
        n_vocab=file.matrix_rows("token_embd.weight"),
        context=file.positive(f"{arch}.context_length"),
    )


def _largest(file: GGUFFile, key: str, default: int) -> int:
    """Metadata ``key``, an integer, or the largest if there is one for each layer."""
    values = file.metadata.get(key, default)
    if isinstance(values, np.ndarray) and values.size and values.dtype.kind in "iu":
        return int(values.max())
    return file.integer(key, default)
