"""Which parts of llama.cpp work on this processor, tested before it can crash our process.

A library built for another processor, or by a compiler with a fault, dies by a signal that no
exception handler sees (AMX kernels built by GCC: ggml-org/llama.cpp issue 20824). So a child
process decodes a few tokens first, once for each build of llama.cpp and processor; the result is
kept in a file in the user's cache. Only the child imports ``llama_cpp``.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from fwdllm.engine.child import leave_no_core
from fwdllm.kernels.machine import processor, remember, remembered

FULL = "full"  # everything works
PLAIN = "plain"  # everything, if models are opened without extra buffer types
VOCABULARY = "vocabulary"  # only vocabularies and their tokenizers; computing crashes
BROKEN = "broken"  # not even that

# The child needs 0.5 s; a processor of a phone under load with a cold disk, many times that.
TIME_LIMIT = 60.0

# What helps: GCC drops stores that AMX needs (issue 20824 of llama.cpp), clang does not.
REBUILD = (
    "to mend that, build it anew on this machine, best with clang: CC=clang CXX=clang++ "
    "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python"
)

# What the child prints when it has got so far.
_READ, _DECODED = "vocabulary read", "tokens decoded"
# Signals that the code itself causes (a bad address, instruction or division); others may have come
# from outside.
_OF_CODE = (signal.SIGSEGV, signal.SIGILL, signal.SIGFPE)
_N_TOKENS = 32  # rows enough for matrix-matrix kernels; one more token tests matrix-vector ones
_FILE = "llama-cpp.json"
_REMEMBERED = 64  # answers in the file: a home directory may serve many machines

# With our search path, so that it finds the llama.cpp that we would.
_CHILD = (
    "import sys; sys.path[:] = sys.argv[3:]; from fwdllm.engine.llamacpp import probe; "
    "probe.decode(sys.argv[1], extra_buffers=sys.argv[2] == 'True')"
)


@dataclass(frozen=True)
class Verdict:
    """state: ``FULL``, ``PLAIN``, ``VOCABULARY`` or ``BROKEN``.  reason: what the child died of, ""
    where everything works."""

    state: str
    reason: str


@dataclass(frozen=True)
class _Outcome:
    """How a child ended. read, decoded: how far it got.  died_of: "" if it ended well.  certain:
    whether a failure would happen every time."""

    read: bool
    decoded: bool
    died_of: str
    certain: bool


_found: Verdict | None = None  # in this process


def verdict() -> Verdict:
    """What works here: from the cache, or tested now (half a second, one if a child dies)."""
    global _found
    if _found is None:
        _found = _recall() or examine()
    return _found


def examine() -> Verdict:
    """What works here, tested now, and put into the cache if the result is certain."""
    global _found
    _found, certain = probe()
    if certain:
        remember(_FILE, key(), asdict(_found), _REMEMBERED)
    return _found


def probe(time_limit: float = TIME_LIMIT) -> tuple[Verdict, bool]:
    """Test what works, and whether another test would certainly give the same.

    time_limit: seconds that a child may take.
    """
    with resources.as_file(resources.files("fwdllm") / "assets" / "fwdllm-tiny.gguf") as model:
        try:
            first = _run(model, True, time_limit)
            if first.decoded:
                return Verdict(FULL, ""), True
            if not first.read:  # what is missing may be there the next time
                return Verdict(BROKEN, first.died_of), False
            second = _run(model, False, time_limit)
        except OSError as error:  # no child can run: assume that the extra buffer types fail
            return Verdict(PLAIN, f"no process to try them in: {error.strerror or error}"), False
    certain = first.certain and (second.decoded or second.certain)
    return Verdict(PLAIN if second.decoded else VOCABULARY, first.died_of), certain


def decode(model: str, *, extra_buffers: bool) -> None:
    """What the child does: read a quantized model and decode a prompt and one more token."""
    leave_no_core()
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    llama_cpp.llama_model_free(_made(llama_cpp.llama_model_load_from_file(model.encode(), params)))
    print(_READ, flush=True)
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = extra_buffers
    opened = _made(llama_cpp.llama_model_load_from_file(model.encode(), params))
    context = llama_cpp.llama_context_default_params()
    context.n_ctx = 2 * _N_TOKENS
    context.n_threads = context.n_threads_batch = 1  # uses the instructions that more threads would
    running = _made(llama_cpp.llama_init_from_model(opened, context))
    for n in (_N_TOKENS, 1):
        tokens = (llama_cpp.llama_token * n)(*range(1, n + 1))
        if llama_cpp.llama_decode(running, llama_cpp.llama_batch_get_one(tokens, n)):
            raise RuntimeError("llama_decode fails")
    print(_DECODED, flush=True)


def library_folder() -> Path | None:
    """Where llama-cpp-python has its libraries; None if it is not installed."""
    if chosen := os.environ.get("LLAMA_CPP_LIB_PATH"):
        return Path(chosen)
    found = importlib.util.find_spec("llama_cpp")
    places = found.submodule_search_locations if found else None
    return Path(places[0]) / "lib" if places else None


def _run(model: Path, extra_buffers: bool, time_limit: float) -> _Outcome:
    """Run a child and say how it ended. Errors: OSError if none can be started."""
    if not sys.executable or getattr(sys, "frozen", False):
        raise OSError("this program is not Python's")  # it would start itself
    command = [sys.executable, "-c", _CHILD, str(model), str(extra_buffers), *map(str, sys.path)]
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=time_limit,
        )
        code, said, failed = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as error:
        # Its output is bytes, in spite of text=True.
        read = _READ.encode() in (error.stdout or b"")
        return _Outcome(read, False, f"no end after {time_limit:.0f} s", False)
    decoded = _DECODED in said and code == 0
    return _Outcome(
        _READ in said, decoded, "" if decoded else _cause(code, failed), -code in _OF_CODE
    )


def _cause(code: int, failed: str) -> str:
    """What a child died of: the signal's name, or the last line of its traceback."""
    if code < 0:
        return signal.strsignal(-code) or f"signal {-code}"
    lines = failed.strip().splitlines()
    return lines[-1].partition(": ")[2] or lines[-1] if lines else f"exit code {code}"


def _made(pointer: Any) -> Any:
    if not pointer:
        raise RuntimeError("llama.cpp cannot open the bundled model")
    return pointer


def key() -> str:
    """Identifies this build of llama.cpp (by its files), the processor and the system's kernel."""
    folder = library_folder()
    files = []
    if folder is not None and folder.is_dir():
        for path in sorted(folder.iterdir()):
            facts = path.stat()
            files.append((str(path), facts.st_size, facts.st_mtime_ns))
    text = json.dumps([str(folder), files, processor(), platform.release()])
    return hashlib.sha256(text.encode()).hexdigest()


def _recall() -> Verdict | None:
    found = remembered(_FILE).get(key())
    wanted = {field.name for field in fields(Verdict)}
    if not isinstance(found, dict) or found.keys() != wanted:
        return None
    if found["state"] not in (FULL, PLAIN, VOCABULARY) or not isinstance(found["reason"], str):
        return None
    return Verdict(**found)
