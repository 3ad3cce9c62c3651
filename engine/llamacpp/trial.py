"""A trial of a model file: what llama.cpp will do with it, done first in a process that may die.

llama.cpp asserts what it takes for granted of a file and then ends the process, or reads where
nothing is. What we know of is refused by our own checks; this is for the rest. What a file has
passed is kept in the user's cache, by the file's place and times and by llama.cpp's build, so that
a file is tried once.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
from importlib import resources
from pathlib import Path
from typing import Any

from fwdllm.engine.child import Child, ChildError
from fwdllm.engine.errors import ModelError
from fwdllm.engine.llamacpp import probe
from fwdllm.kernels.machine import remember, remembered

HEADER, VOCABULARY, WEIGHTS = "header", "vocabulary", "weights"

# Seconds of computing: what a small file may take, and bytes a second of a large one, which is read
# from a slow disk and repacked.
SECONDS, _BYTES_A_SECOND = 5.0, 50e6
# Bytes beyond the file, mapped, and as much again, repacked.
MEMORY = 1 << 30
_FILE, _REMEMBERED = "llama-cpp-files.json", 256
# Of Latin, Greek, Cyrillic, Arabic, of marks and punctuation, Chinese, Korean and emoji.
_CHARACTERS = (*range(1, 0x700), *range(0x2000, 0x2100), 0x4E2D, 0xAC00, 0xFFFD, 0x1F600)
_POOLING_MEAN = 1  # LLAMA_POOLING_TYPE_MEAN

_trials = Child("fwdllm.engine.llamacpp.trial:run", forks=True)
_known: dict[str, str] = {}  # in this process: "" or what llama.cpp dies of


def check(paths: tuple[Path, ...], stage: str, extra_buffers: bool) -> None:
    """ModelError if llama.cpp dies of a file.

    paths: the file, or all of a split model.  stage: what it is opened for: ``HEADER`` (a look at
    what it has), ``VOCABULARY`` (the tokenizer) or ``WEIGHTS`` (everything).  extra_buffers:
    whether llama.cpp repacks weights.
    """
    if _is_ours(paths[0]):
        return
    key = _key(paths, stage, extra_buffers)
    if key not in _known and key in remembered(_FILE):
        _known[key] = ""
    if key not in _known:
        nbytes = sum(path.stat().st_size for path in paths)
        request = {
            "path": str(paths[0]),
            "stage": stage,
            "extra_buffers": extra_buffers,
        }
        try:
            _trials.ask(request, SECONDS + nbytes / _BYTES_A_SECOND, 2 * nbytes + MEMORY)
        except ChildError as error:
            _known[key] = str(error)
        except OSError:  # no process can be started here, so there is none to try it in
            return
        else:
            _known[key] = ""
            remember(_FILE, key, stage, _REMEMBERED)
    if _known[key]:
        raise ModelError(
            f"llama.cpp cannot use {paths[0]}, as a trial in a process of its own shows: "
            f"{_known[key]}"
        )


def run(request: dict[str, Any]) -> None:
    """What the process does. Only whether it lives is of interest: what llama.cpp refuses here, it
    refuses again, and our message says why."""
    import llama_cpp

    quiet = llama_cpp.llama_log_callback(lambda level, text, user_data: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = request["stage"] == VOCABULARY
    params.use_extra_bufts = request["extra_buffers"]
    if request["stage"] == HEADER:  # as ``native.open_model``
        params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
    model = llama_cpp.llama_model_load_from_file(os.fsencode(request["path"]), params)
    if request["stage"] == HEADER or not model:
        return
    if not llama_cpp.llama_vocab_type(llama_cpp.llama_model_get_vocab(model)):
        return
    _tokenize(llama_cpp, model)
    if request["stage"] == WEIGHTS:
        off = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        exact = {"type_k": 0, "type_v": 0, "flash_attn_type": off}  # as ``generation``
        for options in ({}, exact, {"embeddings": True, "pooling_type": _POOLING_MEAN}):
            _decode(llama_cpp, model, options)


def _tokenize(llama_cpp: Any, model: Any) -> None:
    """Tokenize characters of all kinds, and write all tokens as text."""
    vocab = llama_cpp.llama_model_get_vocab(model)
    raw = "".join(map(chr, _CHARACTERS)).encode()
    found = (llama_cpp.llama_token * (8 * len(raw)))()
    for special in (False, True):
        llama_cpp.llama_tokenize(vocab, raw, len(raw), found, len(found), special, special)
    n = llama_cpp.llama_vocab_n_tokens(vocab)
    ids = (llama_cpp.llama_token * n)(*range(n))
    text = ctypes.create_string_buffer(1 << 24)
    for special in (False, True):
        llama_cpp.llama_detokenize(vocab, ids, n, text, len(text), special, special)


def _decode(llama_cpp: Any, model: Any, options: dict[str, Any]) -> None:
    """Compute three tokens, two at once and then one: other kernels."""
    params = llama_cpp.llama_context_default_params()
    for name, value in {"n_ctx": 64, "n_threads": 1, "n_threads_batch": 1, **options}.items():
        setattr(params, name, value)
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        return
    n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    for n in (2, 1):
        tokens = (llama_cpp.llama_token * n)(*(i % max(1, n_vocab) for i in range(1, n + 1)))
        llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(tokens, n))
    llama_cpp.llama_free(context)


def _key(paths: tuple[Path, ...], stage: str, extra_buffers: bool) -> str:
    files = []
    for path in paths:
        facts = path.stat()
        files.append((str(path.resolve()), facts.st_ino, facts.st_size, facts.st_mtime_ns))
    text = json.dumps([probe.key(), files, stage, extra_buffers])
    return hashlib.sha256(text.encode()).hexdigest()


def _is_ours(path: Path) -> bool:
    """Whether a file is part of this package: the bundled model, by which ``probe`` has tested the
    processor already."""
    with resources.as_file(resources.files("fwdllm") / "assets") as assets:
        return path.resolve().parent == Path(assets).resolve()
