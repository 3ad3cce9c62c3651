"""Files of shared/cases/hostile and their kind: a sentence in every command, and none dies."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from changed_models import changed
from cli_runs import Cli

from fwdllm.engine import Engine
from fwdllm.engine.data import chat
from fwdllm.engine.data.chat import ChatTemplate
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.errors import DataError, ModelError, NumericsError
from fwdllm.engine.llamacpp import generation, trial
from fwdllm.engine.llamacpp.native import Llama, open_model
from fwdllm.kernels import machine

# Computing may be slow for others are at work, too.
NO_END = "it (computes without end|has not ended)"
DATA = '{"prompt": "What is it?", "completion": " Arr, matey!"}\n'
HI = [{"role": "user", "content": "hi"}]

# Of the files: what is said of it, by the commands that say something.
REFUSED = {
    "alignment-1": "general.alignment is not a power of two of at least 8, in 32 bits",
    "context-length-1": "reads 1 tokens at once, too few to predict another",
    "expert-count-8": "'llama.expert_used_count' is not 1 to 8 experts",
    "missing-attn-q": "tensor 'blk.0.attn_q.weight' not found",
    "output-norm-q4_1": "tensor 'output_norm.weight' is a vector of type Q4_1",
    "rms-eps-nan": "'llama.attention.layer_norm_rms_epsilon' is nan, not finite",
    "rwkv-vocab": NO_END,
    "spm-no-byte-tokens": "it ends with Aborted",
}


@pytest.fixture(autouse=True)
def little_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what takes time without end should here."""
    monkeypatch.setattr(trial, "SECONDS", 2.0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.jsonl"
    path.write_text(DATA * 2)
    return path


@pytest.mark.parametrize("name", REFUSED)
def test_every_command_refuses_it_in_one_sentence(
    name: str, hostile: Path, data: Path, fwdllm: Cli, tmp_path: Path
) -> None:
    model, adapter = str(hostile / f"{name}.gguf"), str(tmp_path / "a.gguf")
    commands = [
        ("inspect", model),
        ("eval", model, data),
        ("generate", model, "hi"),
        ("tune", model, data, "-o", adapter, "--steps", "1"),
    ]
    for command in commands:
        done = fwdllm(*command)
        assert done.code == 2 and re.search(REFUSED[name], done.err), command
        assert done.err.count("\n") <= 2, command
    assert not Path(adapter).exists()


@pytest.mark.parametrize(
    ("name", "data", "error", "reason"),
    [
        ("norm-f16", "two.jsonl", ModelError, "it ends with Aborted: binary-ops.cpp:"),
        ("one-nan-scale", "two.jsonl", NumericsError, "logits are not finite"),
    ],
)
def test_what_only_llama_cpp_cannot_compute_is_refused_when_it_is_asked(
    name: str, data: str, error: type[Exception], reason: str, hostile: Path
) -> None:
    model = hostile / f"{name}.gguf"
    with pytest.raises(error, match=reason):
        list(generation.generate(model, "hi"))
    with pytest.raises(error, match=reason):
        generation.logits(model, [1, 2])


def test_embeddings_that_are_not_finite_are_an_error(hostile: Path) -> None:
    with pytest.raises(NumericsError, match="embeddings are not finite"):
        generation.embed(hostile / "one-nan-scale.gguf", ["hi"])


@pytest.mark.parametrize("name", ["template-loop", "template-memory", "template-indent"])
def test_templates_are_bounded(
    name: str, hostile: Path, fwdllm: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "template-loop":
        monkeypatch.setattr(chat, "SECONDS", 1.0)
    model = hostile / f"{name}.gguf"
    reason = NO_END if name == "template-loop" else "it needs too much memory"
    for command in (
        ("eval", model, hostile / "msg.jsonl"),
        ("generate", model, "hi", "--chat"),
    ):
        start = time.monotonic()
        done = fwdllm(*command)
        assert done.code == 2 and re.search(f"fails on these messages: {reason}", done.err)
        assert time.monotonic() - start < 20
    assert fwdllm("generate", model, "hi", "--max-tokens", "1").code == 0


# More programs of the kind: those that take time or memory, and what their end is told as.
TEMPLATES = {
    "{{ 'a' * 99999999 }}": "it writes over 16,777,216 characters",
    "{{ [1] * 999999999 }}": "it needs too much memory",
    "{{ [1, 2]|tojson(indent=999999999) }}": "it needs too much memory",
    "{{ 'a'|center(9999999999) }}": "it needs too much memory",
    "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}{% endfor %}": (
        "it needs too much memory"
    ),
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}": "maximum recursion depth exceeded",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": (NO_END),
    "{{ range(999999)|length }}": "Range too big",
    "{{ ''.__class__.__mro__ }}": "access to attribute '__class__' of 'str' object is unsafe",
}


@pytest.mark.parametrize("source", TEMPLATES)
def test_templates_of_the_kind_are_bounded(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if TEMPLATES[source] == NO_END:
        monkeypatch.setattr(chat, "SECONDS", 1.0)
    template = ChatTemplate(source, "", "", "m.gguf")
    with pytest.raises(ModelError, match=TEMPLATES[source]):
        template.render(HI, False)
    assert ChatTemplate("{{ messages[0].content }}", "", "", "m.gguf").render(HI, False) == "hi"


@pytest.mark.parametrize("name", ["pre-tekken", "pre-deepseek-llm", "pre-gpt-4o"])
def test_a_word_that_is_too_long_is_named_with_its_line(
    name: str, hostile: Path, fwdllm: Cli
) -> None:
    words = hostile / "long-word.jsonl"
    done = fwdllm("eval", hostile / f"{name}.gguf", words, "--max-tokens", "8")
    assert done.code == 2
    assert f"{words}:1: 200,000 characters without a space between them" in done.err


# Of each, what patterns repeat: letters of two cases, marks, numbers, punctuation, spaces.
@pytest.mark.parametrize("letter", ["a", "A", "é", "中", "7", "!", " ", "\n", "\u0300", "🙂"])
def test_long_words_have_the_tokens_that_short_ones_have(letter: str, hostile: Path) -> None:
    """Words of a length that would end the process on a usual stack."""
    tokenizers = [
        Tokenizer.open(hostile / f"pre-{name}.gguf")
        for name in ("tekken", "deepseek-llm", "gpt-4o")
    ]
    text = f"x {letter * 99_000} x"
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text, bos=False)
        assert tokenizer.decode(ids) == text


def test_a_server_answers_400_to_a_long_word(hostile: Path, bundled: Path) -> None:
    """Its own class tokenizes as ours does."""
    llama = Llama(str(hostile / "pre-tekken.gguf"), n_ctx=64, verbose=False)
    with pytest.raises(DataError, match="200,000 characters"):
        llama.tokenize(b"a" * 200_000)
    assert llama.tokenize(b"hi") == Tokenizer.open(bundled).encode("hi", bos=True)


def test_a_vocabulary_without_tokens_for_a_text(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "check", lambda *_: None)
    path = changed(tmp_path / "m.gguf", bundled, {"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(ModelError, match="has no tokens for a part of the text"):
        Tokenizer.open(path).encode("Question: How does a strawberry taste?", bos=False)


def test_a_file_is_tried_once(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = changed(tmp_path / "m.gguf", bundled, {"general.name": "another"})
    asked: list[str] = []
    ask = trial._trials.ask
    monkeypatch.setattr(
        trial._trials, "ask", lambda r, *limits: asked.append(r["stage"]) or ask(r, *limits)
    )
    for _ in range(2):
        open_model(path, vocab_only=True)
        open_model(path, vocab_only=False)
        open_model(bundled, vocab_only=False)
    assert asked == ["vocabulary", "weights"]
    monkeypatch.setattr(trial, "_known", {})  # as in the next process
    open_model(path, vocab_only=False)
    assert asked == ["vocabulary", "weights"]
    os.utime(path, (1, 1))  # it may be another file now
    open_model(path, vocab_only=False)
    assert asked == ["vocabulary", "weights", "weights"]
    answers = json.loads(machine.cache_file("llama-cpp-files.json").read_text())
    assert sorted(answers.values()) == ["vocabulary", "weights", "weights"]


def test_what_dies_is_not_kept(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = changed(tmp_path / "m.gguf", bundled, {"tokenizer.ggml.model": "llama"})
    for _ in range(2):
        with pytest.raises(ModelError, match="a trial in a process of its own"):
            open_model(path, vocab_only=True)
    assert not machine.cache_file("llama-cpp-files.json").exists()


def test_without_a_process_to_try_it_in_a_file_is_used_as_it_is(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(_request: object, *_limits: float) -> None:
        raise OSError("no more processes")

    monkeypatch.setattr(trial._trials, "ask", refuses)
    path = changed(tmp_path / "m.gguf", bundled, {"general.name": "a third"})
    assert open_model(path, vocab_only=True).architecture == "llama"


NUMBERS: dict[str, tuple[float, str]] = {
    "llama.attention.layer_norm_rms_epsilon": (-1e-5, "below 0"),
    "llama.rope.freq_base": (float("inf"), "is inf, not finite"),
    "llama.attention.scale": (float("nan"), "is nan, not finite"),
}


@pytest.mark.parametrize("key", NUMBERS)
def test_numbers_that_are_none(key: str, bundled: Path, tmp_path: Path) -> None:
    value, reason = NUMBERS[key]
    path = changed(tmp_path / "m.gguf", bundled, {key: value})
    attempts: list[Callable[[], object]] = [
        lambda: open_model(path, vocab_only=False),
        lambda: Llama(str(path), verbose=False),
    ]
    for attempt in attempts:
        with pytest.raises(ModelError, match=reason):
            attempt()


@pytest.mark.parametrize("n_layers", [0, 513])
def test_numbers_of_layers(n_layers: int, bundled: Path, tmp_path: Path) -> None:
    path = changed(tmp_path / "m.gguf", bundled, {"llama.block_count": n_layers})
    for vocab_only in (True, False):
        with pytest.raises(ModelError, match="block_count"):
            open_model(path, vocab_only=vocab_only)


def test_matrices_with_a_nan_in_generation(bundled: Path, tmp_path: Path) -> None:
    """Also of the output, which llama.cpp samples from as if nothing were wrong."""
    from gguf import GGUFReader

    [norm] = [t for t in GGUFReader(bundled).tensors if t.name == "output_norm.weight"]
    data = np.array(norm.data)
    data[0] = np.inf
    path = changed(tmp_path / "m.gguf", bundled, tensors={"output_norm.weight": data})
    with pytest.raises(NumericsError, match="logits are not finite"):
        list(generation.generate(path, "hi"))


def test_a_pooling_that_llama_cpp_does_not_know(shared: Path, tmp_path: Path) -> None:
    source = shared / "models" / "minilm-l6-v2.Q4_0.gguf"
    path = changed(
        tmp_path / "m.gguf", source, {"general.architecture": "bert", "bert.pooling_type": 5}
    )
    with pytest.raises(ModelError, match="pools by 5"):
        generation.embed(path, ["hi"])
    with pytest.raises(ModelError, match="pools by 5"):
        Engine.load(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of memory are Linux's")
def test_a_trial_has_a_limit_of_memory(
    bundled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = changed(tmp_path / "m.gguf", bundled, {"general.name": "a fourth"})
    monkeypatch.setattr(trial, "MEMORY", -2 * path.stat().st_size + 1)
    with pytest.raises(ModelError, match="it needs too much memory"):
        open_model(path, vocab_only=False)
