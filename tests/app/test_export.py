"""Adapters for other programs: merged models, and folders for Ollama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cli_runs import MODEL, Cli, pirate_rows, write_rows
from real_models import smollm2

from fwdllm import ollama
from fwdllm.engine import Engine, LoRAConfig
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.data.tokenizer import Tokenizer
from fwdllm.engine.errors import ConfigError
from fwdllm.ollama import turns_of

__all__ = ["smollm2"]  # a fixture


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("adapter") / "adapter.gguf", MODEL)


def save(path: Path, model: Path) -> Path:
    """A small adapter that changes something."""
    engine = Engine.load(model, LoRAConfig(2, 4.0))
    assert engine.adapter is not None
    theta = engine.adapter.theta
    theta[:] = np.random.default_rng(3).normal(0, 0.05, theta.size)
    save_gguf(engine.adapter, path)
    return path


def test_a_merged_model_has_the_loss_of_model_and_adapter(
    fwdllm: Cli, adapter: Path, tmp_path: Path
) -> None:
    data, merged = write_rows(tmp_path / "data.jsonl", pirate_rows(4)), tmp_path / "merged.gguf"
    found = fwdllm("export", adapter, merged, "--model", MODEL, "--merge", "--data", data)
    assert found.code == 0, found.err
    path, losses = found.out.splitlines()
    before, after = (float(losses.split()[i]) for i in (1, 5))
    assert (path, before) == (str(merged), pytest.approx(after, abs=0.01))
    for loss, asked in ((before, (MODEL, data, "--adapter", adapter)), (after, (merged, data))):
        assert fwdllm("eval", *asked, "--json").json["loss"] == pytest.approx(loss, abs=1e-4)
    assert fwdllm("generate", merged, "A cow", "--max-tokens", 2).code == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("merged.bin", "--merge"), "end the name"),
        (("nowhere/merged.gguf", "--merge"), "the folder nowhere does not exist"),
        (("merged.gguf", "--merge", "--type", "own"), "too coarse to round it again"),
        (("merged.gguf", "--type", "q8_0"), "are for --merge"),
        (("merged.gguf", "--merge", "--data", "none.jsonl"), "none.jsonl"),
        ((MODEL, "--merge"), "choose another name for the result"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_nothing_is_left(
    fwdllm: Cli,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[object, ...],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found = fwdllm("export", adapter, *options, "--model", MODEL)
    assert found.code == 2
    assert said in found.err
    assert not list(tmp_path.iterdir())


def test_ollama_gets_the_adapter_or_the_merged_model(
    fwdllm: Cli, adapter: Path, tmp_path: Path
) -> None:
    for folder, options in (("adapter", ()), ("merged", ("--merge",))):
        asked = ("export", adapter, tmp_path / folder, "--model", MODEL, "--ollama", *options)
        assert fwdllm(*asked).code == 0
    lines = (tmp_path / "adapter/Modelfile").read_text().splitlines()
    assert lines[1:3] == [f"FROM {MODEL}", "ADAPTER ./adapter.gguf"]
    assert (tmp_path / "adapter/adapter.gguf").read_bytes() == adapter.read_bytes()
    assert (tmp_path / "merged/Modelfile").read_text().startswith("FROM ./model.gguf\n")
    ids = [5, 77, 1200, 9]
    want, got = (
        Engine.load(path, adapter=adapted, exact=True).logits(ids)
        for path, adapted in ((MODEL, adapter), (tmp_path / "merged/model.gguf", None))
    )
    np.testing.assert_allclose(got, want, atol=0.02)


def test_a_folder_for_ollama_is_complete_once_it_has_a_modelfile(
    fwdllm: Cli, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("export", adapter, tmp_path, "--model", MODEL, "--ollama")
    assert fwdllm(*asked).code == 0
    before = (tmp_path / "Modelfile").read_bytes()

    def end(*_: object) -> None:
        assert not (tmp_path / "Modelfile").exists()
        raise ConfigError("the end")

    monkeypatch.setattr(ollama, "merge", end)
    assert fwdllm(*asked, "--merge").code == 2
    assert (tmp_path / "Modelfile").read_bytes() == before


def test_ollama_gets_no_adapter_of_another_model(fwdllm: Cli, tmp_path: Path) -> None:
    found = fwdllm("export", MODEL, tmp_path / "folder", "--model", MODEL, "--ollama")
    assert (found.code, "is not an adapter" in found.err) == (2, True)
    assert not list(tmp_path.iterdir())


def test_a_template_of_fixed_texts_is_written_for_ollama(
    fwdllm: Cli, smollm2: Path, tmp_path: Path
) -> None:
    """Go's text/template makes of it what the chat template renders; checked by hand."""
    adapter = save(tmp_path / "small.gguf", smollm2)
    assert fwdllm("export", adapter, tmp_path, "--model", smollm2, "--ollama").code == 0
    template = (tmp_path / "Modelfile").read_text().split('"""')[1]
    assert template == (
        "{{ if not .System }}<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{{ end }}"
        '{{ range .Messages }}{{ if eq .Role "system" }}<|im_start|>system\n'
        '{{ .Content }}<|im_end|>\n{{ end }}{{ if eq .Role "user" }}<|im_start|>user\n'
        '{{ .Content }}<|im_end|>\n{{ end }}{{ if eq .Role "assistant" }}<|im_start|>assistant\n'
        "{{ .Content }}<|im_end|>\n{{ end }}{{ end }}<|im_start|>assistant\n"
    )
    turns, tokenizer = turns_of(Tokenizer.open(smollm2)), Tokenizer.open(smollm2)
    assert turns is not None
    talk = [{"role": role, "content": role[::-1]} for role in ("user", "assistant", "user")]
    for messages in (talk, [{"role": "system", "content": "Be brief."}, *talk]):
        assert turns.render(messages) == tokenizer.chat.render(messages, True)


def test_a_template_that_does_more_is_left_to_ollama() -> None:
    """The bundled model's ends the last answer otherwise than those before it."""
    assert turns_of(Tokenizer.open(MODEL)) is None
