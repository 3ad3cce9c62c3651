"""The only access to llama.cpp: no crash by this processor or a damaged file, and no printing.

``llama_cpp`` is imported here, after ``probe`` has tested which of its parts work, and other
modules import it from here. Every model and context is opened here: by ``open_model`` and
``open_context``, or as llama-cpp-python's own class, by ``Llama``.

llama.cpp ends the process on some inconsistent files and prints its reasons. So a file is first
checked by our own reader, and what llama.cpp logs is kept for the message of the exception.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np

from fwdllm.engine.adapters.io import check_gguf_adapter
from fwdllm.engine.backends import choose
from fwdllm.engine.errors import (
    AdapterError,
    FwdllmWarning,
    LlamaCppError,
    ModelError,
    TextError,
)
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.gguf.kinds import check_model
from fwdllm.engine.llamacpp import probe, trial

if probe.verdict().state == probe.BROKEN:
    raise LlamaCppError(f"llama.cpp cannot be used here: {probe.verdict().reason}")
import llama_cpp as llama_cpp  # other modules import it from here

T = TypeVar("T")

_LOG_LEVEL_ERROR = 4  # GGML_LOG_LEVEL_ERROR in ggml.h
_MAX_MESSAGES = 20
_MAX_LAYERS = 512  # LLAMA_MAX_LAYERS in src/llama-hparams.h, asserted
_VOCAB_TYPE_NONE, _VOCAB_TYPE_BPE = 0, 2  # enum llama_vocab_type
_POOLING_NONE, _POOLING_MEAN, _POOLING_RANK = 0, 1, 4  # enum llama_pooling_type
_POOLINGS = (_POOLING_NONE, _POOLING_MEAN, 2, 3)  # the others: the first token, the last

# llama.cpp splits a text by regular expressions, whose matcher calls itself once for each character
# of a word: 330 bytes of stack with GCC's library. So texts with long words have a stack of their
# own, of 256 MiB that is used only as far as needed, and words a limit that is far below it: what a
# pattern takes at once may be spaces, letters and punctuation, each of that length.
_RUNS = re.compile(r"\s+|\S+")
LONGEST_WORD = 100_000  # characters
_SHALLOW, _STACK = 512, 256 << 20
_stack_size = threading.Lock()  # of threads to be started, a setting of the process

_messages: list[str] = []


class NativeModel:
    """A model opened by llama.cpp; it is freed with the last reference.

    file: the same file, opened by us.  handle, vocab: pointers for the functions of
    ``llama_cpp``.
    """

    def __init__(self, file: GGUFFile, handle: Any) -> None:
        self.file = file
        self.handle = handle
        self.vocab = llama_cpp.llama_model_get_vocab(handle)
        weakref.finalize(self, llama_cpp.llama_model_free, handle)

    @property
    def architecture(self) -> str:
        """general.architecture of the file."""
        return self.file.string("general.architecture")

    @property
    def context_length(self) -> int:
        """The longest sequence the model was trained for, in tokens."""
        return self.file.integer(f"{self.architecture}.context_length")

    @property
    def pooling(self) -> int:
        """How a text's features are made from its tokens', as enum llama_pooling_type; the mean if
        the file says nothing. ModelError for a reranker, which has no features."""
        pooling = self.file.integer(f"{self.architecture}.pooling_type", _POOLING_NONE)
        if pooling == _POOLING_RANK:
            raise ModelError(f"{self.file.path} is a reranker, which has no embeddings")
        if pooling not in _POOLINGS:
            raise ModelError(f"{self.file.path} pools by {pooling}, which llama.cpp does not know")
        return pooling or _POOLING_MEAN

    @property
    def is_causal(self) -> bool:
        """Whether the model predicts next tokens; encoders such as BERT do not."""
        return self.file.boolean(f"{self.architecture}.attention.causal", True)


def open_model(
    path: str | os.PathLike[str],
    *,
    vocab_only: bool,
    cpu_only: bool = False,
    header_only: bool = False,
) -> NativeModel:
    """Open a GGUF file with llama.cpp, the vocabulary only or the weights too.

    cpu_only: use no GPU, even if llama.cpp was built for one.  header_only: check weights by the
    header, and read none of them; nothing can be computed with the model.
    Errors: ModelError, with llama.cpp's reason, if it is missing, damaged or unsupported.
    """
    file = GGUFFile.open(path)
    if not vocab_only:
        check_model(file)
    _check(file)
    repacks = not vocab_only and extra_buffers()
    stage = trial.VOCABULARY if vocab_only else trial.HEADER if header_only else trial.WEIGHTS
    trial.check(file.paths, stage, repacks)
    initialize()
    params = llama_cpp.llama_model_default_params()
    _set(params, vocab_only=vocab_only, use_extra_bufts=repacks)
    no_devices = ctypes.c_void_p(None)  # an empty list of devices
    if cpu_only:
        _set(params, devices=ctypes.addressof(no_devices))
    if header_only:  # llama.cpp asserts that nothing is mapped then
        _set(params, no_alloc=True, load_mode=llama_cpp.LLAMA_LOAD_MODE_NONE)
    handle = call(llama_cpp.llama_model_load_from_file, os.fsencode(path), params)
    if not handle:
        raise ModelError(f"llama.cpp cannot read {path}: {reason()}")
    model = NativeModel(file, handle)
    if llama_cpp.llama_vocab_type(model.vocab) == _VOCAB_TYPE_NONE:
        raise ModelError(f"{path} has no vocabulary")
    return model


def open_context(model: NativeModel, **options: Any) -> Any:
    """A context of a model, a pointer for the functions of ``llama_cpp``; free it before the model.

    options: fields of llama_context_params. Errors: ModelError if llama.cpp cannot make it.
    """
    params = llama_cpp.llama_context_default_params()
    _set(params, **options)
    context = call(llama_cpp.llama_init_from_model, model.handle, params)
    if not context:
        raise ModelError(f"llama.cpp cannot run {model.file.path}: {reason()}")
    return context


class Llama(llama_cpp.Llama):
    """llama-cpp-python's own class, opened so that it works on this processor.

    Errors of the constructor: LlamaCppError if it cannot work, ModelError as of ``open_model``,
    others as of the base class.
    """

    def __new__(cls, model_path: str, **_options: Any) -> Llama:
        # Not in __init__: the base class cannot free what was not opened.
        file = GGUFFile.open(model_path)
        check_model(file)
        _check(file)
        trial.check(file.paths, trial.WEIGHTS, extra_buffers())
        return super().__new__(cls)

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        """The token ids of a text, see ``native.tokenize``."""
        return tokenize(self._model.vocab, text, add_bos, special)

    @property
    def model_params(self) -> Any:
        """llama_model_params. The base sets them before it opens the file, and has no option for
        extra buffer types."""
        return self._model_params

    @model_params.setter
    def model_params(self, params: Any) -> None:
        _set(params, use_extra_bufts=extra_buffers())
        self._model_params = params


def _set(params: Any, **fields: Any) -> None:
    """Set fields of a struct. LlamaCppError if one does not exist: ctypes would just add it."""
    for name, value in fields.items():
        if not hasattr(params, name):
            raise LlamaCppError(
                f"llama-cpp-python {llama_cpp.__version__} has no {name} in "
                f"{type(params).__name__}: install 0.3.36, which this was written for"
            )
        setattr(params, name, value)


def extra_buffers() -> bool:
    """Whether llama.cpp's extra buffer types (weights repacked for AMX and the like) work here.

    Warns once if they do not. Errors: LlamaCppError if llama.cpp cannot compute at all.
    """
    found = probe.verdict()
    if found.state == probe.VOCABULARY:
        raise LlamaCppError(
            f"llama.cpp's kernels fail on this processor ({found.reason}): {probe.REBUILD}"
        )
    if found.state == probe.PLAIN:
        _say_slower(found.reason)
    return found.state == probe.FULL


@functools.cache
def _say_slower(why: str) -> None:
    warnings.warn(
        f"llama.cpp runs without its fastest kernels, as a trial of them failed here ({why}); "
        f"{probe.REBUILD}",
        FwdllmWarning,
        stacklevel=4,
    )


def tokenize(vocab: Any, text: bytes, special_around: bool, special_in: bool) -> list[int]:
    """The token ids of a text in UTF-8.

    special_around: also what the vocabulary wants around a text.  special_in: whether names of
    special tokens in the text are those.
    Errors: TextError for a text that cannot be tokenized, ModelError for a vocabulary that cannot.
    """
    if len(text) < _SHALLOW:
        return _tokenize(vocab, text, special_around, special_in)
    longest = max(len(run) for run in _RUNS.findall(text.decode("utf-8", "replace")))
    if longest > LONGEST_WORD and llama_cpp.llama_vocab_type(vocab) == _VOCAB_TYPE_BPE:
        raise TextError(
            f"{longest:,} characters without a space between them (or nothing but spaces) are too "
            f"many for the model's tokenizer, which takes {LONGEST_WORD:,}"
        )
    if longest < _SHALLOW:
        return _tokenize(vocab, text, special_around, special_in)
    return _deep(lambda: _tokenize(vocab, text, special_around, special_in))


def _tokenize(vocab: Any, text: bytes, special_around: bool, special_in: bool) -> list[int]:
    # One token per byte and the two around them suffice, except where a normalizer of the
    # vocabulary makes the text longer; then llama.cpp says how many.
    size = len(text) + 2
    for _ in range(2):
        buffer = (llama_cpp.llama_token * size)()
        n = llama_cpp.llama_tokenize(
            vocab, text, len(text), buffer, size, special_around, special_in
        )
        if n >= 0:
            found: list[int] = buffer[:n]
            n_vocab = llama_cpp.llama_vocab_n_tokens(vocab)
            if n and not (min(found) >= 0 and max(found) < n_vocab):
                raise ModelError("the vocabulary has no tokens for a part of the text")
            return found
        size = -n
    raise TextError(f"a text of {len(text)} bytes is too long for llama.cpp's tokenizer")


def _deep(work: Callable[[], T]) -> T:
    """The result of some work, done with a large stack."""
    found: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            errors.append(error)

    with _stack_size:
        before = threading.stack_size(_STACK)
        try:
            thread = threading.Thread(target=run)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    if errors:
        raise errors[0]
    return found[0]


def apply_adapter(model: NativeModel, context: Any, path: str | os.PathLike[str]) -> None:
    """Apply a GGUF LoRA file to a context of a model; AdapterError if it does not fit."""
    check_gguf_adapter(os.fspath(path), model.architecture, choose(model.file).linear)
    adapter = call(llama_cpp.llama_adapter_lora_init, model.handle, os.fsencode(path))
    if not adapter:
        raise AdapterError(f"llama.cpp cannot use {path} with this model: {reason()}")
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
    scales = (ctypes.c_float * 1)(1.0)
    if call(llama_cpp.llama_set_adapters_lora, context, adapters, 1, scales):
        raise AdapterError(f"llama.cpp cannot apply {path}: {reason()}")


def call(function: Callable[..., Any], *args: Any) -> Any:
    """Call into llama.cpp; if that fails, ``reason`` says why."""
    _messages.clear()
    return function(*args)


def reason() -> str:
    """What llama.cpp logged first when the last ``call`` failed."""
    message = _messages[0] if _messages else "it gives no reason"
    # "function: error loading model: what happened" -> "what happened"
    return message.rsplit("error loading model: ", maxsplit=1)[-1]


@functools.cache
def _say_default_splitter(path: str) -> None:
    warnings.warn(
        f"{path} does not say how a text is split before it is tokenized, as files of before May "
        "2024: llama.cpp's default may give other tokens than the model was trained on",
        FwdllmWarning,
        stacklevel=4,
    )


@functools.cache
def initialize() -> None:
    """Start llama.cpp once per process and take over its log, which it would print."""
    llama_cpp.llama_log_set(_keep_errors, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()


@llama_cpp.llama_log_callback
def _keep_errors(level: int, text: bytes, _user_data: object) -> None:
    if level == _LOG_LEVEL_ERROR and len(_messages) < _MAX_MESSAGES:
        _messages.append(text.decode("utf-8", "replace").strip())


def _check(file: GGUFFile) -> None:
    """Refuse what llama.cpp would end the process on, whatever it is opened for."""
    layers = f"{file.string('general.architecture')}.block_count"
    file.integer(layers, maximum=_MAX_LAYERS)
    file.positive(layers)
    _check_vocabulary(file)


def _check_vocabulary(file: GGUFFile) -> None:
    """Refuse what llama.cpp's vocabulary loader asserts or assumes without a check."""
    if "tokenizer.ggml.tokens" not in file.metadata:
        raise ModelError(f"{file.path} has no vocabulary")
    tokens = file.strings("tokenizer.ggml.tokens")
    if not tokens:
        raise ModelError(f"{file.path} has no vocabulary")
    if len(set(tokens)) != len(tokens):
        [(token, _)] = Counter(tokens).most_common(1)
        raise ModelError(
            f"{file.path} cannot be used: its vocabulary has the token {token!r} twice, and "
            "llama.cpp ends the process on that"
        )
    model, splitter = file.string("tokenizer.ggml.model", ""), "tokenizer.ggml.pre"
    if model == "gpt2" and splitter not in file.metadata:
        _say_default_splitter(str(file.path))
    for key, dtype in (("scores", np.float32), ("token_type", np.int32)):
        values = file.numbers(f"tokenizer.ggml.{key}", np.zeros(len(tokens), dtype))
        if values.dtype != dtype or len(values) != len(tokens):
            raise ModelError(f"{file.path} is damaged: its {key} do not match its vocabulary")
