"""The models that are served: one set of weights in llama.cpp, and an adapter for each name."""

from __future__ import annotations

import asyncio
import ctypes
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from fwdllm.engine.adapters.io import check_gguf_adapter
from fwdllm.engine.backends import Backend, choose
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.errors import AdapterError, ModelError
from fwdllm.engine.llamacpp.generation import check_finite, check_logits
from fwdllm.engine.llamacpp.native import Llama, call, llama_cpp, open_model, reason
from fwdllm.http.adapter_bytes import as_file
from fwdllm.http.api_error import ApiError
from fwdllm.http.grammar_process import Constraint, GrammarError, GrammarProcess
from fwdllm.http.loras import Loras, Mix
from fwdllm.http.schemas import LoraScale
from fwdllm.http.store import AdapterRow, Store
from fwdllm.kernels.cpu import num_threads

T = TypeVar("T")

# Enough for most chats; a context of 128 k would need gigabytes for its KV cache.
DEFAULT_CONTEXT = 4096

# Adapters kept in llama.cpp's memory.
_MAX_LOADED = 4
# A text that is generated has about ten times a trial's share of a processor.
_TRIAL_NICE = 10
# Grammars that need not be tried again: an app has a few, and sends them with every request.
_MAX_TRIED = 64
_WALK_TOKENS = 4


class Models:
    """The base model and every adapter of a store; only one thread, started here, uses them.

    One thread, because a llama.cpp context can have only one user at a time. Not a lock, because a
    cancelled coroutine would release the lock while its call into llama.cpp still runs.

    path: the GGUF file.  base: the base model's name.  given: adapters of the command line, see
    ``Loras``.  context: tokens of a conversation.  is_causal: whether the model generates text; an
    encoder only embeds.  backend: what tunes the model.  tokenizer: the model's.
    max_characters: no text of more fits into the context.
    Errors of the constructor: ModelError.
    """

    def __init__(
        self,
        path: Path,
        base: str,
        given: Sequence[AdapterRow],
        store: Store,
        context: int | None,
    ) -> None:
        native = open_model(path, vocab_only=True)
        self.backend = choose(native.file)
        self.path, self.base, self._store = path, base, store
        self.loras = Loras(store, given)
        self.architecture, self.is_causal = native.architecture, native.is_causal
        self.context = min(context or DEFAULT_CONTEXT, native.context_length)
        self._pooling = native.pooling
        self.tokenizer = Tokenizer(native)
        longest = max(map(len, native.file.strings("tokenizer.ggml.tokens")))
        self.max_characters = longest * self.context
        self._closing = threading.Event()
        # One to try what requests send, and one for the text that is being generated.
        self._trial = GrammarProcess(path, self.tokenizer.n_vocab, nice=_TRIAL_NICE)
        self._tried: dict[str, str | None] = {}  # see ``_found``
        self._grammars = GrammarProcess(path, self.tokenizer.n_vocab)
        self._sessions: dict[bool, _Session] = {}
        self._session(embedding=not self.is_causal)
        self._thread = ThreadPoolExecutor(1, "models")

    def close(self) -> None:
        """Stop the answer in progress and free the weights."""
        self._closing.set()
        self.end_processes()
        self._thread.shutdown(cancel_futures=True)
        for session in self._sessions.values():
            session.llama.close()

    def end_processes(self) -> None:
        """End the processes that follow grammars."""
        for process in (self._trial, self._grammars):
            process.close()

    def try_grammar(self, grammar: str) -> None:
        """See in a process of low priority whether a text can begin by a grammar.

        One thread may do so at a time. Errors: GrammarError.
        """
        if grammar not in self._tried:
            try:
                self._walk(grammar)
            except GrammarError as error:
                self._found(grammar, str(error))
            else:
                self._found(grammar, None)
        if (why := self._tried[grammar]) is not None:
            raise GrammarError(why)

    def _walk(self, grammar: str) -> None:
        """Follow a few tokens, as what a grammar costs may grow with each."""
        order = random.Random(0)
        self._trial.begin(grammar)
        for step in range(_WALK_TOKENS):
            may = np.flatnonzero(self._trial.allowed())
            if not step and not len(may):
                raise GrammarError("no token of this model can be the first by the grammar")
            if not len(may) or self.tokenizer.is_end(token := int(order.choice(may))):
                return
            self._trial.accept(token)

    def _found(self, grammar: str, why: str | None) -> None:
        """Remember whether a grammar can be followed. why: it cannot."""
        self._tried[grammar] = why
        while len(self._tried) > _MAX_TRIED:
            del self._tried[next(iter(self._tried))]

    def run(
        self,
        work: Callable[[ServedLlama], T],
        model: str | None,
        cancelled: threading.Event,
        *,
        lora: Sequence[LoraScale] | None = None,
        embedding: bool = False,
    ) -> asyncio.Future[T]:
        """Queue some work with a model for the thread.

        model, lora: see ``mix_of``.  cancelled: once it is set, text ends with the next token.
        """

        def task() -> T:
            if cancelled.is_set():
                raise ApiError(400, "the client has closed the request")
            llama = self._session(embedding=embedding).use(self.mix_of(model, lora))
            llama.stops = (cancelled, self._closing)
            return work(llama)

        return asyncio.wrap_future(self._thread.submit(task))

    def mix_of(self, model: str | None, lora: Sequence[LoraScale] | None) -> Mix:
        """The adapters for a request that names a model, or adapters, or neither.

        Errors: ApiError 404 for an unknown model, 400 for unknown adapters, and if the model has
        an adapter and others are named, too.
        """
        adapter = None if model is None else self.adapter_of(model)
        if lora is not None:
            if adapter is not None:
                text = f"{model} has an adapter already: name lora with {self.base}, or no model"
                raise ApiError(400, text, "lora")
            return self.loras.mix(lora)
        if model is None:
            return self.loras.default
        return () if adapter is None else ((adapter, 1.0),)

    def name_of(self, model: str | None, lora: Sequence[LoraScale] | None) -> str:
        """The model's name in the answer to a request."""
        if model is not None or lora is not None:
            return model or self.base
        match self.loras.default:
            case ((adapter, 1.0),):
                return adapter.model
            case _:
                return self.base

    def adapter_of(self, model: str | None) -> AdapterRow | None:
        """The adapter of a model name, None for the base model. Errors: ApiError 404."""
        model = self.name_of(None, None) if model is None else model
        if model == self.base:
            return None
        found = self._store.adapter_of_model(model)
        if found is None:
            raise ApiError(404, f"The model {model!r} does not exist", "model", "model_not_found")
        return found

    def _session(self, *, embedding: bool) -> _Session:
        if embedding not in self._sessions:
            llama = self._open(embedding)
            llama.grammars = self._grammars
            self._sessions[embedding] = _Session(llama, self.backend, self._store)
        return self._sessions[embedding]

    def _open(self, embedding: bool) -> ServedLlama:
        n_threads = num_threads()  # llama-cpp-python's default is half: 25 tokens/s, not 40
        try:
            return ServedLlama(
                str(self.path),
                n_ctx=self.context,
                # A text to embed must fit one batch.
                n_batch=self.context if embedding else min(self.context, 512),
                n_ubatch=self.context if embedding else 512,
                n_threads=n_threads,
                n_threads_batch=n_threads,
                embedding=embedding,
                pooling_type=self._pooling if embedding else -1,
                verbose=False,
            )
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"llama.cpp cannot run {self.path}: {error}") from error


class ServedLlama(Llama):
    """A ``Llama`` that can be stopped, counts tokens, and follows grammars in a process.

    stops: events, any of which ends a text.  n_prompt, n_generated: tokens of the last text.
    grammars: the process.
    """

    grammars: GrammarProcess
    stops: tuple[threading.Event, ...] = ()
    n_prompt = n_generated = 0

    @property
    def metadata(self) -> dict[str, str]:
        """The file's, without templates: ``Llama`` would compile them, and end on a bad one."""
        return self._metadata

    @metadata.setter
    def metadata(self, found: dict[str, str]) -> None:
        template = "tokenizer.chat_template"
        self._metadata = {k: v for k, v in found.items() if not k.startswith(template)}

    def generate(
        self,
        tokens: Any,
        *values: Any,
        grammar: Any = None,
        logits_processor: Any = None,
        **options: Any,
    ) -> Iterator[int]:
        """Generate tokens until one of ``stops`` is set. grammar: a text in GBNF.

        Errors: GrammarError, also in the middle of a text.
        """
        self.n_prompt, self.n_generated = len(tokens), 0
        constraint = None
        if grammar is not None:
            constraint = Constraint(self.grammars, grammar)
            processors = [*(logits_processor or []), constraint]
            logits_processor = llama_cpp.LogitsProcessorList(processors)
        options["logits_processor"] = logits_processor
        for token in super().generate(tokens, *values, **options):
            if any(stop.is_set() for stop in self.stops):
                return
            check_logits(self.ctx, self.n_vocab())
            if constraint is not None:
                ends = llama_cpp.llama_vocab_is_eog(self._model.vocab, token)
                constraint.accept(token, ends=ends)
            self.n_generated += 1
            yield token

    def embed(self, *values: Any, **options: Any) -> Any:
        """As the base class, with NumericsError for what is not finite."""
        found = super().embed(*values, **options)
        check_finite(np.array(found[0] if isinstance(found, tuple) else found), "embeddings")
        return found


class _Session:
    """A ``Llama`` and its loaded adapters by number and version, least recently used first."""

    def __init__(self, llama: ServedLlama, backend: Backend, store: Store) -> None:
        self.llama, self._backend, self._store = llama, backend, store
        self._loaded: dict[tuple[int, int], Any] = {}
        self._used: dict[tuple[int, int], float] = {}

    def use(self, mix: Mix) -> ServedLlama:
        wanted = {(adapter.number, adapter.version): scale for adapter, scale in mix}
        if wanted != self._used:
            self._set([(self._load(adapter), scale) for adapter, scale in mix])
            self._used = wanted
            self.llama.reset()  # the KV cache is the previous adapters'
            for key in list(self._loaded)[: max(0, len(self._loaded) - _MAX_LOADED)]:
                if key not in wanted:
                    llama_cpp.llama_adapter_lora_free(self._loaded.pop(key))
        return self.llama

    def _load(self, adapter: AdapterRow) -> Any:
        key = (adapter.number, adapter.version)
        self._loaded[key] = self._loaded.pop(key, None) or self._read(adapter)
        return self._loaded[key]

    def _read(self, adapter: AdapterRow) -> Any:
        with as_file(self._store.adapter_content(adapter.number)) as path:
            check_gguf_adapter(path, self._backend.architecture, self._backend.linear)
            handle = call(llama_cpp.llama_adapter_lora_init, self.llama.model, os.fsencode(path))
        if not handle:
            raise AdapterError(f"llama.cpp cannot use {adapter.model}: {reason()}")
        return handle

    def _set(self, mix: Sequence[tuple[Any, float]]) -> None:
        n = len(mix)
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * n)(*(handle for handle, _ in mix))
        scales = (ctypes.c_float * n)(*(scale for _, scale in mix))
        if call(llama_cpp.llama_set_adapters_lora, self.llama.ctx, adapters, n, scales):
            raise AdapterError(f"llama.cpp cannot apply the adapter: {reason()}")
