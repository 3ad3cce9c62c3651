"""/v1/models, /v1/completions, /v1/chat/completions and /v1/embeddings.

llama-cpp-python's own server answers; here is what it lacks: unknown models are an error, the queue
has an end, errors of a stream come before its first byte, embeddings have length 1.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response
from llama_cpp.server import app as llama_server
from llama_cpp.server.types import CreateChatCompletionRequest, CreateCompletionRequest
from pydantic import BaseModel, Field
from sse_starlette.sse import EventSourceResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from fwdllm.server.context import Context, context
from fwdllm.server.errors import ApiError
from fwdllm.server.models import exclusive

MAX_INPUTS = 2048  # OpenAI's limit of texts in one request

router = APIRouter(tags=["inference"])
Served = Annotated[Context, Depends(context)]


class CompletionRequest(CreateCompletionRequest):
    """As llama-cpp-python's, within what it can do."""

    n: Literal[1] | None = 1
    best_of: Literal[1] | None = 1
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)] = ""


class ChatRequest(CreateChatCompletionRequest):
    """As llama-cpp-python's, within what it can do."""

    n: Literal[1] | None = 1
    max_completion_tokens: int | None = Field(None, ge=1)

    def plain(self) -> CreateChatCompletionRequest:
        """The request as llama-cpp-python knows it."""
        values = self.model_dump(exclude={"max_completion_tokens"})
        values["max_tokens"] = self.max_completion_tokens or self.max_tokens
        return CreateChatCompletionRequest(**values)


class EmbeddingRequest(BaseModel):
    """OpenAI's, for texts."""

    model: str | None = None
    input: str | Annotated[list[str], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None


@router.get("/v1/models")
def list_models(served: Served) -> dict[str, Any]:
    """The base model and those tuned from it."""
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
        raise ApiError(403, "The base model cannot be deleted", "model")
    served.store.delete_adapter(adapter.number)
    return {"id": model, "object": "model", "deleted": True}


@router.post("/v1/completions")
async def create_completion(request: Request, body: CompletionRequest, served: Served) -> Response:
    """Continue a text."""
    plain = CreateCompletionRequest(**body.model_dump())
    return await _generate(served, body.model, llama_server.create_completion, request, plain)


@router.post("/v1/chat/completions")
async def create_chat_completion(request: Request, body: ChatRequest, served: Served) -> Response:
    """Continue a conversation."""
    if not body.messages:
        raise ApiError(400, "messages is empty", "messages")
    answer = llama_server.create_chat_completion
    return await _generate(served, body.model, answer, request, body.plain())


@router.post("/v1/embeddings")
async def create_embedding(body: EmbeddingRequest, served: Served) -> dict[str, Any]:
    """Embed texts, each as a vector of length 1."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not all(texts):
        raise ApiError(400, "a text to embed is empty", "input")
    served.models.adapter_of(body.model)
    with served.queue.place():
        async with exclusive():
            vectors, n_tokens = await run_in_threadpool(_embed, served, body.model, texts)
    encode = _base64 if body.encoding_format == "base64" else list
    data = [
        {"object": "embedding", "index": i, "embedding": encode(vector)}
        for i, vector in enumerate(vectors)
    ]
    usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
    model = body.model or served.models.default
    return {"object": "list", "data": data, "model": model, "usage": usage}


def _model(name: str, created: float) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": int(created), "owned_by": "fwdllm"}


async def _generate(
    served: Context,
    model: str | None,
    answer: Callable[..., Awaitable[Any]],
    request: Request,
    body: CreateCompletionRequest | CreateChatCompletionRequest,
) -> Any:
    if not served.models.is_causal:
        text = f"{served.models.base} is an encoder, which cannot generate text"
        raise ApiError(400, text, "model", "model_not_supported")
    served.models.adapter_of(model)
    body.model = model or served.models.default
    served.queue.enter()
    streams = False
    try:
        with _refusals():
            found = await answer(request, body)
            if isinstance(found, EventSourceResponse):
                found = await _begun(found, served)
                streams = True
            else:
                served.n_tokens += found["usage"]["completion_tokens"]
            return found
    finally:
        if not streams:
            served.queue.leave()


async def _begun(response: EventSourceResponse, served: Context) -> _Stream:
    """A stream that has its first event, so that errors before it get a status of their own."""
    events = aiter(response.body_iterator)
    assert response.data_sender_callable is not None
    producer = asyncio.ensure_future(response.data_sender_callable())
    try:
        first = await anext(events)
    except StopAsyncIteration:
        await producer  # raises the reason
        raise
    except BaseException:
        producer.cancel()
        raise

    async def all_events() -> AsyncIterator[Any]:
        yield first
        async for event in events:
            served.n_tokens += 1
            yield event

    async def finish() -> None:
        await producer

    response.body_iterator = all_events()
    response.data_sender_callable = finish
    return _Stream(response, producer, served)


class _Stream(Response):
    """A response whose request leaves the queue when it has been sent, or cannot be."""

    def __init__(
        self, response: EventSourceResponse, producer: asyncio.Future[None], served: Context
    ) -> None:
        super().__init__()
        self._response, self._producer, self._served = response, producer, served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._response(scope, receive, send)
        finally:
            self._producer.cancel()
            self._served.queue.leave()


@contextlib.contextmanager
def _refusals() -> Any:
    """What llama-cpp-python raises about values it was given, as errors of the request."""
    try:
        yield
    except (ValueError, AssertionError, KeyError, TypeError, IndexError) as error:
        code = "context_length_exceeded" if "context window" in str(error) else None
        raise ApiError(400, f"llama.cpp cannot do this: {error}", code=code) from error


def _embed(served: Context, model: str | None, texts: list[str]) -> tuple[list[list[float]], int]:
    with _refusals():
        llama = served.models.embedder(model)
        return llama.embed(texts, normalize=True, truncate=False, return_count=True)


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.array(vector, "<f4").tobytes()).decode()
