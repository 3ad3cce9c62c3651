"""Gemma 3 270M, a real model, by our graph and by llama.cpp, from its file to an adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_runs import make_cli, write_rows
from real_models import gemma3, llama_cpp_loss

import fwdllm
from fwdllm.bench.inputs import half_trained
from fwdllm.engine import Engine, Example, LoRAConfig
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.llamacpp.losses import negative_log_likelihood
from fwdllm.engine.llamacpp.native import Llama
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import StepResult

__all__ = ["gemma3"]  # a fixture

EXAMPLES = [
    Example(prompt="Question: What is 2+3?\nAnswer:", completion=" 2 and 3 are 5."),
    Example(prompt="Question: Who says moo?\nAnswer:", completion=" A cow says moo."),
    Example(prompt="Question: Where is Paris?\nAnswer:", completion=" Paris is in France."),
    Example(prompt="Question: What is snow?\nAnswer:", completion=" Snow is frozen water."),
]
TEXTS = [
    "Hello world",
    "  two  and   three    spaces  ",
    "naïve café 😀👩‍👩‍👧 z̈",
    "日本語、中文，한국어 العربية",
    "0 12 345 6789 3.14 1,000,000 ½",
    "\n\n\ta\r\n  b\n",
    "<bos><eos><start_of_turn>user",
    "I'm you're <b>x</b> don't",
    "a\0b\x7f",
    "x" * 300,
    "",
]
# Losses of a few tokens move by 1.6% in llama.cpp alone when it keeps keys and values in fp32
# instead of fp16: it rounds activations to int8, and this model has large ones.
NOISE = 0.03


TEXT = """The village lies where two rivers meet, an hour's walk below the pass. In spring the
meadows are under water for a week or two, and the children go to school by boat. Most houses are
built of stone and have a cellar for cheese; the oldest stands beside the bridge and was an inn
until the railway came. People still tell how the first train stopped there because of a cow, and
how the driver had to wait until her owner was found in the church."""
SEEDS = np.arange(6, dtype=np.uint64) + 1000


@pytest.fixture(scope="module")
def engine(gemma3: Path) -> Engine:
    """By llama.cpp."""
    return Engine.load(gemma3, backend="llama.cpp")


def peer_losses(model: Path, examples: list[Example], engine: Engine, **options: Any) -> np.ndarray:
    """The loss of every label token by llama-cpp-python's own class, all as it is by default."""
    peer = Llama(
        str(model),
        n_ctx=64,
        logits_all=True,
        n_threads=1,
        n_threads_batch=1,
        verbose=False,
        **options,
    )
    found = []
    for example in examples:
        batch = engine.encode([example])
        peer.reset()
        peer.eval(batch.ids.tolist())
        logits = np.array(peer.scores)[batch.label_rows]
        found.append(negative_log_likelihood(logits, batch.label_ids))
    return np.concatenate(found)


def test_our_graph_computes_it(gemma3: Path, capfd: pytest.CaptureFixture[str]) -> None:
    report = make_cli(capfd)("inspect", gemma3, "--json").json
    assert (report["architecture"], report["backend"]) == ("gemma3", "fwdllm")
    assert report["reason"] is None
    assert {"Q8_0", "Q5_0", "Q4_K", "Q6_K"} <= {entry["type"] for entry in report["tensor_types"]}


def test_the_loss_of_our_graph(engine: Engine, gemma3: Path) -> None:
    """llama.cpp's own rounding puts it at 0.2 to 0.5% from exact arithmetic, ours at 0.05%."""
    text = [Example(text=TEXT)]
    own, exact = Engine.load(gemma3), Engine.load(gemma3, exact=True)
    assert own.args.windows == (512, 512, 512, 512, 512, 0) * 3
    got, want = own.evaluate(text).loss, exact.evaluate(text).loss
    peer = llama_cpp_loss(engine, text)
    print(f"{got:.6f}, exact {want:.6f}, llama.cpp {peer:.6f}")
    assert got == pytest.approx(want, rel=5e-3)
    assert want == pytest.approx(peer, rel=0.01)


def test_slopes_of_our_graph(gemma3: Path) -> None:
    config = LoRAConfig(4, targets=("attn_q", "attn_v"))
    exact = half_trained(Engine.load(gemma3, config, exact=True))
    batch = exact.encode(EXAMPLES[:1])
    found = {
        method: exact.directional_derivatives(batch, SEEDS, method).derivative
        for method in ("backprop", "forward-ad", "central")
    }
    want = found["forward-ad"]
    for method, most in (("backprop", 1e-4), ("central", 0.01)):
        assert np.linalg.norm(found[method] - want) < most * np.linalg.norm(want), method
    own = half_trained(Engine.load(gemma3, config))
    got = own.directional_derivatives(batch, SEEDS, "forward-ad").derivative
    assert np.linalg.norm(got - want) < 0.05 * np.linalg.norm(want)


def test_the_loss_is_llama_cpps(engine: Engine, gemma3: Path) -> None:
    losses = engine.graph.token_losses(engine.encode(EXAMPLES))[0]
    # All at once as one by one; by default llama.cpp keeps keys in fp16, too.
    np.testing.assert_allclose(losses, peer_losses(gemma3, EXAMPLES, engine), atol=1e-4)
    got, want = engine.evaluate(EXAMPLES).loss, llama_cpp_loss(engine, EXAMPLES)
    assert got == pytest.approx(losses.mean(), rel=1e-9)
    print(f"{got:.6f} here, {want:.6f} in llama.cpp with fp32 keys, {got / want - 1:+.2e}")
    assert got == pytest.approx(want, rel=NOISE)


def test_tune(engine: Engine, gemma3: Path, tmp_path: Path) -> None:
    """The adapter has the loss that is reported, in plain llama.cpp too."""
    rows = [{"prompt": e.prompt, "completion": e.completion} for e in EXAMPLES]
    data, output = write_rows(tmp_path / "data.jsonl", rows), tmp_path / "adapter.gguf"
    assert fwdllm.recipe(gemma3, data).train.method == "backprop"
    lora, _ = fwdllm.recipe(gemma3, data, "central", backend="llama.cpp")
    train = TrainConfig(steps=3, perturbations=2, method="central", learning_rate=1e-2)
    options = {"lora": lora, "train": train, "eval_data": data, "backend": "llama.cpp"}
    losses: list[float] = []

    def note(event: Any) -> None:
        if isinstance(event, StepResult):
            losses.append(event.loss)

    result = fwdllm.tune(gemma3, data, output, **options, on_event=note)
    assert len(losses) == result.steps == 3
    assert np.isfinite(losses).all()
    assert result.n_trainable == 18 * 8 * (640 + 1024 + 640 + 256)
    assert result.loss_before == pytest.approx(engine.evaluate(EXAMPLES).loss, abs=1e-6)
    assert abs(result.loss_after - result.loss_before) > 1.5 * NOISE * result.loss_before
    evaluation = fwdllm.evaluate(gemma3, data, adapter=output, backend="llama.cpp")
    assert evaluation.loss == pytest.approx(result.loss_after, abs=1e-6)
    peer = peer_losses(gemma3, EXAMPLES, engine, lora_path=str(output)).mean()
    want = llama_cpp_loss(engine, EXAMPLES, adapter=output)
    print(f"{result.loss_before:.6f} to {result.loss_after:.6f}")
    print(f"llama.cpp: {peer:.6f}, {want:.6f} with fp32 keys")
    assert result.loss_after == pytest.approx(peer, rel=NOISE)
    assert result.loss_after == pytest.approx(want, rel=NOISE)
    assert fwdllm.evaluate(gemma3, data, adapter=output).loss == pytest.approx(want, rel=NOISE)


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_text_comes_back(engine: Engine, text: str) -> None:
    tokenizer = engine.tokenizer
    ids = tokenizer.encode(text, bos=True)
    assert ids[0] == tokenizer.bos == 2
    assert tokenizer.decode(ids) == text
    assert not {0, 1, 2}.intersection(ids[1:])  # names of special tokens are text
    assert b"".join(map(tokenizer.piece, ids)).decode() == text


def test_special_tokens_have_names(engine: Engine) -> None:
    assert engine.tokenizer.n_vocab == 262_144
    assert engine.tokenizer.encode("<eos>", bos=True, special=True) == [2, 1]
    assert engine.tokenizer.decode([2, 1], special=True) == "<bos><eos>"


def test_generate_goes_on(gemma3: Path, capfd: pytest.CaptureFixture[str]) -> None:
    prompt = "1, 2, 3, 4,"
    text = "".join(generation.generate(gemma3, prompt, max_tokens=8, n_threads=1))
    assert text.startswith(" 5, 6, 7")
    found = make_cli(capfd)("generate", gemma3, prompt, "--max-tokens", 8, "--json")
    assert (found.code, found.json["text"]) == (0, text)
