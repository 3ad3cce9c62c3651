"""SmolLM2-135M-Instruct, a real model: losses, derivatives, tokens, adapters and all that is run.

FWDLLM_TEST_ROWS says on how many rows of GSM8K losses are compared, if not on eight. On 64 they
were 0.20% from those of llama.cpp, and 1.2e-5 from those of PyTorch with exact arithmetic.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import jinja2.sandbox
import numpy as np
import pytest
from cli_runs import make_cli, start_cli, write_rows
from gguf import GGUFReader
from real_models import llama_cpp_loss, smollm2

import fwdllm
from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.llamacpp.native import Llama, llama_cpp
from fwdllm.kernels import reference
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import StepResult

__all__ = ["smollm2"]  # a fixture

N_ROWS = int(os.environ.get("FWDLLM_TEST_ROWS", "8"))
MAX_TOKENS = 192
SEEDS = np.arange(8, dtype=np.uint64) + 1000
LINEAR = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
TEXTS = [
    "The cat sat on the mat, and the dog ran to the barn.",
    "We sail at dawn, when the wind is fair and the sea is calm.",
    "A cup of tea a day keeps the old captain awake at night.",
    "The sun is up and the market is full of fish and bread.",
    "Rain fell all day long on the green hills of the island.",
]
QUESTION, ANSWER = "Name the capital of France.", "Paris"


@pytest.fixture(scope="module")
def rows(shared: Path) -> list[Example]:
    return read_jsonl(shared / "data" / "gsm8k.valid.jsonl")[:N_ROWS]


@pytest.fixture(scope="module")
def engine(smollm2: Path) -> Engine:
    return Engine.load(smollm2)


@pytest.fixture(scope="module")
def exact(smollm2: Path) -> Engine:
    """fp32 arithmetic and an adapter as in mid-training."""
    return half_trained(Engine.load(smollm2, LoRAConfig(), exact=True))


# Numbers


def test_the_loss_is_llama_cpps(engine: Engine, rows: list[Example]) -> None:
    got = engine.evaluate(rows, MAX_TOKENS).loss
    want = llama_cpp_loss(engine, rows, MAX_TOKENS)
    print(f"{len(rows)} rows: {got:.6f} here, {want:.6f} in llama.cpp, {got / want - 1:+.2e}")
    assert got == pytest.approx(want, rel=5e-3)


def test_exact_arithmetic_is_pytorchs(exact: Engine, rows: list[Example]) -> None:
    torch = pytest.importorskip("torch")
    from torch_model import TorchModel

    model = TorchModel(exact, torch.float32)
    total, count = 0.0, 0
    n_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)  # for the same reason as in ``llama_cpp_loss``
        with torch.no_grad():
            theta = model.theta()
            for example in rows:
                batch = exact.encode([example], MAX_TOKENS)
                total += float(model.loss(theta, batch)) * len(batch.label_ids)
                count += len(batch.label_ids)
    finally:
        torch.set_num_threads(n_threads)
    got, want = exact.evaluate(rows, MAX_TOKENS).loss, total / count
    print(f"{len(rows)} rows: {got:.6f} here, {want:.6f} in PyTorch, {got / want - 1:+.2e}")
    assert got == pytest.approx(want, rel=1e-4)


def test_derivatives_are_autograds(exact: Engine) -> None:
    pytest.importorskip("torch")
    from torch_model import TorchModel, gradient

    batch = exact.encode([Example(text=text) for text in TEXTS[:2]])
    slopes = gradient(TorchModel(exact), batch).astype(np.float32)
    want = reference.seeded_dot(slopes, SEEDS)
    got = exact.directional_derivatives(batch, SEEDS, method="forward-ad").derivative
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    print(f"relative error of {len(SEEDS)} derivatives: {error:.2e}")
    assert error < 1e-4


# Tokens and the chat template

HOSTILE = [
    "The quick brown fox jumps over the lazy dog.",
    "def f(x: int) -> int:\n    return x**2 % 7  # comment\n\n\tif x != 0 and not y:\n\t\tpass",
    "Smile 😀👩‍👩‍👧‍👦🏳️‍🌈 and naïve café Ångström z̈",
    "日本語のテキスト、中文字符，한국어 텍스트。",
    "0 12 345 6789 3.14159 1,000,000 ½ ² Ⅷ ٣٤ x1y2z3",
    " leading", "trailing ", "  two  and   three    spaces  ", "    ", " ", "",
    "\n", "\n\n\n", "a\n\n  b\r\n\tc \n d", "tab\t\tend\t",
    "I'm you're he'll we've they'd it's I'M YOU'RE can't 'tis '90s",
    "<|im_start|>user\nHi<|im_end|>\n<|endoftext|>", "<|im_start|", " <|im_end|> <repo_name>x",
    "\u00a0no-break\u2003em\u200bzero\ufeffbom", "a\0b\x7f\x1b[0m", "https://a.example/b?c=1&d=%20#e",
    "{{ messages }} {% raw %}", "x" * 300, "ÀÉÎõü ß ſ İ ı", "العربية עברית हिन्दी ไทย",
]  # fmt: skip


@pytest.fixture(scope="module")
def fields(smollm2: Path) -> dict[str, Any]:
    """What the file says of its tokens, read by the gguf package."""
    reader = GGUFReader(smollm2)
    names = ("ggml.tokens", "ggml.merges", "ggml.token_type")
    found = {name: reader.fields[f"tokenizer.{name}"].contents() for name in names}
    return {**found, "template": reader.fields["tokenizer.chat_template"].contents()}


@pytest.fixture(scope="module")
def peers(fields: dict[str, Any]) -> dict[bool, Any]:
    """Tokenizers by Hugging Face; True: to which names of special tokens are those tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokens = fields["ggml.tokens"]
    special = [
        tokenizers.AddedToken(token, special=True, normalized=False)
        for token, type in zip(tokens, fields["ggml.token_type"], strict=True)
        if type == llama_cpp.LLAMA_TOKEN_TYPE_CONTROL
    ]
    assert len(special) > 3
    found = {}
    for with_special in (False, True):
        peer = tokenizers.Tokenizer(
            tokenizers.models.BPE(
                {token: i for i, token in enumerate(tokens)},
                [tuple(merge.split(" ")) for merge in fields["ggml.merges"]],
            )
        )
        peer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
            [
                tokenizers.pre_tokenizers.Digits(individual_digits=True),
                tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        if with_special:
            peer.add_special_tokens(special)
            assert peer.get_vocab_size() == len(tokens)
        found[with_special] = peer
    return found


@pytest.mark.parametrize("special", [False, True])
def test_tokens_are_hugging_faces(engine: Engine, peers: dict[bool, Any], special: bool) -> None:
    for text in HOSTILE:
        want = peers[special].encode(text, add_special_tokens=False).ids
        assert engine.tokenizer.encode(text, bos=True, special=special) == want, repr(text)
        if not special:
            assert engine.tokenizer.decode(want) == text


CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi  there\n"}],
    [
        {"role": "user", "content": "What is 2+2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And 😀 {{ 3 }} {% if x %}?"},
    ],
    [{"role": "assistant", "content": ""}, {"role": "user", "content": " \n<|im_end|> 'q' & <b>"}],
]


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_the_template_is_the_files(
    engine: Engine,
    fields: dict[str, Any],
    peers: dict[bool, Any],
    messages: list[dict[str, str]],
    generate: bool,
) -> None:
    # As transformers renders templates.
    jinja = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = jinja.from_string(fields["template"])
    want = template.render(messages=messages, add_generation_prompt=generate)
    assert engine.tokenizer.chat.render(messages, generate) == want
    ids = peers[True].encode(want, add_special_tokens=False).ids
    if generate:
        assert engine.tokenizer.encode_chat(messages) == ids


def test_a_conversation_in_full(engine: Engine) -> None:
    messages = [*CONVERSATIONS[1], {"role": "assistant", "content": "Hello!"}]
    assert engine.tokenizer.chat.render(messages, add_generation_prompt=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHi  there\n<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
    )
    assert engine.tokenizer.chat.render(CONVERSATIONS[0], add_generation_prompt=True) == (
        "<|im_start|>system\n"
        "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# Adapters


def test_an_adapter_goes_both_ways(
    engine: Engine, smollm2: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp has our loss with it, and a PEFT folder gives the same file again."""
    adapter = Engine.load(smollm2, LoRAConfig(rank=2, alpha=3, targets=LINEAR)).adapter
    assert adapter is not None
    rng = np.random.default_rng(3)
    for target in adapter.targets:
        b = adapter.factors(target).b
        b[:] = 0.3 * rng.standard_normal(b.shape)
    path = tmp_path / "a.gguf"
    save_gguf(adapter, path)
    examples = [Example(text=text) for text in TEXTS]
    loaded = Engine.load(smollm2, adapter=path)
    got, plain = loaded.evaluate(examples).loss, engine.evaluate(examples).loss
    want = llama_cpp_loss(engine, examples, adapter=path)
    print(f"plain {plain:.6f}, {got:.6f} here, {want:.6f} in llama.cpp, {got / want - 1:+.2e}")
    assert abs(got - plain) > 0.05 * plain
    assert got == pytest.approx(want, rel=5e-3)
    run = make_cli(capfd)
    peft, back = tmp_path / "peft", tmp_path / "b.gguf"
    assert run("export", path, f"{peft}/", "--model", smollm2).code == 0
    config = json.loads((peft / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 3)
    assert run("export", peft, back, "--model", smollm2).code == 0
    assert back.read_bytes() == path.read_bytes()
    assert loaded.adapter is not None
    np.testing.assert_array_equal(loaded.adapter.theta, adapter.theta)


# Tuning


@pytest.mark.parametrize("method", ["backprop", "forward-ad", "central"])
def test_tune(engine: Engine, smollm2: Path, tmp_path: Path, method: str) -> None:
    """All else is the default; the adapter has the loss that is reported, in llama.cpp too."""
    data = write_rows(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    assert fwdllm.recipe(smollm2, data).train.method == "backprop"
    losses: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, StepResult):
            losses.append(event.loss)

    train = TrainConfig(steps=2, method=method)
    output = tmp_path / "a.gguf"
    result = fwdllm.tune(smollm2, data, output, train=train, eval_data=data, on_event=note)
    assert (result.steps, len(losses), result.adapter) == (2, 2, output)
    assert all(map(math.isfinite, losses))
    # Of each layer n_in and n_out of q, then of v, which three heads of q share.
    assert result.n_trainable == 30 * 8 * (576 + 576 + 576 + 192)
    examples = read_jsonl(data)
    # A step's loss is that of the adapter before it, which begins as no change; the method
    # decides which activations are rounded to int8.
    assert losses[0] == pytest.approx(result.loss_before, rel=5e-3)
    assert result.loss_before == pytest.approx(engine.evaluate(examples).loss, abs=1e-6)
    assert result.loss_after != result.loss_before
    evaluation = fwdllm.evaluate(smollm2, data, adapter=output)
    assert evaluation.loss == pytest.approx(result.loss_after, abs=1e-6)
    want = llama_cpp_loss(engine, examples, adapter=output)
    after = result.loss_after
    print(
        f"{method}: {result.loss_before:.6f} to {after:.6f}, {after / want - 1:+.2e} of llama.cpp"
    )
    assert after == pytest.approx(want, rel=5e-3)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("method", ["backprop", "forward-ad"])
def test_a_memory_budget_holds(smollm2: Path, tmp_path: Path, method: str) -> None:
    data = write_rows(tmp_path / "data.jsonl", [{"text": text} for text in TEXTS])
    budget = 190 * 2**20

    def run(name: str, *options: object) -> tuple[int, bytes]:
        output = tmp_path / f"{name}.gguf"
        settings = ("--steps", 1, "--method", method, "--held-out", 1, "--json")
        process = start_cli(["tune", smollm2, data, "-o", output, *settings, *options])
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        return json.loads(out)["peak_rss_bytes"], output.read_bytes()

    (within, one), (free, other) = run("a", "--memory-budget", budget), run("b")
    print(
        f"peak {within / 2**20:.0f} MiB with a budget of {budget >> 20}, {free / 2**20:.0f} without"
    )
    assert within <= budget < free
    assert one == other


# Text


def generated(model: Path, max_tokens: int = 12) -> str:
    pieces = generation.generate(model, QUESTION, max_tokens=max_tokens, chat=True, n_threads=1)
    return "".join(pieces)


def test_generate_answers(smollm2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    answer = generated(smollm2)
    assert ANSWER in answer
    found = make_cli(capfd)("generate", smollm2, QUESTION, "--chat", "--max-tokens", 12, "--json")
    assert (found.code, found.json["text"]) == (0, answer)
    peer = Llama(str(smollm2), n_ctx=128, n_threads=1, n_threads_batch=1, verbose=False)
    messages = [{"role": "user", "content": QUESTION}]
    chat = peer.create_chat_completion(messages, max_tokens=12, temperature=0)
    assert chat["choices"][0]["message"]["content"] == answer


def test_serve_answers(smollm2: Path, tmp_path: Path) -> None:
    openai = pytest.importorskip("openai")
    from serving import Server

    with (
        Server(tmp_path / "state", model=smollm2) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        assert [model.id for model in client.models.list()] == [smollm2.stem]
        messages = [{"role": "user", "content": QUESTION}]
        chat = client.chat.completions.create(
            model=smollm2.stem, messages=messages, temperature=0, max_tokens=12
        )
        assert chat.choices[0].message.content == generated(smollm2)
        found = client.embeddings.create(
            model=smollm2.stem, input=TEXTS[:2], encoding_format="float"
        )
        vectors = np.array([item.embedding for item in found.data])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    # The server keeps keys and values in half precision.
    want = generation.embed(smollm2, TEXTS[:2], n_threads=1)
    assert np.sum(vectors * want, axis=1).min() > 0.999
