"""The models that answer: one set of weights in llama.cpp, and an adapter for each name.

llama-cpp-python's server asks a ``LlamaProxy`` for the model of a request, under its lock. Its own
proxy would open a file anew for each; here the adapter is exchanged, which takes milliseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
from llama_cpp.server import app as llama_server
from llama_cpp.server.model import LlamaProxy

from fwdllm.engine.adapter_io import open_gguf_adapter
from fwdllm.engine.errors import AdapterError, ModelError
from fwdllm.engine.llama_native import call, open_model, reason
from fwdllm.server.errors import ApiError
from fwdllm.server.store import Store, StoredAdapter

# Enough for most chats; a context of 128 k would take gigabytes for keys and values.
DEFAULT_CONTEXT = 4096

_POOLING_NONE, _POOLING_MEAN, _POOLING_RANK = 0, 1, 4  # enum llama_pooling_type

# Adapters kept in llama.cpp's memory.
_MAX_LOADED = 4


class Models(LlamaProxy):
    """The base model and every adapter of a store; what ``llama_cpp.server`` calls its proxy.

    path: the GGUF file.  base: its name.  default: that of requests without one.  context: tokens
    of a conversation.  is_causal: whether it generates; an encoder only embeds.
    Errors of the constructor: ModelError.
    """

    def __init__(
        self, path: Path, base: str, default: str, store: Store, context: int | None
    ) -> None:
        native = open_model(path, vocab_only=True)
        pooling = native.file.integer(f"{native.architecture}.pooling_type", _POOLING_NONE)
        if pooling == _POOLING_RANK:
            raise ModelError(f"{path} is a reranker, which neither generates nor embeds")
        self.path, self.base, self.default, self._store = path, base, default, store
        self.architecture, self.is_causal = native.architecture, native.is_causal
        self.context = min(context or DEFAULT_CONTEXT, native.context_length)
        self._pooling = pooling or _POOLING_MEAN
        self._sessions: dict[bool, _Session] = {}
        self._session(embedding=not self.is_causal)

    def __call__(self, model: str | None = None) -> llama_cpp.Llama:
        """The model of this name, ready to generate. Errors: ApiError 404."""
        return self._session(embedding=False).use(self.adapter_of(model))

    def __iter__(self) -> Iterator[str]:
        yield self.base
        yield from (a.model for a in self._store.adapters() if a.step is None)

    def free(self) -> None:
        """Let go of the weights."""
        for session in self._sessions.values():
            session.llama.close()
        self._sessions.clear()

    def embedder(self, model: str | None = None) -> llama_cpp.Llama:
        """The model of this name, ready to embed. Errors: ApiError 404."""
        return self._session(embedding=True).use(self.adapter_of(model))

    def adapter_of(self, model: str | None) -> StoredAdapter | None:
        """The adapter of a model, None for the base. Errors: ApiError 404."""
        model = self.default if model is None else model
        if model == self.base:
            return None
        found = self._store.adapter_of_model(model)
        if found is None:
            raise ApiError(404, f"The model {model!r} does not exist", "model", "model_not_found")
        return found

    def _session(self, *, embedding: bool) -> _Session:
        if embedding not in self._sessions:
            self._sessions[embedding] = _Session(self, self._store, embedding)
        return self._sessions[embedding]

    def _open(self, embedding: bool) -> llama_cpp.Llama:
        n_threads = os.cpu_count() or 1  # llama-cpp-python takes half: 27 tokens/s instead of 38
        try:
            return llama_cpp.Llama(
                str(self.path),
                n_ctx=self.context,
                # Texts to embed are read in one piece.
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


class _Session:
    """A ``Llama`` and the adapters it has loaded, by number and version, least used first."""

    def __init__(self, models: Models, store: Store, embedding: bool) -> None:
        self.llama = models._open(embedding)
        self._architecture, self._store = models.architecture, store
        self._loaded: dict[tuple[int, int], Any] = {}
        self._used: tuple[int, int] | None = None

    def use(self, adapter: StoredAdapter | None) -> llama_cpp.Llama:
        key = None if adapter is None else (adapter.number, adapter.version)
        if key != self._used:
            self._set(None if adapter is None else self._load(adapter))
            self._used = key
            self.llama.reset()  # keys and values are of the adapter before
        return self.llama

    def _load(self, adapter: StoredAdapter) -> Any:
        key = (adapter.number, adapter.version)
        handle = self._loaded.pop(key, None) or self._read(adapter)
        self._loaded[key] = handle
        while len(self._loaded) > _MAX_LOADED:
            llama_cpp.llama_adapter_lora_free(self._loaded.pop(next(iter(self._loaded))))
        return handle

    def _read(self, adapter: StoredAdapter) -> Any:
        with tempfile.TemporaryDirectory(prefix="fwdllm-") as folder:
            path = Path(folder) / "adapter.gguf"
            path.write_bytes(self._store.adapter_content(adapter.number))
            open_gguf_adapter(path, self._architecture)
            handle = call(llama_cpp.llama_adapter_lora_init, self.llama.model, os.fsencode(path))
        if not handle:
            raise AdapterError(f"llama.cpp cannot use {adapter.model}: {reason()}")
        return handle

    def _set(self, handle: Any) -> None:
        handles = [] if handle is None else [handle]
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * len(handles))(*handles)
        scales = (ctypes.c_float * len(handles))(*[1.0] * len(handles))
        if call(llama_cpp.llama_set_adapters_lora, self.llama.ctx, adapters, len(handles), scales):
            raise AdapterError(f"llama.cpp cannot apply the adapter: {reason()}")


def _settings() -> Any:
    # Not by the constructor, which reads environment variables such as PORT.
    return llama_server.ServerSettings.model_construct(interrupt_requests=False)


def install(models: Models) -> None:
    """Let llama-cpp-python's server answer with these models. One set at a time: it is global."""
    llama_server._llama_proxy = models
    llama_server.set_server_settings(_settings())


@contextlib.asynccontextmanager
async def exclusive() -> Any:
    """Hold the models alone, behind the requests that came before."""
    async with contextlib.asynccontextmanager(llama_server.get_llama_proxy)() as models:
        yield models
