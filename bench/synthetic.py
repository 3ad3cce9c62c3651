"""Models of real shapes with random weights, for parity tests and benchmarks.

Weights are random blocks of the wanted type, scaled so that activations stay in range. The
tokenizer is the bundled model's, padded to the size of the vocabulary. llama.cpp loads the files
too. Writing needs about as much memory as the largest tensor, whatever the size of the file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import BinaryIO, NamedTuple

import gguf
import numpy as np

from fwdllm.bench.shapes import Shape, matrices, random_weights, std_of, vectors
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import atomic_write
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.kernels.types import BLOCKS, QuantType, row_bytes

Metadata = Mapping[str, bool | int | float | str]


class Matrix(NamedTuple):
    """A random tensor to write. shape: [n_out, n_in] or [experts, n_out, n_in]."""

    name: str
    shape: tuple[int, ...]
    std: float


def make_decoder(
    path: str | os.PathLike[str],
    shape: Shape,
    type: QuantType,
    seed: int = 0,
    metadata: Metadata | None = None,
    factors: np.ndarray | None = None,
) -> None:
    """Write a decoder of random weights, all matrices of ``type``.

    metadata: further keys without the architecture's prefix, such as "rope.scaling.type".
    factors: float32 [head_dim / 2], Llama 3's rope frequency factors.
    Errors: ConfigError if rows of the shape are not whole blocks of the type, or the folder does
    not exist. A write that fails leaves no file.
    """
    rng = np.random.default_rng(seed)
    tensors = [
        Matrix(name, (n_out, n_in), std_of(shape, name, n_in))
        for name, n_out, n_in in matrices(shape)
    ]
    small = vectors(rng, shape)
    if factors is not None:
        small["rope_freqs.weight"] = factors.astype(np.float32)
    keys = {**_metadata(shape), **(metadata or {})}
    write_model(path, shape.architecture, keys, shape.n_vocab, tensors, small, type, rng)


def write_model(
    path: str | os.PathLike[str],
    architecture: str,
    metadata: Metadata,
    n_vocab: int,
    tensors: Sequence[Matrix],
    small: Mapping[str, np.ndarray],
    type: QuantType,
    rng: np.random.Generator,
) -> None:
    """Write a GGUF file of random matrices of ``type``, each generated when it is written.

    metadata: keys without the architecture's prefix.  tensors: the random matrices.  small: further
    tensors with their values, written unchanged.
    Errors: ConfigError if rows are not whole blocks of the type, or the folder does not exist.
    A write that fails leaves no file.
    """
    _check_blocks(tensors, type)
    with atomic_write(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, architecture)
        _add_metadata(writer, architecture, metadata)
        _add_tokenizer(writer, n_vocab)
        for name, shape, _ in tensors:
            n_bytes = math.prod(shape[:-1]) * row_bytes(type, shape[-1])
            writer.add_tensor_info(name, shape, np.dtype(np.float32), n_bytes, type)
        for name, values in small.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(temporary, "ab") as file:
            for _, shape, std in tensors:
                _append(file, random_weights(rng, type, math.prod(shape[:-1]), shape[-1], std))
            for values in small.values():
                _append(file, values)


def _check_blocks(tensors: Sequence[Matrix], type: QuantType) -> None:
    block, _ = BLOCKS[type]
    for name, shape, _ in tensors:
        if shape[-1] % block:
            raise ConfigError(
                f"rows of {name} have {shape[-1]} weights, which are not whole {type.name} blocks "
                f"of {block}; choose another type"
            )


def _append(file: BinaryIO, tensor: np.ndarray) -> None:
    """Write a tensor at the next aligned position, and pad after it."""
    _align(file)
    file.write(tensor.data)
    _align(file)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _metadata(shape: Shape) -> Metadata:
    return {
        "context_length": shape.context,
        "embedding_length": shape.width,
        "block_count": shape.n_layers,
        "feed_forward_length": shape.hidden,
        "attention.head_count": shape.n_heads,
        "attention.head_count_kv": shape.n_kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": shape.head_dim,
        "rope.freq_base": shape.rope_base,
        "vocab_size": shape.n_vocab,
    }


def _add_metadata(writer: gguf.GGUFWriter, architecture: str, metadata: Metadata) -> None:
    writer.add_name("synthetic")
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in metadata.items():
        add[value.__class__](f"{architecture}.{key}", value)


def _add_tokenizer(writer: gguf.GGUFWriter, n_vocab: int) -> None:
    with as_file(files("fwdllm") / "assets" / "fwdllm-tiny.gguf") as path:
        source = GGUFFile.open(path)
    tokens = list(source.strings("tokenizer.ggml.tokens"))[:n_vocab]
    kinds = source.numbers("tokenizer.ggml.token_type").tolist()[:n_vocab]
    padding = n_vocab - len(tokens)
    writer.add_tokenizer_model(source.string("tokenizer.ggml.model"))
    writer.add_tokenizer_pre(source.string("tokenizer.ggml.pre"))
    writer.add_token_list(tokens + [f"[unused {i}]" for i in range(padding)])
    writer.add_token_types(kinds + [int(gguf.TokenType.UNUSED)] * padding)
    writer.add_token_merges(source.strings("tokenizer.ggml.merges"))
    writer.add_bos_token_id(source.integer("tokenizer.ggml.bos_token_id"))
    writer.add_eos_token_id(source.integer("tokenizer.ggml.eos_token_id"))
    writer.add_add_bos_token(True)
