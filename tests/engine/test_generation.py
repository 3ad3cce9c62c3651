"""Generation, embeddings and logits by llama.cpp, with and without an adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from places import SHARED

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.errors import AdapterError, ConfigError, DataError, FwdllmError, ModelError
from fwdllm.engine.llamacpp.generation import Tokenizer, embed, generate, logits
from fwdllm.engine.llamacpp.native import Llama
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import reference

MODELS = SHARED / "models"
DECODER = MODELS / "tinymix-6m.Q4_0.gguf"
ENCODER = MODELS / "minilm-l6-v2.Q4_0.gguf"
VOCABULARY = MODELS / "ggml-vocab-llama-spm.gguf"
pytestmark = pytest.mark.skipif(not MODELS.exists(), reason="the shared models are not here")

PROMPT = "The company said on"


def text(prompt: str | list = PROMPT, **options: object) -> str:
    return "".join(generate(DECODER, prompt, n_threads=1, **options))


def adapter_file(path: Path, architecture: str, width: int) -> Path:
    block = {f"blk.{i}.attn_q": (width, width) for i in range(6)}
    adapter = Adapter.create(
        architecture, block, LoRAConfig(rank=2, targets=("attn_q",)), 1, reference
    )
    adapter.add([7], [0.3])
    save_gguf(adapter, path)
    return path


def test_greedy_text_follows_the_logits() -> None:
    tokenizer = Tokenizer.open(DECODER)
    ids = tokenizer.encode(PROMPT, bos=True)
    n_prompt = len(ids)
    for _ in range(3):
        ids.append(int(logits(DECODER, ids, n_threads=1)[-1].argmax()))
    assert text(max_tokens=3) == tokenizer.decode(ids[n_prompt:])


def test_sampling_is_repeatable_by_seed() -> None:
    sampled = {seed: text(temperature=1.0, seed=seed, max_tokens=12) for seed in (0, 1, 2)}
    assert len(set(sampled.values())) > 1
    assert text(temperature=1.0, seed=0, max_tokens=12) == sampled[0]
    # All ones is llama.cpp's word for a random seed; it must not get through.
    assert len({text(temperature=1.0, seed=2**32 - 1, max_tokens=12) for _ in range(3)}) == 1


def test_generation_ends_with_the_context() -> None:
    tokenizer = Tokenizer.open(DECODER)
    prompt = PROMPT * 100
    n_free = 512 - len(tokenizer.encode(prompt, bos=True))
    assert 0 < n_free < 120
    pieces = list(generate(DECODER, prompt, max_tokens=10**6, n_threads=1))
    assert 0 < len(pieces) <= n_free + 1


def test_chat_goes_through_the_template() -> None:
    messages = [{"role": "user", "content": "Hi"}]
    chat = text("Hi", chat=True, max_tokens=8)
    assert text(messages, max_tokens=8) == chat
    rendered = Tokenizer.open(DECODER).chat.render(messages, add_generation_prompt=True)
    assert text(rendered, max_tokens=8) == chat


def test_logits_agree_with_the_wrapper_class(tmp_path: Path) -> None:
    ids = [0, 40, 611, 79, 221, 1108]
    path = str(MODELS / "tinymix-6m.F16.gguf")
    adapter = str(adapter_file(tmp_path / "a.gguf", "llama", 256))
    options = {"n_ctx": 64, "logits_all": True, "n_threads": 1, "n_threads_batch": 1}
    model = Llama(path, lora_path=adapter, verbose=False, **options)
    model.eval(ids)
    ours = logits(path, ids, adapter, n_threads=1)
    assert ours.shape == (6, 4096)
    np.testing.assert_allclose(ours, model.scores[:6], atol=0.05)  # its keys are float16
    assert np.abs(logits(path, ids, n_threads=1) - ours).max() > 0.5


def test_embeddings_have_meaning_and_length_one() -> None:
    texts = ["A cat sits on the mat.", "A kitten is sitting.", "Stocks fell sharply."]
    found = embed(ENCODER, texts, n_threads=1)
    assert found.shape == (3, 384)
    np.testing.assert_allclose((found**2).sum(axis=1), 1, rtol=1e-5)
    assert found[0] @ found[1] > found[0] @ found[2] + 0.3
    np.testing.assert_array_equal(embed(ENCODER, texts[1:2], n_threads=1), found[1:2])
    assert embed(ENCODER, [], n_threads=1).shape == (0, 384)
    found = embed(DECODER, texts, n_threads=1)
    assert found.shape == (3, 256)
    np.testing.assert_array_equal(embed(DECODER, texts[1:2], n_threads=1), found[1:2])


def test_adapter_changes_text_and_embeddings(tmp_path: Path) -> None:
    for_decoder = adapter_file(tmp_path / "d.gguf", "llama", 256)
    for_encoder = adapter_file(tmp_path / "e.gguf", "bert", 384)
    assert text(adapter_path=for_decoder) != text()
    plain = embed(ENCODER, ["A cat."], n_threads=1)
    assert embed(ENCODER, ["A cat."], for_encoder, n_threads=1)[0] @ plain[0] < 0.99


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda folder: generate(DECODER, "x", max_tokens=0), ConfigError),
        (lambda folder: generate(DECODER, "x", temperature=-1), ConfigError),
        (lambda folder: generate(DECODER, "x", temperature=float("nan")), ConfigError),
        (lambda folder: generate(DECODER, "x " * 600), DataError),
        (lambda folder: generate(ENCODER, "x"), ModelError),
        (lambda folder: generate(VOCABULARY, "x"), ModelError),
        (lambda folder: generate(folder / "missing.gguf", "x"), ModelError),
        (lambda folder: generate(DECODER, "x", folder / "missing.gguf"), AdapterError),
        (lambda folder: generate(DECODER, "x", DECODER), AdapterError),
        (lambda folder: generate(DECODER, "x", folder / "bert.gguf"), AdapterError),
        (lambda folder: generate(DECODER, "x", folder / "narrow.gguf"), AdapterError),
        (lambda folder: embed(ENCODER, ["x", "x " * 600]), DataError),
        (lambda folder: logits(ENCODER, [1]), ModelError),
        (lambda folder: logits(DECODER, []), DataError),
        (lambda folder: logits(DECODER, [4096]), DataError),
        (lambda folder: logits(DECODER, [1] * 513), DataError),
    ],
)
def test_errors_come_at_once_as_one_sentence_and_nothing_is_printed(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    call: Callable[[Path], object],
    kind: type[FwdllmError],
) -> None:
    adapter_file(tmp_path / "bert.gguf", "bert", 256)
    adapter_file(tmp_path / "narrow.gguf", "llama", 128)
    with pytest.raises(kind) as raised:
        call(tmp_path)
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_success_prints_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text(max_tokens=2, adapter_path=adapter_file(tmp_path / "a.gguf", "llama", 256))
    embed(ENCODER, ["x"], n_threads=1)
    assert capfd.readouterr() == ("", "")
