"""/predict: labels of texts, in the format of text-embeddings-inference and of Hugging Face's API.

The engine computes them, not llama.cpp, so that they are those of ``fwdllm eval``.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel, Field, field_validator
from starlette.concurrency import run_in_threadpool

from fwdllm.engine.classification import Classification
from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.errors import TooLongError
from fwdllm.http.adapter_engine import Name
from fwdllm.http.api_error import ApiError
from fwdllm.http.bodies import Route
from fwdllm.http.completions import unless_disconnected
from fwdllm.http.context import Context, Served
from fwdllm.http.schemas import MAX_INPUTS, NullIsDefault, at_most
from fwdllm.http.store import AdapterRow

router = APIRouter(tags=["inference"], route_class=Route)

Text = Annotated[str, Field(min_length=1)]
Single = Annotated[list[Text], Field(min_length=1, max_length=1)]


class Parameters(NullIsDefault):
    """What Hugging Face's clients send. top_k: how many labels to answer, the likeliest first."""

    top_k: Annotated[int, Field(ge=1)] | None = None
    function_to_apply: Literal["softmax", "none"] = "softmax"


class PredictRequest(NullIsDefault):
    """Texts to classify.

    inputs: a text, or a list of texts, each of which may be a list of one.  model: whose labels;
    None: the one served by default.  raw_scores: no softmax.  truncate: cut texts that are longer
    than the model's context.  labels: what a decoder chooses from.
    """

    inputs: Text | Annotated[list[Text | Single], Field(min_length=1, max_length=MAX_INPUTS)]
    model: str | None = None
    raw_scores: bool = False
    truncate: bool = False
    truncation_direction: Literal["right", "Right"] = "right"
    labels: Annotated[tuple[Name, ...], Field(max_length=1000), at_most(1000)] = ()
    parameters: Parameters | None = None

    @field_validator("inputs", mode="before")
    @classmethod
    def _checked(cls, inputs: Any) -> Any:
        """In one sentence what is wrong; pydantic would have one for each way to read it."""
        if inputs == "" or inputs == []:
            raise ValueError("there is no text")
        texts = [inputs] if isinstance(inputs, str) else inputs
        if not isinstance(texts, list):
            raise ValueError("it is neither a text nor a list of texts")
        if len(texts) > MAX_INPUTS:
            raise ValueError(f"a request may have {MAX_INPUTS:,} texts, not {len(texts):,}")
        for number, text in enumerate(texts, 1):
            if isinstance(text, list) and len(text) == 2:
                raise ValueError(f"item {number} is a pair; models here read one text")
            if isinstance(text, list) and len(text) == 1:
                [text] = text
            if not isinstance(text, str):
                raise ValueError(f"item {number} is no text")
            if not text:
                raise ValueError(f"item {number} is empty")
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise ValueError(f"item {number} has half of a surrogate pair")
        return inputs

    def texts(self) -> list[str]:
        """Those to classify, in order."""
        if isinstance(self.inputs, str):
            return [self.inputs]
        return [text if isinstance(text, str) else text[0] for text in self.inputs]


class Prediction(BaseModel):
    """A label and its probability, or with ``raw_scores`` what the softmax is taken of."""

    score: float
    label: str


@router.post("/predict")
async def predict(
    request: Request, body: PredictRequest, served: Served
) -> list[Prediction] | list[list[Prediction]]:
    """Labels of a text, likeliest first; of a list of texts, a list of such lists."""
    texts = body.texts()
    if len(texts) * len(body.labels) > MAX_INPUTS:
        text = f"texts times labels may be {MAX_INPUTS:,}, not {len(texts) * len(body.labels):,}"
        raise ApiError(400, text, "labels")
    adapter = await run_in_threadpool(_adapter_of, served, body.model)
    cancelled = threading.Event()
    examples = [Example(text=t, line=i, path="inputs") for i, t in enumerate(texts, 1)]

    def work() -> list[Classification]:
        try:
            return served.engine.classify(
                adapter, examples, body.labels, truncate=body.truncate, cancelled=cancelled
            )
        except TooLongError as error:
            text = (
                f"{error.where}: the text has {error.n_tokens} tokens, but the model's context is "
                f"{error.context}; shorten it, or set truncate to true"
            )
            raise ApiError(400, text, "inputs", "context_length_exceeded") from error

    async def turn() -> list[Classification]:
        async with served.engine.classifying:
            return await run_in_threadpool(work)

    served.queue.enter()
    future = asyncio.ensure_future(turn())
    future.add_done_callback(lambda _: served.queue.leave())
    try:
        found = await unless_disconnected(request, future, cancelled)
    finally:
        cancelled.set()
    answers = [_predictions(body, classified) for classified in found]
    # Hugging Face's clients, which send parameters, want a list of lists in any case.
    return answers[0] if isinstance(body.inputs, str) and body.parameters is None else answers


def _adapter_of(served: Context, model: str | None) -> AdapterRow | None:
    """The adapter to classify with. Errors: ApiError, also for a mix of adapters."""
    mix = served.models.mix_of(model, None)
    if not mix:
        return None
    [(adapter, scale), *others] = mix
    if others or scale != 1:
        text = "requests that name no model use a mix of adapters now, which cannot classify"
        raise ApiError(400, f"{text}: name a model", "model")
    return adapter


def _predictions(body: PredictRequest, found: Classification) -> list[Prediction]:
    asked = body.parameters or Parameters()
    raw = body.raw_scores or asked.function_to_apply == "none"
    scores = found.scores if raw else found.probabilities
    pairs = zip(scores, found.labels, strict=True)
    return [Prediction(score=score, label=label) for score, label in pairs][: asked.top_k]
