"""The C++ kernels against the NumPy reference, on random shapes, for every instruction set here.

Each test body runs in the instruction set this process was started with; `make test` runs the
suite once and `test_every_isa` repeats this file and OTHERS for each of the others.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import every_scale_of_mxfp4, random_weight

from fwdllm.kernels import cpu, reference
from fwdllm.kernels.types import SUPPORTED_TYPES, Lanes, LoRA, QuantType

OTHERS = [
    Path(__file__).with_name(name)
    for name in ("test_attention.py", "test_tangents.py", "test_vjps.py")
]
QUANTIZED = [t for t in SUPPORTED_TYPES if t not in (QuantType.F32, QuantType.F16, QuantType.BF16)]
types = pytest.mark.parametrize("type", SUPPORTED_TYPES, ids=lambda t: t.name)
distributions = pytest.mark.parametrize("distribution", ["normal", "rademacher"])


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / (np.linalg.norm(want) + 1e-30))


def random_lanes(rng: np.random.Generator, n: int, distribution: str = "normal") -> Lanes:
    """Pairs of +c, -c under one seed, and plain lanes, as estimators make them."""
    seeds = np.repeat(rng.integers(0, 2**64, n, np.uint64), 2)[:n]
    coefficients = rng.choice([0.0, 0.01, -0.01, 0.5], n).astype(np.float32)
    return Lanes(seeds, coefficients, distribution)


def random_lora(rng: np.random.Generator, n_in: int, n_out: int, rank: int) -> LoRA:
    a = rng.normal(size=(rank, n_in)).astype(np.float32)
    b = rng.normal(size=(n_out, rank)).astype(np.float32)
    return LoRA(a, b, scale=0.7, offset=int(rng.integers(0, 1 << 35)))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 2**40), st.integers(0, 300))
def test_stream_is_the_reference_stream(seed: int, start: int, count: int) -> None:
    np.testing.assert_array_equal(
        cpu.philox(seed, start, count), reference.philox(seed, start, count)
    )
    np.testing.assert_array_equal(
        cpu.rademacher(seed, start, count), reference.rademacher(seed, start, count)
    )
    np.testing.assert_allclose(
        cpu.normal(seed, start, count), reference.normal(seed, start, count), rtol=0, atol=1e-6
    )


def test_normal_agrees_over_a_million() -> None:
    np.testing.assert_allclose(
        cpu.normal(2024, 3, 1 << 20), reference.normal(2024, 3, 1 << 20), rtol=0, atol=1e-6
    )


@distributions
@pytest.mark.parametrize("n", [1, 63, 1024, 40_001])
def test_seeded_axpy_and_dot(n: int, distribution: str) -> None:
    rng = np.random.default_rng(n)
    seeds = rng.integers(0, 2**64, 5, np.uint64)
    coefficients = rng.normal(size=5).astype(np.float32)
    theta = rng.normal(size=n).astype(np.float32)
    want, got = theta.copy(), theta.copy()
    reference.seeded_axpy(want, seeds, coefficients, offset=7, distribution=distribution)
    cpu.seeded_axpy(got, seeds, coefficients, offset=7, distribution=distribution)
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(
        cpu.seeded_dot(theta, seeds, offset=7, distribution=distribution),
        reference.seeded_dot(theta, seeds, offset=7, distribution=distribution),
        atol=1e-4 * np.sqrt(n),
    )


@types
def test_decoding_is_exact(type: QuantType) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, type, n_out=37, n_in=512)
    np.testing.assert_array_equal(cpu.dequantize(weight), reference.dequantize(weight))
    ids = rng.integers(0, 37, 11).astype(np.int32)
    np.testing.assert_array_equal(cpu.embedding(weight, ids), reference.embedding(weight, ids))


def test_every_scale_of_mxfp4() -> None:
    weight = every_scale_of_mxfp4()
    np.testing.assert_array_equal(cpu.dequantize(weight), reference.dequantize(weight))


@types
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out"), [(1, 256, 40), (13, 512, 33), (50, 1280, 100), (7, 2304, 300)]
)
def test_matmul(type: QuantType, rows: int, n_in: int, n_out: int) -> None:
    rng = np.random.default_rng(rows)
    weight = random_weight(rng, type, n_out, n_in)
    x = rng.normal(size=(rows, n_in)).astype(np.float32)
    bias = rng.normal(size=n_out).astype(np.float32)
    want = reference.matmul(x, weight, bias=bias)
    assert relative_error(cpu.matmul(x, weight, bias=bias, exact=True), want) < 1e-6
    # int8 activations: rounding noise of about 0.5% of the activations
    assert relative_error(cpu.matmul(x, weight, bias=bias), want) < 0.012


@pytest.mark.parametrize("type", [QuantType.F32, QuantType.F16, QuantType.BF16])
@settings(max_examples=10, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 90))
def test_matmul_of_odd_shapes(type: QuantType, rows: int, n_in: int, n_out: int) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, type, n_out, n_in)
    x = rng.normal(size=(rows, n_in)).astype(np.float32)
    want = reference.matmul(x, weight)
    assert relative_error(cpu.matmul(x, weight, exact=True), want) < 1e-6
    rounded = cpu.activations == "bf16" and type == QuantType.BF16  # bf16 keeps 8 bits
    assert relative_error(cpu.matmul(x, weight), want) < (2**-8 if rounded else 1e-6)


@pytest.mark.skipif(cpu.activations == "bf16", reason="its activations are bf16")
@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_int8_route_is_exact_on_representable_activations(type: QuantType) -> None:
    rng = np.random.default_rng(5)
    weight = random_weight(rng, type, 48, 512)
    x = rng.integers(-127, 128, size=(9, 512)).astype(np.float32)
    x[:, ::32] = 127  # each group's scale becomes 1
    assert relative_error(cpu.matmul(x, weight), reference.matmul(x, weight)) < 1e-6


@distributions
@settings(max_examples=25, deadline=None)
@given(
    n_lanes=st.integers(1, 6),
    rows=st.integers(1, 11),
    n_in=st.integers(1, 330),
    n_out=st.integers(1, 150),
    rank=st.integers(1, 9),
)
def test_seeded_lora(
    distribution: str, n_lanes: int, rows: int, n_in: int, n_out: int, rank: int
) -> None:
    rng = np.random.default_rng(n_in)
    weight = random_weight(rng, QuantType.F32, n_out, n_in)
    lora, lanes = random_lora(rng, n_in, n_out, rank), random_lanes(rng, n_lanes, distribution)
    x = rng.normal(size=(n_lanes * rows, n_in)).astype(np.float32)
    want = reference.matmul(x, weight, lora=lora, lanes=lanes)
    # 1e-5 because the few numbers of a small shape may cancel.
    assert relative_error(cpu.matmul(x, weight, lora=lora, lanes=lanes), want) < 1e-5
    sums = [want.copy(), want.copy()]
    cpu.add_lora(sums[0], x, lora, lanes)
    reference.add_lora(sums[1], x, lora, lanes)
    assert relative_error(*sums) < 1e-5


@given(rows=st.integers(1, 40), d=st.integers(1, 100), size=st.sampled_from([1e-3, 1.0, 1e4]))
def test_relative_rows(rows: int, d: int, size: float) -> None:
    """Differences to earlier rows, brought to 1 .. 2, and back."""
    rng = np.random.default_rng(rows)
    x = rng.normal(size=(rows, d)).astype(np.float32)
    references = np.where(rng.random(rows) < 0.5, np.arange(rows), 0).astype(np.int32)
    others = references != np.arange(rows)
    x[others] = x[0] + np.float32(size) * x[others]
    if rows > 2:
        x[1] = x[0]  # no difference at all
    found, want = x.copy(), x.copy()
    scales = cpu.to_relative(found, references)
    np.testing.assert_array_equal(scales, reference.to_relative(want, references))
    np.testing.assert_array_equal(found, want)
    largest = np.abs(found[others]).max(axis=1)
    assert (((largest >= 1) & (largest < 2)) | (largest == 0)).all()
    assert (scales[~others] == 1).all()
    cpu.from_relative(found, references, scales)
    reference.from_relative(want, references, scales)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    np.testing.assert_allclose(found, x, rtol=1e-6, atol=1e-6 * (1 + size))


@types
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("plain_first", [True, False])
def test_batch_invariance(type: QuantType, exact: bool, plain_first: bool) -> None:
    """Lanes of a seed are bit-identical alone, among other seeds, and for any thread count."""
    rng = np.random.default_rng(3)
    weight = random_weight(rng, type, 130, 768)
    lora = random_lora(rng, 768, 130, 8)
    rows, first = 7, 1 if plain_first else 0
    seeds = np.concatenate([np.zeros(first), [5, 5, 9, 9, 2, 2]]).astype(np.uint64)
    coefficients = np.concatenate([np.zeros(first), [0.01, -0.01] * 3]).astype(np.float32)
    lanes = Lanes(seeds, coefficients)
    x = rng.normal(size=(len(lanes) * rows, 768)).astype(np.float32)
    labels = rng.integers(0, 130, len(x)).astype(np.int32)

    def run(chosen: list[int], threads: int) -> tuple[np.ndarray, np.ndarray]:
        cpu.set_num_threads(threads)
        some = Lanes(seeds[chosen], coefficients[chosen])
        at = np.concatenate([np.arange(i * rows, (i + 1) * rows) for i in chosen])
        y = cpu.matmul(x[at], weight, lora=lora, lanes=some, exact=exact)
        nll = [
            cpu.cross_entropy(
                x[at], weight, labels[at], lanes=some, softcap=softcap, exact=exact
            ).reshape(len(chosen), rows)
            for softcap in (0.0, 4.0)
        ]
        return y.reshape(len(chosen), rows, -1), np.stack(nll, axis=-1)

    before = cpu.num_threads()
    try:
        y, nll = run(list(range(len(lanes))), threads=3)
        for pair in range(3):
            chosen = [*range(first), first + 2 * pair, first + 2 * pair + 1]
            y_alone, nll_alone = run(chosen, threads=1)
            np.testing.assert_array_equal(y[chosen], y_alone)
            np.testing.assert_array_equal(nll[chosen], nll_alone)
    finally:
        cpu.set_num_threads(before)


@pytest.mark.parametrize("type", [QuantType.Q4_0, QuantType.Q6_K], ids=lambda t: t.name)
def test_rows_in_several_blocks(type: QuantType) -> None:
    """More rows, outputs and inputs than a route takes at a time, tangents far from the primal."""
    rng = np.random.default_rng(12)
    rows, n_in, n_out = 290, 1280, 610
    weight = random_weight(rng, type, n_out, n_in)
    x = rng.normal(size=(2 * rows, n_in)).astype(np.float32)
    x[:rows] *= 1 / np.abs(reference.matmul(x[:rows], weight)).max()  # no word has all of a softmax
    labels = np.tile(rng.integers(0, n_out, rows), 2).astype(np.int32)
    lanes = Lanes(np.zeros(2, np.uint64), np.array([0, 1], np.float32), tangents=True)
    y = cpu.matmul(x, weight, lanes=lanes)
    assert relative_error(y, reference.matmul(x, weight, lanes=lanes)) < 0.012
    nll = cpu.cross_entropy(x, weight, labels, lanes=lanes)
    want = reference.cross_entropy(x, weight, labels, lanes=lanes)
    assert relative_error(nll[:rows], want[:rows]) < 0.002
    assert relative_error(nll[rows:], want[rows:]) < 0.02
    few = np.r_[280:290, rows + 280 : rows + 290]
    np.testing.assert_array_equal(cpu.matmul(x[few], weight, lanes=lanes), y[few])
    alone = cpu.cross_entropy(x[few], weight, labels[few], lanes=lanes)
    np.testing.assert_array_equal(alone, nll[few])


@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_differences_between_lanes_keep_their_precision(type: QuantType) -> None:
    """What lanes share is rounded once: their difference is right to 1%, however small."""
    rng = np.random.default_rng(8)
    weight = random_weight(rng, type, 64, 512)
    x = rng.normal(size=(10, 512)).astype(np.float32)
    step = 1e-3 * rng.normal(size=(10, 512)).astype(np.float32)
    lanes = Lanes(np.array([4, 4], np.uint64), np.array([1, -1], np.float32))
    y = cpu.matmul(np.concatenate([x + step, x - step]), weight, lanes=lanes)
    want = reference.matmul(x + step, weight) - reference.matmul(x - step, weight)
    assert relative_error(y[:10] - y[10:], want) < 0.012


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 130))
def test_norms_and_activations(rows: int, d: int) -> None:
    rng = np.random.default_rng(d)
    x, up = (rng.normal(size=(rows, d), scale=3).astype(np.float32) for _ in range(2))
    w, b = (rng.normal(size=d).astype(np.float32) for _ in range(2))
    pairs = [
        (cpu.rms_norm(x, w, 1e-5), reference.rms_norm(x, w, 1e-5)),
        (cpu.layer_norm(x, w, b, 1e-5), reference.layer_norm(x, w, b, 1e-5)),
        (cpu.swiglu(x, up), reference.swiglu(x, up)),
        (cpu.geglu(x, up), reference.geglu(x, up)),
        (cpu.gelu(x), reference.gelu(x)),
    ]
    for got, want in pairs:
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotated", [16, 10])
def test_rope(interleaved: bool, rotated: int) -> None:
    rng = np.random.default_rng(4)
    x = rng.normal(size=(9, 48)).astype(np.float32)
    angle = rng.uniform(0, 6, size=(20, rotated // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    positions = rng.integers(0, 20, 9).astype(np.int32)
    got = cpu.rope(x, positions, cos, sin, 16, interleaved)
    want = reference.rope(x, positions, cos, sin, 16, interleaved)
    np.testing.assert_allclose(got, want, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([4, 20, 32, 64, 256]),
    mask=st.tuples(st.booleans(), st.sampled_from([0, 1, 9, 40])),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_attention(
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    mask: tuple[bool, int],
    softcap: float,
) -> None:
    rng = np.random.default_rng(len(lengths))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = int(starts[-1])
    q = rng.normal(size=(rows, kv_heads * group * head_dim)).astype(np.float32)
    k, v = (rng.normal(size=(rows, kv_heads * head_dim)).astype(np.float32) for _ in range(2))
    options = {"head_dim": head_dim, "scale": head_dim**-0.5, "softcap": softcap}
    options["causal"], options["window"] = mask
    got = cpu.attention(q, k, v, starts, **options)
    want = reference.attention(q, k, v, starts, **options)
    # Scores of 256 products are rounded by some 1e-6, and values are up to 4; on tiles both have 16
    # bits, so that values alone are wrong by up to 2^-17 of themselves.
    np.testing.assert_allclose(got, want, atol=6e-5 if cpu.isa == "amx" else 5e-6)
    last = slice(int(starts[-2]), rows)  # bit-identical without the other sequences
    alone = cpu.attention(
        q[last].copy(),
        k[last].copy(),
        v[last].copy(),
        np.array([0, lengths[-1]], np.int32),
        **options,
    )
    np.testing.assert_array_equal(got[last], alone)
    if mask[1] >= max(lengths):  # a window of all there is
        options["window"] = 0
        np.testing.assert_array_equal(got, cpu.attention(q, k, v, starts, **options))


@types
@pytest.mark.parametrize("vocab", [5, 300, 1100])
def test_cross_entropy(type: QuantType, vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    weight = random_weight(rng, type, vocab, 256)
    x = rng.normal(size=(14, 256)).astype(np.float32)
    labels = rng.integers(0, vocab, 14).astype(np.int32)
    for cap in ({}, {"softcap": 3.0}):
        want = reference.cross_entropy(x, weight, labels, **cap)
        scale = 1 + np.abs(want).max()
        exact = cpu.cross_entropy(x, weight, labels, **cap, exact=True)
        assert np.abs(exact - want).max() < 1e-5 * scale
        assert np.abs(cpu.cross_entropy(x, weight, labels, **cap) - want).max() < 0.03 * scale


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_non_finite_values_are_not_swallowed(bad: float, exact: bool) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, QuantType.Q4_0, 64, 64)
    x = rng.normal(size=(3, 64)).astype(np.float32)
    x[1, 5] = bad
    y = cpu.matmul(x, weight, exact=exact)
    assert not np.isfinite(y[1]).any()
    assert np.isfinite(y[[0, 2]]).all()
    for softcap in (0.0, 5.0):
        nll = cpu.cross_entropy(
            x, weight, np.array([1, 2, 3], np.int32), softcap=softcap, exact=exact
        )
        assert not np.isfinite(nll[1])
        assert np.isfinite(nll[[0, 2]]).all()
        y = cpu.attention(
            x, x, x, np.array([0, 3], "i"), head_dim=64, scale=1.0, causal=True, softcap=softcap
        )
        assert not np.isfinite(y[1]).any()


def test_bad_shapes_are_refused() -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, QuantType.Q4_0, 8, 64)
    with pytest.raises(ValueError, match="row"):
        cpu.matmul(np.zeros((2, 32), np.float32), weight)
    with pytest.raises(ValueError, match="outside"):
        cpu.embedding(weight, np.array([8], np.int32))
    lanes = Lanes(np.zeros(2, np.uint64), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="whole lanes"):
        cpu.matmul(np.zeros((3, 64), np.float32), weight, lanes=lanes)
    with pytest.raises(TypeError):
        cpu.seeded_axpy(np.zeros(4), np.zeros(1, np.uint64), np.zeros(1, np.float32))


@pytest.mark.parametrize("ops", [cpu, reference], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    "options",
    [{"window": -1}, {"window": -1, "causal": False}, {"softcap": -1.0}, {"softcap": np.nan}],
)
def test_bad_windows_and_soft_caps_are_refused(ops: ModuleType, options: dict) -> None:
    x, starts = np.ones((3, 8), np.float32), np.array([0, 3], np.int32)
    options = {"head_dim": 8, "scale": 1.0, "causal": True, **options}
    with pytest.raises(ValueError, match=r"window|soft cap"):
        ops.attention(x, x, x, starts, **options)
    with pytest.raises(ValueError, match=r"window|soft cap"):
        ops.attention_vjp(x, x, x, starts, x, **options)


@pytest.mark.parametrize("isa", cpu.isas[1:])
def test_every_isa(isa: str) -> None:
    if "FWDLLM_ISA" in os.environ:
        pytest.skip("already running under a chosen instruction set")
    code = "from fwdllm.kernels import cpu; print(cpu.isa)"
    env = {**os.environ, "FWDLLM_ISA": isa}
    probe = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"this machine has no {isa}")
    assert probe.stdout.strip() == isa
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", __file__, *map(str, OTHERS)],
        env=env,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 2),
    st.sampled_from([4, 20, 64]),
    st.tuples(st.booleans(), st.sampled_from([0, 7])),
    st.sampled_from([0.0, 2.0]),
)
def test_tangents_of_layers(
    length: int, group: int, head_dim: int, mask: tuple[bool, int], softcap: float
) -> None:
    """As the reference, which test_tangents.py compares with PyTorch where that exists."""
    rng = np.random.default_rng(length)
    tangents, width = 2, group * head_dim
    rows = (1 + tangents) * (length + 3)
    x, y = (rng.normal(size=(rows, width)).astype(np.float32) for _ in range(2))
    weight, bias = (rng.normal(size=width).astype(np.float32) for _ in range(2))
    starts = np.cumsum([0, *[length, 3] * (1 + tangents)]).astype(np.int32)
    heads = {"head_dim": head_dim, "scale": 0.3, "softcap": softcap, "tangents": tangents}
    heads["causal"], heads["window"] = mask
    key, value = y[:, :head_dim].copy(), y[:, -head_dim:].copy()
    labels = np.tile(rng.integers(0, 50, length + 3), 1 + tangents).astype(np.int32)
    output = random_weight(rng, QuantType.F32, 50, width)
    lanes = Lanes(np.zeros(1 + tangents, np.uint64), np.zeros(1 + tangents, "f"), tangents=True)
    found = [
        [
            ops.rms_norm(x, weight, 1e-2, tangents),
            ops.layer_norm(x, weight, bias, 1e-2, tangents),
            ops.swiglu(x, y, tangents),
            ops.geglu(x, y, tangents),
            ops.gelu(x, tangents),
            ops.attention(x, key, value, starts, **heads),
            ops.cross_entropy(x, output, labels, lanes=lanes, softcap=softcap, exact=True),
        ]
        for ops in (cpu, reference)
    ]
    for got, want in zip(*found, strict=True):
        np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-5 * (1 + np.abs(want).max()))
