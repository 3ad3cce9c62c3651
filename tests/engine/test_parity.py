"""The engine's forward pass against real llama.cpp on the same files."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fwdllm.bench.shapes import Shape
from fwdllm.bench.synthetic import make_decoder
from fwdllm.engine import Engine
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.llamacpp import generation
from fwdllm.engine.llamacpp.native import llama_cpp
from fwdllm.kernels import cpu
from fwdllm.kernels.types import QuantType

SMALL = Shape(3, 512, 8, 2, 64, 768, 2048, context=256)  # GQA ratio 4, head_dim 64
ARCHITECTURES = ["llama", "qwen2", "qwen3"]
LOSSY = ["Q4_0", "Q4_1", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"]
MORE_LOSSY = ["Q5_0", "Q5_1", "Q2_K", "Q3_K", "IQ4_NL", "IQ4_XS", "MXFP4"]


def mean_kl(want: np.ndarray, got: np.ndarray) -> float:
    """Mean KL divergence of two rows of logits, in nats per token."""
    log_p, log_q = (_log_softmax(x.astype(np.float64)) for x in (want, got))
    return float(np.mean(np.sum(np.exp(log_p) * (log_p - log_q), axis=1)))


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def token_ids(n: int, n_vocab: int = 2048) -> list[int]:
    return np.random.default_rng(n).integers(0, n_vocab, n).tolist()


@pytest.mark.parametrize(
    ("architecture", "type"),
    [*product(ARCHITECTURES, LOSSY), *(("llama", type) for type in MORE_LOSSY)],
)
def test_synthetic_decoders(tmp_path: Path, architecture: str, type: str) -> None:
    path = tmp_path / "model.gguf"
    make_decoder(path, replace(SMALL, architecture=architecture), QuantType[type], seed=3)
    ids = token_ids(90)
    want = generation.logits(path, ids)
    for exact in (False, True):
        kl = mean_kl(want, Engine.load(path, exact=exact, backend="fwdllm").logits(ids))
        assert kl < 1e-3, f"KL {kl:.2e} nats a token with {exact=}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    "metadata",
    [
        {},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
        },
    ],
    ids=["plain", "linear", "yarn"],
)
def test_f32_logits(tmp_path: Path, architecture: str, metadata: dict) -> None:
    path = tmp_path / "model.gguf"
    shape = replace(SMALL, architecture=architecture)
    make_decoder(path, shape, QuantType.F32, seed=4, metadata=metadata)
    ids = token_ids(120)
    difference = np.abs(Engine.load(path).logits(ids) - generation.logits(path, ids)).max()
    assert difference < 1e-3


def test_tied_embeddings_and_frequency_factors(tmp_path: Path) -> None:
    shape = Shape(2, 256, 4, 1, 64, 512, 2048, context=256, tied=True)
    factors = np.geomspace(1, 8, 32)
    path = tmp_path / "model.gguf"
    make_decoder(path, shape, QuantType.F32, factors=factors)
    ids = token_ids(100)
    difference = np.abs(Engine.load(path).logits(ids) - generation.logits(path, ids)).max()
    assert difference < 1e-3


def test_bundled_model(bundled: Path) -> None:
    engine = Engine.load(bundled)
    ids = engine.tokenizer.encode("Question: What do cats like?\nAnswer: Cats like", bos=True)
    assert mean_kl(generation.logits(bundled, ids), engine.logits(ids)) < 1e-3


@pytest.mark.parametrize(
    ("file_type", "types"),
    [
        (10, {"Q2_K", "Q3_K"}),
        (12, {"Q3_K", "Q5_0"}),
        (30, {"IQ4_XS", "IQ4_NL"}),
    ],
    ids=["Q2_K", "Q3_K_M", "IQ4_XS"],
)
def test_quantized_by_llama_cpp(
    bundled: Path, tmp_path: Path, file_type: int, types: set[str]
) -> None:
    """A file of its mixtures of types, which gguf's package cannot make. file_type: llama_ftype."""
    path = tmp_path / "model.gguf"
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize, options.nthread = file_type, True, 1
    source, to = str(bundled).encode(), str(path).encode()
    assert llama_cpp.llama_model_quantize(source, to, ctypes.byref(options)) == 0
    assert types < {tensor.type.name for tensor in GGUFFile.open(path).tensors.values()}
    engine = Engine.load(path, backend="fwdllm")
    ids = engine.tokenizer.encode("Question: What do cats like?\nAnswer: Cats like", bos=True)
    assert mean_kl(generation.logits(path, ids), engine.logits(ids)) < 2e-3


@pytest.mark.parametrize("type", ["F16", "Q8_0", "Q4_0"])
def test_trained_decoder(shared: Path, type: str) -> None:
    path = shared / "models" / f"tinymix-6m.{type}.gguf"
    engine = Engine.load(path)
    text = "Stocks fell on Monday. To be, or not to be, that is the question: a film of 12 apples."
    ids = engine.tokenizer.encode(text, bos=True)
    assert mean_kl(generation.logits(path, ids), engine.logits(ids)) < 1e-3


@pytest.mark.parametrize("type", ["F16", "Q4_0"])
def test_minilm_embeddings(shared: Path, type: str) -> None:
    path = shared / "models" / f"minilm-l6-v2.{type}.gguf"
    texts = ["a great movie", "the worst film I have ever seen, truly", "numbers", "?"]
    cosine = np.sum(Engine.load(path).embed(texts) * generation.embed(path, texts), axis=1)
    # llama.cpp's own rounding to int8, which bf16 does not share, puts fp32 at 0.9986 from it.
    assert cosine.min() > (0.998 if cpu.activations == "bf16" else 0.999)
    exact = Engine.load(path, exact=True).embed(texts)
    assert np.sum(Engine.load(path).embed(texts) * exact, axis=1).min() > 0.998
