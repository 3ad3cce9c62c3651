"""Models of true shape with random weights, for parity tests and benchmarks.

Weights are random blocks of the wanted type, scaled so that activations keep their size; the
tokenizer is the bundled model's, padded to the vocabulary. llama.cpp loads the files too.
Memory stays at about the largest tensor, whatever the size of the file.
"""

from __future__ import annotations

import os
from importlib.resources import as_file, files
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np

from fwdllm.bench.shapes import Shape, matrices, random_weights, std_of, vectors
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import atomic_write
from fwdllm.engine.gguf_file import GGUFFile
from fwdllm.kernels.types import BLOCKS, QuantType, row_bytes


def make_decoder(
    path: str | os.PathLike[str],
    shape: Shape,
    type: QuantType,
    seed: int = 0,
    metadata: dict[str, float | int | str] | None = None,
    factors: np.ndarray | None = None,
) -> None:
    """Write a decoder of random weights, all matrices of ``type``.

    metadata: further keys without the architecture's prefix, such as "rope.scaling.type".
    factors: float32 [head_dim / 2], Llama 3's rope frequency factors.
    Errors: ConfigError if rows of the shape are not whole blocks of the type, or the folder does
    not exist. A write that fails leaves no file.
    """
    _check_blocks(shape, type)
    rng = np.random.default_rng(seed)
    tensors, small = matrices(shape), vectors(rng, shape)
    if factors is not None:
        small["rope_freqs.weight"] = factors.astype(np.float32)
    with atomic_write(Path(path)) as temporary:
        writer = gguf.GGUFWriter(temporary, shape.architecture)
        _add_metadata(writer, shape, metadata or {})
        _add_tokenizer(writer, shape.n_vocab)
        for name, n_out, n_in in tensors:
            n_bytes = n_out * row_bytes(type, n_in)
            writer.add_tensor_info(name, (n_out, n_in), np.dtype(np.float32), n_bytes, type)
        for name, values in small.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        with open(temporary, "ab") as file:
            for name, n_out, n_in in tensors:
                _append(file, random_weights(rng, type, n_out, n_in, std_of(shape, name, n_in)))
            for values in small.values():
                _append(file, values)


def _check_blocks(shape: Shape, type: QuantType) -> None:
    block, _ = BLOCKS[type]
    for name, _, n_in in matrices(shape):
        if n_in % block:
            raise ConfigError(
                f"rows of {name} have {n_in} weights, which are not whole {type.name} blocks of "
                f"{block}; choose another type"
            )


def _append(file: BinaryIO, tensor: np.ndarray) -> None:
    """Write a tensor from an aligned position to the next one behind it."""
    _align(file)
    file.write(tensor.data)
    _align(file)


def _align(file: BinaryIO) -> None:
    file.write(bytes(-file.tell() % gguf.GGUF_DEFAULT_ALIGNMENT))


def _add_metadata(
    writer: gguf.GGUFWriter, shape: Shape, metadata: dict[str, float | int | str]
) -> None:
    writer.add_name("synthetic")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.hidden)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.n_vocab)
    for key, value in metadata.items():
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}
        add[value.__class__](f"{shape.architecture}.{key}", value)


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
