"""llama.cpp as a side of a measurement, through llama-cpp-python; see ``bench.worker``."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.bench.inputs import UPDATE_RATE, half_trained, step_batch
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.errors import AdapterError, ModelError
from fwdllm.engine.estimators.plan import plan
from fwdllm.engine.llamacpp.losses import negative_log_likelihood
from fwdllm.engine.llamacpp.native import (
    Llama,
    NativeModel,
    call,
    llama_cpp,
    open_context,
    open_model,
    reason,
)

VERSION = f"llama-cpp-python {llama_cpp.__version__}"


class Prompt:
    """A pass over all ids but the last, with the logits for the last."""

    def __init__(self, model: str, ids: Sequence[int], threads: int) -> None:
        self.ids = ids[:-1]
        n = len(self.ids)
        try:
            self.llama = Llama(
                model,
                n_ctx=n + 8,
                n_batch=n,
                n_ubatch=512,
                n_threads=threads,
                n_threads_batch=threads,
                verbose=False,
            )
        except ValueError as error:
            raise ModelError(f"llama.cpp cannot run {model}: {error}") from error
        self.run()
        pointer = llama_cpp.llama_get_logits_ith(self.llama.ctx, -1)
        logits = np.ctypeslib.as_array(pointer, (1, self.llama.n_vocab()))
        self.facts = {"version": VERSION, "loss": _mean_nll(logits, np.array(ids[-1:]))}

    def run(self) -> None:
        self.llama.reset()
        self.llama.eval(self.ids)


class Step:
    """Perturbed inference with llama.cpp's means: a LoRA file is written and read for every lane.

    reopen: whether each lane also opens the model, which is llama-cpp-python's documented way to
    apply a LoRA.  folder: for the file, preferably in memory.
    """

    def __init__(
        self,
        model: str,
        ids: Sequence[Sequence[int]],
        lora: Mapping[str, Any],
        perturbations: int,
        method: str,
        threads: int,
        folder: str,
        reopen: bool,
    ) -> None:
        adapter = half_trained(Engine.load(model, LoRAConfig(**lora))).adapter
        assert adapter is not None
        self.adapter: Adapter = adapter
        self.file = Path(folder) / "lane.gguf"
        self.seeds = np.arange(perturbations, dtype=np.uint64)
        self.plan = plan(self.seeds, method)
        self.model = (ReopenedModel if reopen else OpenModel)(model, ids, threads)
        self.facts = {"version": VERSION, "loss": self._loss(self.adapter)}

    def run(self) -> dict[str, list[float]]:
        lanes = zip(self.plan.lanes.seeds, self.plan.lanes.coefficients, strict=True)
        losses = np.array([self._lane_loss(*lane) for lane in lanes])
        derivatives = self.plan.derivative(losses)
        self.adapter.add(self.seeds, -UPDATE_RATE / len(self.seeds) * derivatives)
        return {"derivatives": derivatives.tolist()}

    def _lane_loss(self, seed: int, coefficient: float) -> float:
        variant = replace(self.adapter, theta=self.adapter.theta.copy())
        variant.add([seed], [coefficient])
        return self._loss(variant)

    def _loss(self, adapter: Adapter) -> float:
        save_gguf(adapter, self.file)
        return self.model.loss(self.file)


class ReopenedModel:
    """The documented way: a ``Llama`` gets its LoRA when it is made; one sequence at a time."""

    def __init__(self, model: str, ids: Sequence[Sequence[int]], threads: int) -> None:
        self.model, self.ids, self.threads = model, ids, threads

    def loss(self, adapter: Path) -> float:
        """Mean loss over all label tokens in nats."""
        n = max(map(len, self.ids))
        llama = Llama(
            self.model,
            lora_path=str(adapter),
            n_ctx=n,
            n_batch=n,
            n_ubatch=n,
            n_threads=self.threads,
            n_threads_batch=self.threads,
            logits_all=True,
            verbose=False,
        )
        total, count = 0.0, 0
        for sequence in self.ids:
            llama.reset()
            llama.eval(sequence)
            labels = np.array(sequence[1:])
            total += len(labels) * _mean_nll(llama.scores[: len(labels)].copy(), labels)
            count += len(labels)
        llama.close()
        return total / count


class OpenModel:
    """The fastest way, through the C API: the model stays open, all examples are one batch."""

    def __init__(self, model: str, ids: Sequence[Sequence[int]], threads: int) -> None:
        self.labels = step_batch(ids, 1).label_ids
        self.model = open_model(model, vocab_only=False)
        self.n_vocab = llama_cpp.llama_vocab_n_tokens(self.model.vocab)
        self.context = _open_context(self.model, ids, threads)
        self.batch = _fill_batch(ids)

    def loss(self, adapter: Path) -> float:
        """Mean loss over all label tokens in nats."""
        with self._adapted(adapter):
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
            if call(llama_cpp.llama_decode, self.context, self.batch):
                raise ModelError(f"llama.cpp failed: {reason()}")
            pointer = llama_cpp.llama_get_logits(self.context)
            logits = np.ctypeslib.as_array(pointer, (len(self.labels), self.n_vocab))
            return _mean_nll(logits, self.labels)

    @contextmanager
    def _adapted(self, file: Path) -> Iterator[None]:
        """A context in which the LoRA file is applied."""
        adapter = call(llama_cpp.llama_adapter_lora_init, self.model.handle, os.fsencode(file))
        if not adapter:
            raise AdapterError(f"llama.cpp cannot use the adapter: {reason()}")
        adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(adapter)
        scales = (ctypes.c_float * 1)(1.0)
        if call(llama_cpp.llama_set_adapters_lora, self.context, adapters, 1, scales):
            raise AdapterError(f"llama.cpp cannot apply the adapter: {reason()}")
        yield
        llama_cpp.llama_set_adapters_lora(self.context, None, 0, None)
        llama_cpp.llama_adapter_lora_free(adapter)


def _open_context(model: NativeModel, ids: Sequence[Sequence[int]], threads: int) -> Any:
    n_tokens = sum(map(len, ids))
    return open_context(
        model,
        n_seq_max=len(ids),
        n_ctx=n_tokens,
        n_batch=n_tokens,
        n_threads=threads,
        n_threads_batch=threads,
        kv_unified=False,  # llama.h: faster for sequences that share nothing
    )


def _fill_batch(ids: Sequence[Sequence[int]]) -> Any:
    """A batch of all sequences, with logits wherever there is a next token."""
    batch = llama_cpp.llama_batch_init(sum(map(len, ids)), 0, 1)
    i = 0
    for sequence, tokens in enumerate(ids):
        for position, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = position + 1 < len(tokens)
            i += 1
    batch.n_tokens = i
    return batch


def _mean_nll(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean loss in nats; logits [n, n_vocab] are overwritten."""
    return float(negative_log_likelihood(logits, labels).mean())
