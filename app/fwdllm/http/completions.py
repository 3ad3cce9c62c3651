"""/v1/models, /v1/completions, /v1/chat/completions and /v1/embeddings.

llama-cpp-python's ``Llama`` makes the answers, in OpenAI's format; docs/decisions.md says why its
own server is not used.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import itertools
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool

from fwdllm.engine.llamacpp.native import llama_cpp
from fwdllm.http import chat
from fwdllm.http.api_error import ApiError
from fwdllm.http.bodies import Route, turn
from fwdllm.http.context import Context, Served
from fwdllm.http.grammar_process import GrammarError
from fwdllm.http.models import ServedLlama
from fwdllm.http.schemas import ChatRequest, CompletionRequest, EmbeddingRequest

# How often to check whether the client has disconnected.
_WATCH_SECONDS = 0.5

router = APIRouter(tags=["inference"], route_class=Route)

# The tokens to continue, and the grammar to do it by.
Prepared = tuple[list[int], str | None]


@router.get("/v1/models")
def list_models(served: Served) -> dict[str, Any]:
    """The base model and its tuned models; checkpoints can be used too, but are not listed."""
    tuned = [a for a in served.store.adapters() if a.step is None]
    base = _model(served.models.base, served.started)
    return {"object": "list", "data": [base, *(_model(a.model, a.created) for a in tuned)]}


@router.get("/v1/models/{model}")
def get_model(model: str, served: Served) -> dict[str, Any]:
    """One model."""
    adapter = served.models.adapter_of(model)
    return _model(model, served.started if adapter is None else adapter.created)


@router.delete("/v1/models/{model}")
def delete_model(model: str, served: Served) -> dict[str, Any]:
    """Delete a tuned model with its adapter."""
    adapter = served.models.adapter_of(model)
    if adapter is None:
        raise ApiError(403, "The model that is served cannot be deleted", "model")
    served.check_unused(adapter)
    served.store.delete_adapter(adapter.number)
    return {"id": model, "object": "model", "deleted": True}


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest, served: Served) -> Any:
    """Continue a text."""

    def prepare() -> Prepared:
        return _prompt(body, served), body.grammar

    def answer(llama: ServedLlama, prompt: list[int], grammar: str | None) -> Any:
        found = _continue(llama, served, body, prompt, grammar)
        if not body.echo:
            return found
        text = body.prompt if isinstance(body.prompt, str) else None
        if text is None:
            text = served.models.tokenizer.decode(prompt)
        if body.stream:
            first = next(found)
            return itertools.chain([_after(text, first)], found)
        return _after(text, found)

    return await _generate(request, body, served, prepare, answer)


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatRequest, served: Served) -> Any:
    """Continue a conversation."""

    def prepare() -> Prepared:
        _check_length(served, sum(len(message["content"]) for message in body.messages), "messages")
        return chat.prompt_of(served.models.tokenizer, body), chat.constraint(body)

    def answer(llama: ServedLlama, prompt: list[int], grammar: str | None) -> Any:
        found = _continue(llama, served, body, prompt, grammar)
        return (chat.streamed if body.stream else chat.whole)(found, chat.reader_of(body))

    return await _generate(request, body, served, prepare, answer)


@router.post("/v1/embeddings")
async def create_embedding(
    request: Request, body: EmbeddingRequest, served: Served
) -> dict[str, Any]:
    """Embed texts, each as a vector of length 1."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    await run_in_threadpool(served.models.mix_of, body.model, body.lora)
    cancelled = threading.Event()

    def work(llama: ServedLlama) -> tuple[list[list[float]], int]:
        vectors, n_tokens = [], 0
        with _refusals():
            for text in texts:  # one by one, so that a vector does not depend on the other texts
                if cancelled.is_set():
                    break
                vector, n = llama.embed(text, normalize=True, truncate=False, return_count=True)
                vectors.append(_cut(vector, body.dimensions))
                n_tokens += n
        return vectors, n_tokens

    served.queue.enter()
    future = served.models.run(work, body.model, cancelled, lora=body.lora, embedding=True)
    future.add_done_callback(lambda _: served.queue.leave())
    vectors, n_tokens = await unless_disconnected(request, future, cancelled)
    encode = _base64 if body.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": i, "embedding": encode(vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    model = served.models.name_of(body.model, body.lora)
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "fwdllm"}


async def _generate(
    request: Request,
    body: CompletionRequest | ChatRequest,
    served: Context,
    prepare: Callable[[], Prepared],
    answer: Callable[[ServedLlama, list[int], str | None], Any],
) -> Any:
    """prepare: what can be done, and refused, without the model.

    answer: gives the answer to what was prepared, or its chunks if the request has ``stream``.
    """
    if not served.models.is_causal:
        text = f"{served.models.base} is an encoder, which cannot generate text"
        raise ApiError(400, text, "model", "model_not_supported")
    await run_in_threadpool(served.models.mix_of, body.model, body.lora)
    with _refusals():
        async with turn(request):
            prompt, grammar = await run_in_threadpool(prepare)
        if grammar is not None:
            await _try(served, grammar)
    cancelled = threading.Event()
    chunks: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def work(llama: ServedLlama) -> Any:
        try:
            with _refusals():
                found = answer(llama, prompt, grammar)
                if not body.stream:
                    return found
                last: dict[str, Any] = {}
                for last in found:
                    loop.call_soon_threadsafe(chunks.put_nowait, last)
                if body.stream_options.include_usage:
                    usage = {**last, "choices": [], "usage": _usage(llama)}
                    loop.call_soon_threadsafe(chunks.put_nowait, usage)
        finally:
            served.n_tokens += llama.n_generated

    served.queue.enter()
    future = served.models.run(work, body.model, cancelled, lora=body.lora)
    future.add_done_callback(lambda _: served.queue.leave())
    if not body.stream:
        return await unless_disconnected(request, future, cancelled)
    future.add_done_callback(lambda _: chunks.put_nowait(None))
    getting = asyncio.ensure_future(chunks.get())
    first = await unless_disconnected(request, getting, cancelled)
    if first is None:
        future.result()  # raises the error that came before the first token
    return EventSourceResponse(_events(first, chunks, future, cancelled), sep="\n")


async def _events(
    chunk: Any, chunks: asyncio.Queue[Any], future: asyncio.Future[Any], cancelled: threading.Event
) -> AsyncIterator[dict[str, str]]:
    """The chunks of a stream until None, then its end: an error or [DONE]."""
    try:
        while chunk is not None:
            yield {"data": json.dumps(chunk)}
            chunk = await chunks.get()
        error = future.exception()
        if error is not None:
            fault = {"message": str(error), "type": "server_error", "param": None, "code": None}
            yield {"data": json.dumps({"error": fault})}
        else:
            yield {"data": "[DONE]"}
    finally:
        cancelled.set()


async def unless_disconnected(
    request: Request, future: asyncio.Future[Any], cancelled: threading.Event
) -> Any:
    """The result; generation is stopped early if the client disconnects."""
    while not future.done():
        await asyncio.wait({future}, timeout=_WATCH_SECONDS)
        if not future.done() and await request.is_disconnected():
            cancelled.set()
    return future.result()


def _prompt(body: CompletionRequest, served: Context) -> list[int]:
    """The tokens to continue. Errors: ApiError 400."""
    tokenizer = served.models.tokenizer
    prompt: Any = body.prompt
    if isinstance(prompt, list) and isinstance(prompt[0], (str, list)):
        [prompt] = prompt
    if isinstance(prompt, list):
        if not all(token < tokenizer.n_vocab for token in prompt):
            raise ApiError(400, f"tokens are numbers from 0 to {tokenizer.n_vocab - 1}", "prompt")
        return prompt
    _check_length(served, len(prompt), "prompt")
    prompt.encode()  # UnicodeEncodeError for half of a surrogate pair
    if ids := tokenizer.encode_prompt(prompt):
        return ids
    if tokenizer.bos is None:
        raise ApiError(400, "it is empty, and this model has no token to begin with", "prompt")
    return [tokenizer.bos]


def _check_length(served: Context, n_characters: int, param: str) -> None:
    """ApiError 400 for a text that cannot fit, before time is spent on its tokens."""
    most = served.models.max_characters
    if n_characters > most:
        text = (
            f"{n_characters:,} characters do not fit into the context window of "
            f"{served.models.context} tokens, as no token has more than "
            f"{most // served.models.context}"
        )
        raise ApiError(400, text, param, "context_length_exceeded")


async def _try(served: Context, grammar: str) -> None:
    """See if a grammar can be followed, outside the queue. Errors: ApiError 429; GrammarError."""
    with served.grammars.place():
        async with served.trying:
            await run_in_threadpool(served.models.try_grammar, grammar)


def _continue(
    llama: ServedLlama,
    served: Context,
    body: CompletionRequest | ChatRequest,
    prompt: list[int],
    grammar: str | None,
) -> Any:
    """What llama-cpp-python makes of a prompt: its completion, or chunks of it."""
    options = {**body.options(), "model": served.models.name_of(body.model, body.lora)}
    if not body.logit_bias:  # which would copy all logits at each token
        del options["logit_bias"]
    if grammar is not None:
        options["grammar"] = grammar  # for ``ServedLlama.generate``
    if body.min_tokens > 0:
        least = llama_cpp.MinTokensLogitsProcessor(body.min_tokens, llama.token_eos())
        options["logits_processor"] = llama_cpp.LogitsProcessorList([least])
    if not all(0 <= token < llama.n_vocab() for token in body.logit_bias):
        raise ApiError(400, f"tokens are numbers from 0 to {llama.n_vocab() - 1}", "logit_bias")
    return llama.create_completion(prompt, **options)


def _after(text: str, found: dict[str, Any]) -> dict[str, Any]:
    """A completion with its prompt before it."""
    [choice] = found["choices"]
    return {**found, "choices": [{**choice, "text": text + choice["text"]}]}


def _cut(vector: list[float], dimensions: int | None) -> list[float]:
    """The first numbers of a vector, of length 1 again. Errors: ApiError 400 if it has fewer."""
    if dimensions is None:
        return vector
    if dimensions > len(vector):
        raise ApiError(400, f"vectors of this model have {len(vector)} dimensions", "dimensions")
    cut = np.array(vector[:dimensions])
    return list(cut / max(float(np.linalg.norm(cut)), np.finfo(np.float32).tiny))


def _usage(llama: ServedLlama) -> dict[str, int]:
    prompt, completion = llama.n_prompt, llama.n_generated
    total = prompt + completion
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": total}


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """A context that turns llama-cpp-python's errors about values into ApiError 400."""
    try:
        yield
    except UnicodeEncodeError:  # a ValueError, too
        raise
    except GrammarError as error:
        raise ApiError(400, str(error), "grammar") from error
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        code = "context_length_exceeded" if "context window" in str(error) else None
        raise ApiError(400, f"llama.cpp cannot do this: {error}", code=code) from error


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
