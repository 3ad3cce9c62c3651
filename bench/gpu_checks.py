"""Checks of the kernels on this GPU against the reference, and of a small model's derivatives.

The tests compare every operation with the reference under Triton's interpreter. This does the same
for the compiled kernels, in a few seconds, on machines where the tests cannot run.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from fwdllm.bench.gpu_kernels import pairs, tangents
from fwdllm.bench.gpu_step import StepModel, random_batch, slopes
from fwdllm.bench.shapes import Shape, random_weights
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import reference
from fwdllm.kernels import triton as ops
from fwdllm.kernels.types import SUPPORTED_TYPES, Lanes, LoRA, QuantType, Weight


def check(small: bool) -> dict[str, Any]:
    """ "found" and "wanted" of each check, and whether it "holds"."""
    found: dict[str, Any] = {}
    for name, error, most in (*_stream(small), *_operations(small)):
        found[name] = {"found": float(error), "wanted": f"at most {most:g}", "holds": error <= most}
    for name, correlation, least in _models(small):
        holds = correlation >= least
        found[name] = {"found": correlation, "wanted": f"at least {least:g}", "holds": bool(holds)}
    return found


def _stream(small: bool) -> Iterator[tuple[str, float, float]]:
    n = 1 << (12 if small else 20)
    words = ops.philox(2**63 + 5, 2**33, 1000) != reference.philox(2**63 + 5, 2**33, 1000)
    yield "philox, words that differ", int(words.sum()), 0
    error = np.abs(ops.normal(2024, 3, n) - reference.normal(2024, 3, n)).max()
    yield f"{n:,} normals", float(error), 1e-6


def _operations(small: bool) -> Iterator[tuple[str, float, float]]:
    rng = np.random.default_rng(0)

    def random(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    n_in, n_out = (256, 40) if small else (2304, 300)
    for type in SUPPORTED_TYPES:
        weight = Weight(random_weights(rng, type, n_out, n_in, n_in**-0.5), type, n_out, n_in)
        wrong = ops.dequantize(weight) != reference.dequantize(weight)
        yield f"decode {type.name}, elements that differ", int(wrong.sum()), 0
        # Row counts below and above the one where ``matmul`` changes its route.
        for rows in (12,) if small else (1, 40, 600):
            x = random(rows, n_in)
            want = reference.matmul(x, weight)
            yield f"matmul {type.name} {rows} rows", _error(ops.matmul(x, weight), want), 0.004
        exact = ops.matmul(x[:12], weight, exact=True)
        yield f"exact matmul {type.name}", _error(exact, reference.matmul(x[:12], weight)), 1e-6
    lora = LoRA(random(8, n_in), random(n_out, 8), 0.7, 64)
    odd = LoRA(random(3, n_in), random(n_out, 3), 0.7, 7)
    for name, lanes, factors in (
        ("lanes", pairs(4), lora),
        ("tangents", tangents(4), lora),
        ("lanes of rank 3", pairs(4), odd),
        ("tangents of rank 3", tangents(4), odd),
    ):
        x = random(28, n_in)
        want = reference.matmul(x, weight, lora=factors, lanes=lanes)
        got = ops.matmul(x, weight, lora=factors, lanes=lanes, exact=True)
        yield f"seeded LoRA, {name}", _error(got, want), 1e-5
    yield from _layers(random, rng)
    yield from _cotangents(random, rng, 12 if small else 600)


def _layers(random: Any, rng: np.random.Generator) -> Iterator[tuple[str, float, float]]:
    t, d, starts = 2, 96, np.cumsum([0, *[37, 12] * 3]).astype(np.int32)
    x, y = random(147, d), random(147, d)
    gain, bias = random(d), random(d)
    output = Weight(random_weights(rng, QuantType.F32, 5000, d, 0.1), QuantType.F32, 5000, d)
    labels = np.tile(rng.integers(0, 5000, 49).astype(np.int32), 3)
    heads = {"head_dim": 32, "scale": 0.2, "tangents": t}
    narrow = y[:, :32].copy()
    table = random(64, 16)
    positions = (np.arange(147) % 49).astype(np.int32)
    calls: dict[str, Any] = {
        "rms_norm": lambda o: o.rms_norm(x, gain, 1e-2, t),
        "layer_norm": lambda o: o.layer_norm(x, gain, bias, 1e-2, t),
        "swiglu": lambda o: o.swiglu(x, y, t),
        "geglu": lambda o: o.geglu(x, y, t),
        "gelu": lambda o: o.gelu(x, t),
        "rope": lambda o: o.rope(x, positions, table, table, 32, True),
        "attention": lambda o: o.attention(x, narrow, narrow, starts, causal=True, **heads),
        "attention in windows": lambda o: o.attention(
            x, narrow, narrow, starts, causal=True, window=9, softcap=1.0, **heads
        ),
        "attention both ways": lambda o: o.attention(x, y, y, starts, causal=False, **heads),
        "attention both ways in windows": lambda o: o.attention(
            x, y, y, starts, causal=False, window=9, **heads
        ),
        "cross_entropy": partial(_cross_entropy, x, output, labels, tangents(3), 0.0),
        "cross_entropy below a cap": partial(_cross_entropy, x, output, labels, tangents(3), 2.0),
    }
    for name, call in calls.items():
        yield f"{name}, with tangents", _error(call(ops), call(reference)), 1e-5


def _cotangents(
    random: Any, rng: np.random.Generator, rows: int
) -> Iterator[tuple[str, float, float]]:
    d, n_out, starts = 96, 320, np.array([0, 5, rows], np.int32)
    x, y, dy = random(rows, d), random(rows, d), random(rows, d)
    gain, narrow, of_output = random(d), random(rows, 32), random(rows, n_out)
    weight = Weight(random_weights(rng, QuantType.Q8_0, n_out, d, 0.1), QuantType.Q8_0, n_out, d)
    lora = LoRA(random(3, d), random(n_out, 3), 0.7, 0)
    labels = rng.integers(0, n_out, rows).astype(np.int32)
    heads = {"head_dim": 32, "scale": 0.2, "causal": True}

    def of_factors(o: Any) -> list[np.ndarray]:
        found = [np.zeros_like(lora.a), np.zeros_like(lora.b)]
        o.lora_vjp(x, of_output, lora, *found)
        return found

    calls: dict[str, Any] = {
        "rms_norm": lambda o: [o.rms_norm_vjp(x, gain, 1e-2, dy)],
        "layer_norm": lambda o: [o.layer_norm_vjp(x, gain, 1e-2, dy)],
        "swiglu": lambda o: o.swiglu_vjp(x, y, dy),
        "geglu": lambda o: o.geglu_vjp(x, y, dy),
        "gelu": lambda o: [o.gelu_vjp(x, dy)],
        "attention": lambda o: o.attention_vjp(x, narrow, narrow, starts, dy, **heads),
        "attention in windows": lambda o: o.attention_vjp(
            x, narrow, narrow, starts, dy, window=9, softcap=1.0, **heads
        ),
        "attention both ways in windows": lambda o: o.attention_vjp(
            x, narrow, narrow, starts, dy, window=9, **{**heads, "causal": False}
        ),
        "matmul": lambda o: [o.matmul_vjp(of_output, weight, lora=lora, exact=True)],
        "LoRA": of_factors,
        "cross_entropy": lambda o: o.cross_entropy_vjp(x, weight, labels, exact=True),
        "cross_entropy below a cap": lambda o: o.cross_entropy_vjp(
            x, weight, labels, softcap=2.0, exact=True
        ),
    }
    for name, call in calls.items():
        pairs = zip(call(ops), call(reference), strict=True)
        yield f"{name}, back", max(_error(got, want) for got, want in pairs), 1e-5
    got, want = (o.matmul_vjp(of_output, weight) for o in (ops, reference))
    yield f"matmul, back, {rows} rows", _error(got, want), 0.004


def _cross_entropy(
    x: np.ndarray, output: Weight, labels: np.ndarray, lanes: Lanes, softcap: float, o: Any
) -> Any:
    return o.cross_entropy(x, output, labels, lanes=lanes, softcap=softcap, exact=True)


def _models(small: bool) -> Iterator[tuple[str, float, float]]:
    """Correlation of a small model's derivatives with bfloat16 and with float32 matmuls."""
    shape = Shape(1, 64, 2, 1, 32, 64, 128) if small else Shape(4, 512, 8, 4, 64, 1024, 4096)
    model = StepModel.make(shape, QuantType.Q4_0, LoRAConfig(rank=4))
    _, batch = random_batch(shape.n_vocab, 2, 5 if small else 50)
    seeds = np.arange(3 if small else 32, dtype=np.uint64)
    _, want = slopes(model, batch, seeds, "forward-ad", exact=True)
    for method in ("forward-ad",) if small else ("forward-ad", "central"):
        _, got = slopes(model, batch, seeds, method)
        yield f"slopes by {method}, correlation", float(np.corrcoef(got, want)[0, 1]), 0.9995
    want, got = (model.graph(exact).token_gradient(batch)[1] for exact in (True, False))
    yield "gradients, correlation", float(np.corrcoef(got, want)[0, 1]), 0.9995


def _error(got: Any, want: np.ndarray) -> float:
    """Relative error in the Frobenius norm."""
    return float(np.linalg.norm(ops.host(got) - want) / (np.linalg.norm(want) + 1e-30))
