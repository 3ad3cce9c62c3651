"""Grammars in a process of their own, which may die of them: see ``grammar_worker``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.http import limits
from fwdllm.http.grammar_worker import ALLOWED, TOO_MUCH

# With our search path, so that it finds the llama.cpp that we would. All of it has its priority.
_CHILD = (
    "import os, sys; sys.path[:] = sys.argv[3:]; getattr(os, 'nice', int)(int(sys.argv[2])); "
    "from fwdllm.http.grammar_worker import main; main(sys.argv[1])"
)


class GrammarError(ValueError):
    """A grammar that is none, or that cannot be followed."""


class GrammarProcess:
    """A process that follows one grammar at a time; started when it is first needed.

    model: a GGUF file.  n_vocab: tokens of its vocabulary.  nice: by how much the process's
    priority is lowered.  One thread may use it at a time; any may ``close`` it.
    """

    def __init__(self, model: Path, n_vocab: int, nice: int = 0) -> None:
        self._model, self._n_vocab, self._nice = model.absolute(), n_vocab, nice
        self._process: subprocess.Popen[bytes] | None = None
        self._expected = 0  # answers that have not been read yet
        self._closing = threading.Lock()
        self._closed = False

    def begin(self, grammar: str) -> None:
        """Start with a grammar in GBNF; its answer is what ``allowed`` waits for.

        Errors: GrammarError for a text that is too long or empty.
        """
        if "\0" in grammar or not grammar.strip():
            raise GrammarError("the grammar is empty")
        if len(grammar) > limits.MAX_GRAMMAR_CHARACTERS:
            most = limits.MAX_GRAMMAR_CHARACTERS
            raise GrammarError(f"the grammar has {len(grammar):,} characters, over {most:,}")
        while self._expected:  # of a text that was broken off
            with contextlib.suppress(GrammarError):
                self.allowed()
        self._send(grammar)

    def accept(self, token: int) -> None:
        """Go on with a token, which must be one of those ``allowed``."""
        self._send(token)

    def allowed(self) -> np.ndarray:
        """Which tokens may come next, bool [n_vocab]. Errors: GrammarError."""
        self._expected -= 1
        process = self._process
        assert process is not None and process.stdout is not None
        kind = process.stdout.read(1)
        if kind == ALLOWED:
            bits = process.stdout.read((self._n_vocab + 7) // 8)
            if len(bits) == (self._n_vocab + 7) // 8:
                return np.unpackbits(np.frombuffer(bits, np.uint8), count=self._n_vocab) == 1
        elif kind:
            why = process.stdout.readline().decode("utf-8", "replace").strip()
            raise GrammarError(f"the grammar is not one in GBNF: {why}")
        raise self._ended()

    def close(self) -> None:
        """End the process, whatever it does."""
        with self._closing:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def _send(self, message: str | int) -> None:
        if self._process is None:
            self._start()
        assert self._process is not None and self._process.stdin is not None
        with contextlib.suppress(OSError):  # it has died; ``allowed`` will say so
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        self._expected += 1

    def _start(self) -> None:
        with self._closing:
            if self._closed:
                raise GrammarError("the server is closing")
            self._process = subprocess.Popen(
                [sys.executable, "-c", _CHILD, str(self._model), str(self._nice), *sys.path],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "GGML_NO_BACKTRACE": "1"},  # else it may start a debugger
            )

    def _ended(self) -> GrammarError:
        """Why the process has ended; the next is started at once, for the next grammar."""
        process, self._process, self._expected = self._process, None, 0
        assert process is not None
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # for what was not yet written
                pipe.close()
        self._start()
        if code == TOO_MUCH:
            return GrammarError(
                f"the grammar costs too much: over {limits.GRAMMAR_SECONDS:g} s at once, "
                f"{limits.GRAMMAR_SECONDS_PER_TOKEN:g} s a token or "
                f"{limits.MAX_GRAMMAR_BYTES // 2**20} MiB"
            )
        how = f"signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"exit code {code}"
        return GrammarError(f"llama.cpp cannot follow this grammar: it ends with {how}")


class Constraint:
    """What llama-cpp-python calls with the logits of each token: only allowed ones stay.

    The process works while the model computes the next logits.
    """

    def __init__(self, process: GrammarProcess, grammar: str) -> None:
        process.begin(grammar)
        self._process = process
        self._fault: GrammarError | None = None

    def __call__(self, _ids: Any, logits: np.ndarray) -> np.ndarray:
        # An exception would be lost in llama.cpp, which calls this: ``accept`` raises it.
        try:
            found = np.where(self._process.allowed(), logits, -np.inf)
            if not np.isfinite(found).any():
                raise GrammarError("no token can follow here by the grammar and the request")
            return found
        except GrammarError as error:
            self._fault = error
            return logits

    def accept(self, token: int, *, ends: bool) -> None:
        """Go on with the token that was chosen. ends: it ends the text. Errors: GrammarError."""
        if self._fault is not None:
            raise self._fault
        if not ends:
            self._process.accept(token)
