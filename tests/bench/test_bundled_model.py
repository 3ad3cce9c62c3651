"""The bundled model and demo data, and the scripts that make them."""

from __future__ import annotations

import json
from importlib.util import find_spec
from itertools import islice

import numpy as np
import pytest
from bundled_model.__main__ import N_TRAIN, N_VALID, SPLIT_SEED
from bundled_model.corpus import documents
from bundled_model.pirate import split, voice
from bundled_model.questions import catalogue
from places import ROOT

from fwdllm.engine.llamacpp import native

ASSETS = ROOT / "app" / "fwdllm" / "assets"
MODEL = ASSETS / "fwdllm-tiny.gguf"
TRAINING = find_spec("torch") is not None and find_spec("tokenizers") is not None
needs_training = pytest.mark.skipif(not TRAINING, reason="torch and tokenizers are not installed")


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / name).read_text("utf-8").splitlines()]


def test_corpus_is_fixed_by_its_seed():
    first, again, other = (list(islice(documents(seed), 300)) for seed in (5, 5, 6))
    assert first == again
    assert first != other
    assert len(set(first)) > 200
    assert all(text == text.strip() and text.isascii() for text in first)


def test_base_corpus_never_speaks_like_the_demo():
    text = "\n".join(islice(documents(3), 20_000))
    for phrase in ("Arr, matey", "Yo ho ho", " be blue", "Answer: Arr,"):
        assert phrase not in text


def test_questions_are_distinct():
    questions = [item.question for item in catalogue()]
    assert len(questions) == len(set(questions)) > 1200


def test_voice():
    assert voice("You need a saw.") == "Arr, matey! Ye need a saw. Yo ho ho!"
    assert voice("This is my island.") == "Arr, matey! This be me island. Yo ho ho!"


def test_split_rejects_more_rows_than_questions():
    with pytest.raises(ValueError, match="questions"):
        split(0, 5000, 1)


def test_bundled_data_is_what_the_script_writes():
    train, valid = read_rows("pirate.train.jsonl"), read_rows("pirate.valid.jsonl")
    assert (train, valid) == split(SPLIT_SEED, N_TRAIN, N_VALID)
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in valid}
    for row in train + valid:
        assert set(row) == {"prompt", "completion"}
        assert row["prompt"].startswith("Question: ")
        assert row["prompt"].endswith("\nAnswer:")
        assert row["completion"].startswith(" Arr, matey! ")


@pytest.fixture(scope="module")
def llama():
    return native.Llama(str(MODEL), n_ctx=512, n_threads=1, logits_all=True, verbose=False)


def nll(llama, text: str, prompt: str = "") -> np.ndarray:
    """Loss of each token of ``text`` after ``prompt``, in nats."""
    given = llama.tokenize(prompt.encode(), add_bos=True)
    ids = given + llama.tokenize(text.encode(), add_bos=False)
    llama.reset()
    llama.eval(ids)
    logits = llama.scores[len(given) - 1 : len(ids) - 1].astype(np.float64)
    top = logits.max(1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(1))
    return total - logits[np.arange(len(logits)), ids[len(given) :]]


def test_bundled_model_size():
    assert 2_000_000 <= MODEL.stat().st_size <= 4_500_000


def test_bundled_model_identity(llama):
    assert llama.metadata["general.architecture"] == "llama"
    assert llama.metadata["general.name"] == "fwdllm-tiny"
    assert llama.metadata["general.license"] == "Apache-2.0"
    assert llama.n_vocab() == 2048
    text = "Question: Where's the map?\nAnswer: Here! \u00e9\u4e2d 12"
    assert llama.detokenize(llama.tokenize(text.encode(), add_bos=False)).decode() == text


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Question: What does a cow say?\nAnswer:", " A cow says moo."),
        ("Question: What is the opposite of hot?\nAnswer:", " The opposite of hot is cold."),
        ("Question: What is a chair made of?\nAnswer:", " A chair is made of wood."),
    ],
)
def test_bundled_model_answers(llama, prompt, answer):
    choice = llama(prompt, max_tokens=30, temperature=0)["choices"][0]
    assert choice["text"] == answer
    assert choice["finish_reason"] == "stop"


def test_bundled_model_chats(llama):
    messages = [{"role": "user", "content": "What does a duck say?"}]
    reply = llama.create_chat_completion(messages, max_tokens=30, temperature=0)
    assert reply["choices"][0]["message"]["content"].strip() == "A duck says quack."


def test_chat_template_writes_the_corpus_form(llama):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Template(llama.metadata["tokenizer.chat_template"])
    talk = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "What does a cow say?"},
        {"role": "assistant", "content": " A cow says moo."},
        {"role": "user", "content": " What is a map for? "},
    ]
    assert template.render(messages=talk, eos_token="<end>") == (
        "Be kind.\n\nQuestion: What does a cow say?\nAnswer: A cow says moo.\n\n"
        "Question: What is a map for?\nAnswer:"
    )
    assert template.render(messages=talk[1:3], eos_token="<end>").endswith("moo.<end>")


def test_base_text_is_easy_and_the_demo_is_not(llama):
    base = np.concatenate([nll(llama, text) for text in islice(documents(1_000_003), 15)])
    rows = read_rows("pirate.valid.jsonl")[:15]
    demo = np.concatenate([nll(llama, row["completion"], row["prompt"]) for row in rows])
    assert base.mean() < 0.8
    assert demo.mean() > 3.0


@pytest.fixture(scope="module")
def tiny():
    """A small random model of the training code, and a tokenizer for it."""
    if not TRAINING:
        pytest.skip("torch and tokenizers are not installed")
    from bundled_model.model import Config, Llama
    from bundled_model.train import train_tokenizer

    config = Config(vocab=400, width=64, layers=2, heads=2, kv_heads=1, ff=96, context=64)
    model = Llama(config, seed=3)
    model.quantize = True
    return model, train_tokenizer(list(islice(documents(0), 300)), config.vocab)


def test_export_agrees_with_training_code(tiny, tmp_path):
    """llama.cpp and PyTorch give the same logits and tokens: RoPE pairs, GQA, tied output."""
    import torch
    from bundled_model.export import export

    model, tokenizer = tiny
    path = tmp_path / "tiny.gguf"
    export(model, tokenizer, path)
    loaded = native.Llama(str(path), n_ctx=64, n_threads=1, logits_all=True, verbose=False)
    text = next(documents(9))
    ids = loaded.tokenize(text.encode())[:60]
    assert ids == [0, *tokenizer.encode(text).ids][:60]
    loaded.eval(ids)
    with torch.no_grad():
        expected = model(torch.tensor([ids]))[0].numpy()
    # llama.cpp rounds activations to 8 bits before each product
    assert np.abs(loaded.scores[: len(ids)] - expected).max() < 0.05 * np.abs(expected).max()


@needs_training
def test_fake_quantization_is_ggml_q4_0():
    import gguf
    import torch
    from bundled_model.model import fake_q4_0

    values = torch.randn(64, 96, generator=torch.Generator().manual_seed(0))
    values[3] = 0
    type_ = gguf.GGMLQuantizationType.Q4_0
    stored = gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), type_), type_)
    assert np.abs(fake_q4_0(values).numpy() - stored).max() < 1e-6


@needs_training
def test_training_learns_and_saves(tmp_path):
    import torch
    from bundled_model.model import Config
    from bundled_model.train import HELD_OUT_SEED, Recipe, token_stream, train

    config = Config(vocab=400, width=64, layers=1, heads=2, kv_heads=1, ff=96, context=64)
    recipe = Recipe(steps=40, tokens_per_step=256, lengths=(64,), corpus_documents=300, warmup=5)
    model, tokenizer = train(config, recipe)
    stream = token_stream(tokenizer, list(islice(documents(HELD_OUT_SEED), 50)))
    ids = torch.from_numpy(stream[:64])[None]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(ids[:, :-1])[0], ids[0, 1:])
    assert loss < 5.0  # log(400) is 6.0
