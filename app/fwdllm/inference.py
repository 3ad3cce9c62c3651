"""Using a model with a tuned adapter: its loss on a data set, labels, and text from it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from fwdllm.adapters import as_gguf
from fwdllm.engine.classification import Classification
from fwdllm.engine.data.jsonl import Example, read_jsonl
from fwdllm.engine.data.messages import Message
from fwdllm.engine.engine import Engine
from fwdllm.engine.evaluation import Evaluation
from fwdllm.engine.llamacpp import generation
from fwdllm.hub import local_path

_Path = str | os.PathLike[str]


def evaluate(
    model: _Path,
    data: _Path,
    *,
    adapter: _Path | None = None,
    max_tokens: int | None = None,
    literal: bool = False,
    exact: bool = False,
    device: str = "cpu",
    backend: str = "auto",
) -> Evaluation:
    """Loss, and accuracy for labelled texts, of a model on a JSONL file.

    model: a GGUF file or hf://owner/repo/file.gguf.  adapter: a GGUF file or PEFT folder.
    max_tokens: cut examples to this many; without it an example longer than the model's context is
    an error.  literal: whether names of special tokens in raw text are text.  exact: fp32
    arithmetic.  device: "cpu", or "cuda" for an NVIDIA GPU.  backend: "auto", "fwdllm" or
    "llama.cpp", see ``Engine.load``.
    Errors: ModelError, DataError, AdapterError, ConfigError, NumericsError.
    """
    engine = Engine.load(
        local_path(model),
        adapter=adapter,
        literal=literal,
        exact=exact,
        device=device,
        backend=backend,
    )
    return engine.evaluate(read_jsonl(data), max_tokens)


def classify(
    model: _Path,
    texts: Iterable[str],
    *,
    adapter: _Path | None = None,
    labels: Sequence[str] = (),
    max_tokens: int | None = None,
    exact: bool = False,
    device: str = "cpu",
    backend: str = "auto",
) -> Iterator[Classification]:
    """The labels of texts with their probabilities, those that ``evaluate`` counts, in order.

    texts: may be without end; 64 at most are taken at a time.  labels: those that a decoder chooses
    from, as its data had them; an encoder's adapter has its own.  Others: as ``evaluate``.
    Errors: those of ``evaluate``; DataError, with the number of the text, and NumericsError come
    with the result that they are instead of.
    """
    engine = Engine.load(
        local_path(model), adapter=adapter, exact=exact, device=device, backend=backend
    )
    examples = (Example(text=text, line=number) for number, text in enumerate(texts, 1))
    return engine.classify(examples, labels, max_tokens)


def generate(
    model: _Path,
    prompt: str | Sequence[Message],
    *,
    adapter: _Path | None = None,
    max_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> Iterator[str]:
    """Continue a prompt with llama.cpp, piece by piece; see ``generation.generate``.

    model, adapter: as ``evaluate``. All errors are raised before the first piece.
    """
    path = local_path(model)
    # llama.cpp has read the adapter when ``generate`` returns, before the first piece.
    with contextlib.nullcontext() if adapter is None else as_gguf(adapter, path) as gguf:
        return generation.generate(
            path, prompt, gguf, max_tokens, temperature, seed, chat=chat, tools=tools
        )
