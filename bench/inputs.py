"""Inputs for the sides of a measurement: random tokens, and an adapter as if half trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fwdllm.engine import Engine
from fwdllm.engine.adapters.adapter import by_layer
from fwdllm.engine.backends import choose
from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.gguf.file import GGUFFile

# So small that thousands of steps along random directions hardly change the model.
UPDATE_RATE = 1e-6


def open_decoder(path: Path, tokens: int, backend: str) -> GGUFFile:
    """A model file that a backend can run and whose context has room for ``tokens`` tokens.

    Errors: ConfigError, ModelError.
    """
    file = GGUFFile.open(path)
    model = choose(file, backend)
    if model.encoder:
        raise ConfigError(f"{model.architecture} is an encoder; bench measures decoders")
    context = model.args.context
    if not 2 <= tokens <= context:
        raise ConfigError(f"--tokens must be from 2 to the model's {context}, not {tokens}")
    return file


def random_ids(file: GGUFFile, sequences: int, tokens: int) -> list[list[int]]:
    """Token ids [sequences][tokens] of the model's vocabulary, the same at each call."""
    n_vocab = len(file.strings("tokenizer.ggml.tokens"))
    return np.random.default_rng(0).integers(0, n_vocab, (sequences, tokens)).tolist()


def linear_targets(file: GGUFFile) -> tuple[str, ...]:
    """Every tensor name, without "blk.N." and ".weight", that LoRA can adapt."""
    blocks = by_layer(choose(file).linear)
    return tuple(sorted({name for block in blocks.values() for name in block}))


def prompt_batch(ids: Sequence[int], copies: int) -> Batch:
    """``copies`` equal sequences of all ids but the last; the last id is the only label."""
    n = len(ids) - 1
    return Batch(
        ids=np.tile(np.array(ids[:-1], np.int32), copies),
        positions=np.tile(np.arange(n, dtype=np.int32), copies),
        starts=np.arange(copies + 1, dtype=np.int32) * np.int32(n),
        label_rows=np.arange(1, copies + 1, dtype=np.int32) * np.int32(n) - np.int32(1),
        label_ids=np.full(copies, ids[-1], np.int32),
        label_sequence=np.arange(copies, dtype=np.int32),
    )


def step_batch(ids: Sequence[Sequence[int]], copies: int) -> Batch:
    """The sequences, repeated ``copies`` times; every token but the first of each is a label."""
    return pack([Tokens(list(s), [True] * len(s)) for s in ids] * copies)


def half_trained(engine: Engine) -> Engine:
    """Make B and the head of a new adapter random instead of zero, as if training had begun."""
    adapter = engine.adapter
    assert adapter is not None
    rng = np.random.default_rng(0)
    for target in adapter.targets:
        at = target.offset + adapter.config.rank * target.n_in
        n = adapter.config.rank * target.n_out
        adapter.theta[at : at + n] = rng.normal(scale=0.01, size=n)
    adapter.theta[adapter.n_lora :] = rng.normal(scale=0.3, size=adapter.n_head)
    return engine
