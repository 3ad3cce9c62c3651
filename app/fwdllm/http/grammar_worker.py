"""The process that follows a grammar for the server: llama.cpp's sampler of it, and limits.

A grammar of a few lines can take llama.cpp hours, gigabytes, or the process. It reads lines of
JSON: a text starts a grammar, the number of a token goes on with it. To each it answers with a
byte: ``ALLOWED`` and a bit for each token of the vocabulary, or ``REFUSED`` and a line that says
why there is no such grammar. If one takes too much, the process ends with ``TOO_MUCH``.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from typing import Any

import numpy as np

from fwdllm.engine.child import leave_no_core
from fwdllm.engine.llamacpp.native import NativeModel, call, llama_cpp, open_model, reason
from fwdllm.http import limits
from fwdllm.resources import rss_bytes

ALLOWED, REFUSED = b"+", b"-"
TOO_MUCH = 3  # exit code

# How often the watch looks: memory may grow by 100 MB meanwhile.
_WATCH_SECONDS = 0.02


def main(model: str) -> None:
    """Answer until the end of standard input. model: a GGUF file."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server
    leave_no_core()
    follower = _Follower(open_model(model, vocab_only=True))
    watch = _Watch()
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        with watch.over(begins=isinstance(asked, str)):
            answer = follower.begin(asked) if isinstance(asked, str) else follower.accept(asked)
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


class _Follower:
    """One grammar at a time, and where it is."""

    def __init__(self, model: NativeModel) -> None:
        self._model, self._sampler = model, None
        n = llama_cpp.llama_vocab_n_tokens(model.vocab)
        kinds = [("id", np.int32), ("logit", np.float32), ("p", np.float32)]
        self._candidates = np.zeros(n, kinds)
        self._candidates["id"] = np.arange(n)
        data = self._candidates.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
        self._array = llama_cpp.llama_token_data_array(data, n, -1, False)

    def begin(self, grammar: str) -> bytes:
        if self._sampler is not None:
            llama_cpp.llama_sampler_free(self._sampler)
        arguments = (self._model.vocab, grammar.encode(), b"root")
        self._sampler = call(llama_cpp.llama_sampler_init_grammar, *arguments) or None
        if self._sampler is None:
            return REFUSED + " ".join(reason().split()).encode() + b"\n"
        return self._allowed()

    def accept(self, token: int) -> bytes:
        llama_cpp.llama_sampler_accept(self._sampler, token)
        return self._allowed()

    def _allowed(self) -> bytes:
        self._candidates["logit"] = 0
        llama_cpp.llama_sampler_apply(self._sampler, ctypes.byref(self._array))
        return ALLOWED + np.packbits(self._candidates["logit"] == 0).tobytes()


class _Watch:
    """Ends the process if what is in the context ``over`` takes too much."""

    def __init__(self) -> None:
        self._busy = threading.Event()
        self._credit = 0.0
        self._began = 0.0
        self._bytes = (rss_bytes() or 0) + limits.MAX_GRAMMAR_BYTES
        threading.Thread(target=self._look, daemon=True).start()

    def over(self, *, begins: bool) -> _Watch:
        """begins: a new grammar; else it is one token further."""
        most, more = limits.GRAMMAR_SECONDS, limits.GRAMMAR_SECONDS_PER_TOKEN
        self._credit = most if begins else min(most, self._credit + more)
        return self

    def __enter__(self) -> None:
        self._began = time.process_time()
        self._busy.set()

    def __exit__(self, *_: Any) -> None:
        self._busy.clear()
        self._credit -= time.process_time() - self._began

    def _look(self) -> None:
        while self._busy.wait():
            time.sleep(_WATCH_SECONDS)
            spent = time.process_time() - self._began
            over = spent > self._credit or (rss_bytes() or 0) > self._bytes
            if self._busy.is_set() and over:
                os._exit(TOO_MUCH)
