"""Generation, embeddings and logits by llama.cpp itself.

Each function opens the model, does its work and frees the model. All take the adapter as a GGUF
file, the way llama.cpp's own tools do with --lora.
"""

from __future__ import annotations

import codecs
import math
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fwdllm.engine.data.messages import Message
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.errors import ConfigError, DataError, ModelError, NumericsError
from fwdllm.engine.llamacpp.native import (
    NativeModel,
    apply_adapter,
    call,
    llama_cpp,
    open_context,
    open_model,
    reason,
)
from fwdllm.kernels.cpu import num_threads

__all__ = ["Tokenizer", "embed", "generate", "logits"]

_Path = str | os.PathLike[str]

# llama.cpp's own defaults (common/common.h).
_TOP_K, _TOP_P, _MIN_P, _MIN_KEEP = 40, 0.95, 0.05, 1

_TYPE_F32 = 0  # GGML_TYPE_F32


def generate(
    model_path: _Path,
    prompt: str | Sequence[Message],
    adapter_path: _Path | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    n_threads: int | None = None,
    chat: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[str]:
    """Continue a prompt; the text arrives piece by piece.

    prompt: a text, or the messages of a conversation.  chat: whether a text is a user's
    message, to be put into the chat template.  tools: what the template tells the model that it may
    call.  temperature: 0 takes the likeliest token;
    otherwise llama.cpp's default sampling, repeatable by ``seed``.  n_threads: None for as many as
    our kernels use. Ends at the end-of-text token, after ``max_tokens``, or when the model's
    context is full.
    Errors, all raised before the first piece: ModelError, AdapterError, ConfigError for an
    option out of range, DataError for a prompt that is empty or does not fit the context.
    NumericsError, as soon as logits are not finite.
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ConfigError(f"temperature must be 0 or more, not {temperature}")
    model = open_model(model_path, vocab_only=False)
    if not model.is_causal:
        raise ModelError(f"{model_path} is an encoder, which cannot generate text")
    tokenizer = Tokenizer(model)
    ids = _prompt_ids(tokenizer, prompt, chat, tools)
    _check_length(model, len(ids), "the prompt")
    n_tokens = min(len(ids) + max_tokens - 1, model.context_length)
    session = _Session(model, n_tokens, n_threads)
    if adapter_path is not None:
        session.adapt(adapter_path)
    n_new = n_tokens - len(ids) + 1  # the last new token is not fed back
    return _pieces(tokenizer, _sample(session, ids, n_new, temperature, seed))


def embed(
    model_path: _Path,
    texts: Sequence[str],
    adapter_path: _Path | None = None,
    n_threads: int | None = None,
) -> np.ndarray:
    """Embeddings of whole texts, float32 [len(texts), d], each of length 1.

    Tokens are pooled as the file says; by their mean if it says nothing. Each text is
    computed alone, so that its embedding does not depend on the others.
    Errors: ModelError, AdapterError, DataError for a text that is empty or does not fit.
    """
    model = open_model(model_path, vocab_only=False)
    pooling = model.pooling
    tokenizer = Tokenizer(model)
    batches = [tokenizer.encode(text, bos=True) for text in texts]
    for number, ids in enumerate(batches, 1):
        _check_length(model, len(ids), f"text {number}")
    longest = max(map(len, batches), default=1)
    session = _Session(model, longest, n_threads, pooling=pooling)
    if adapter_path is not None:
        session.adapt(adapter_path)
    found = np.empty((len(texts), llama_cpp.llama_model_n_embd_out(model.handle)), np.float32)
    for row, ids in zip(found, batches, strict=True):
        session.forget()
        session.decode(ids, outputs=True)
        row[:] = session.embedding(len(row))
        check_finite(row, "embeddings")
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.maximum(norms, np.finfo(np.float32).tiny)


def logits(
    model_path: _Path,
    ids: Sequence[int],
    adapter_path: _Path | None = None,
    n_threads: int | None = None,
) -> np.ndarray:
    """Logits after every token of one sequence, float32 [len(ids), n_vocab].

    Keys and values are kept in float32, so that only the quantization of activations makes a
    difference to another engine.
    Errors: ModelError, AdapterError, DataError for no ids, too many, or an id out of range.
    """
    model = open_model(model_path, vocab_only=False)
    if not model.is_causal:
        raise ModelError(f"{model_path} is an encoder, which has no logits")
    tokenizer = Tokenizer(model)
    if any(not 0 <= token < tokenizer.n_vocab for token in ids):
        raise DataError(f"token ids must be from 0 to {tokenizer.n_vocab - 1}")
    _check_length(model, len(ids), "the sequence")
    session = _Session(model, len(ids), n_threads)
    if adapter_path is not None:
        session.adapt(adapter_path)
    session.decode(ids, outputs=True)
    found = session.logits(len(ids), tokenizer.n_vocab)
    check_finite(found.max(axis=1), "logits")
    return found


def check_logits(context: Any, n_vocab: int) -> None:
    """NumericsError if the logits of the last token are not numbers to choose the next one by."""
    pointer = llama_cpp.llama_get_logits_ith(context, -1)
    # Of a NaN, of infinity, and of nothing but minus infinity the largest is not finite.
    check_finite(np.ctypeslib.as_array(pointer, (n_vocab,)).max(), "logits")


def check_finite(values: np.ndarray | np.floating[Any], what: str) -> None:
    """NumericsError if some of what the model computed is not finite."""
    if not np.isfinite(values).all():
        raise NumericsError(f"{what} are not finite: the model or the adapter is out of range")


class _Session:
    """A llama.cpp context of a model, for sequences of up to ``n_tokens``."""

    def __init__(
        self, model: NativeModel, n_tokens: int, n_threads: int | None, pooling: int | None = None
    ) -> None:
        pooled = {}
        if pooling is not None:
            # One batch and one micro-batch: encoders need the whole sequence at once.
            pooled = {"n_ubatch": n_tokens, "embeddings": True, "pooling_type": pooling}
        n_threads = n_threads or num_threads()
        self.model = model
        self.context = open_context(
            model,
            n_ctx=n_tokens,
            n_batch=n_tokens,
            n_threads=n_threads,
            n_threads_batch=n_threads,
            type_k=_TYPE_F32,
            type_v=_TYPE_F32,
            flash_attn_type=llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            **pooled,
        )
        # The model is an argument because it must outlive the context.
        weakref.finalize(self, _free_context, self.context, model)

    def adapt(self, path: _Path) -> None:
        """Apply a GGUF LoRA file; AdapterError if it is not one for this model."""
        apply_adapter(self.model, self.context, path)

    def decode(self, ids: Sequence[int], outputs: bool = False) -> None:
        """Append tokens to the sequence. outputs: results for all of them, not only the last."""
        batch = llama_cpp.llama_batch_init(len(ids), 0, 1)
        try:
            past = self._n_past()
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i] = token
                batch.pos[i] = past + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = outputs or i + 1 == len(ids)
            if call(llama_cpp.llama_decode, self.context, batch):
                raise ModelError(f"llama.cpp failed on {self.model.file.path}: {reason()}")
        finally:
            llama_cpp.llama_batch_free(batch)

    def forget(self) -> None:
        """Start a new sequence."""
        memory = llama_cpp.llama_get_memory(self.context)
        if memory:  # encoders have none
            llama_cpp.llama_memory_clear(memory, True)

    def logits(self, n_tokens: int, n_vocab: int) -> np.ndarray:
        """Logits of the tokens last decoded, float32 [n_tokens, n_vocab], a copy."""
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (n_tokens, n_vocab)).copy()

    def embedding(self, size: int) -> np.ndarray:
        """The pooled embedding of the sequence last decoded, float32 [size]."""
        pointer = llama_cpp.llama_get_embeddings_seq(self.context, 0)
        if not pointer:
            raise ModelError(f"{self.model.file.path} gives no embeddings")
        return np.ctypeslib.as_array(pointer, (size,))

    def _n_past(self) -> int:
        memory = llama_cpp.llama_get_memory(self.context)
        past: int = llama_cpp.llama_memory_seq_pos_max(memory, 0) + 1 if memory else 0
        return past


def _free_context(context: Any, _model: NativeModel) -> None:
    llama_cpp.llama_free(context)


def _prompt_ids(
    tokenizer: Tokenizer,
    prompt: str | Sequence[Message],
    chat: bool,
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    if isinstance(prompt, str) and not chat:
        return tokenizer.encode_prompt(prompt)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return tokenizer.encode_chat(messages, tools)


def _check_length(model: NativeModel, n_tokens: int, what: str) -> None:
    if n_tokens == 0:
        raise DataError(f"{what} is empty")
    if n_tokens > model.context_length:
        raise DataError(
            f"{what} has {n_tokens} tokens, but the model reads at most {model.context_length}"
        )


def _sampler(temperature: float, seed: int) -> Any:
    params = llama_cpp.llama_sampler_chain_default_params()
    chain = llama_cpp.llama_sampler_chain_init(params)
    if temperature == 0:
        steps = [llama_cpp.llama_sampler_init_greedy()]
    else:
        steps = [
            llama_cpp.llama_sampler_init_top_k(_TOP_K),
            llama_cpp.llama_sampler_init_top_p(_TOP_P, _MIN_KEEP),
            llama_cpp.llama_sampler_init_min_p(_MIN_P, _MIN_KEEP),
            llama_cpp.llama_sampler_init_temp(temperature),
            # LLAMA_DEFAULT_SEED means a random seed, so the remainder excludes it.
            llama_cpp.llama_sampler_init_dist(seed % llama_cpp.LLAMA_DEFAULT_SEED),
        ]
    for step in steps:
        llama_cpp.llama_sampler_chain_add(chain, step)
    return chain


def _sample(
    session: _Session, ids: list[int], n_new: int, temperature: float, seed: int
) -> Iterator[int]:
    sampler = _sampler(temperature, seed)
    try:
        n_vocab = llama_cpp.llama_vocab_n_tokens(session.model.vocab)
        for _ in range(n_new):
            session.decode(ids)
            check_logits(session.context, n_vocab)
            ids = [llama_cpp.llama_sampler_sample(sampler, session.context, -1)]
            yield ids[0]
    finally:
        llama_cpp.llama_sampler_free(sampler)


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        if tokenizer.is_end(token):
            break
        text = decoder.decode(tokenizer.piece(token))
        if text:
            yield text
    rest = decoder.decode(b"", final=True)
    if rest:
        yield rest
