"""The Triton kernels against the NumPy reference, on a GPU or else under Triton's interpreter.

The interpreter takes 0.1 ms and more for every operation on a tile: shapes are few and small. They
end inside tiles of rows, columns and sums, and some have several of each.
"""

from __future__ import annotations

from importlib import import_module
from operator import methodcaller as call
from typing import Any, TypeAlias

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is published for Linux on x86-64")
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_cpu import QUANTIZED, distributions, random_lanes, random_lora, relative_error
from test_kernels_cpu import types as every_type
from test_tangents import kinds, normals, tangent_lanes, with_direction
from weights import every_scale_of_mxfp4, random_weight

from fwdllm.kernels import cpu, reference
from fwdllm.kernels import triton as ops
from fwdllm.kernels.reference.random import _box_muller
from fwdllm.kernels.triton import products
from fwdllm.kernels.triton.random import _normals
from fwdllm.kernels.triton.runtime import INTERPRETED
from fwdllm.kernels.triton.tiles import STEPS
from fwdllm.kernels.types import SUPPORTED_TYPES, Lanes, LoRA, QuantType

if not ops.usable():
    pytest.skip("neither a GPU nor TRITON_INTERPRET=1", allow_module_level=True)

# Types that are decoded element by element only.
BLOCKWISE = set(QUANTIZED) - set(STEPS)
SHAPES = [(1, 256, 40), (19, 768, 33), (70, 256, 70)]  # rows, n_in, n_out
BF16 = 2**-8  # of bfloat16's 8 significant bits, the most that rounding moves a number
LAST_SEED = 2**64 - 1
SEED = np.array([3], np.uint64)
Call: TypeAlias = call
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
exactness = pytest.mark.parametrize("exact", [True, False])


def on_device(x: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return ops.array(x).to(dtype)


def error(got: torch.Tensor, want: np.ndarray) -> float:
    return relative_error(ops.host(got), want)


def assert_close(got: torch.Tensor, want: np.ndarray, dtype: torch.dtype) -> None:
    """As close as the type of the result allows, which is that of the input."""
    assert got.dtype == dtype
    rtol, atol = (3e-5, 1e-5) if dtype == torch.float32 else (2 * BF16, 2 * BF16)
    scale = 1 + np.abs(want).max(initial=0)
    np.testing.assert_allclose(ops.host(got), want, rtol=rtol, atol=atol * scale)


# The random stream


@settings(max_examples=25, deadline=None)
@given(st.integers(0, LAST_SEED), st.integers(0, 2**63), st.integers(0, 300))
def test_stream_is_the_reference_stream(seed: int, start: int, count: int) -> None:
    np.testing.assert_array_equal(
        ops.philox(seed, start, count), reference.philox(seed, start, count)
    )
    np.testing.assert_array_equal(
        ops.rademacher(seed, start, count), reference.rademacher(seed, start, count)
    )
    np.testing.assert_allclose(
        ops.normal(seed, start, count), reference.normal(seed, start, count), rtol=0, atol=1e-6
    )


# Of seeds and counters that Triton takes for constants, 32 or 64 bits, and where they turn over.
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**63 + 7, LAST_SEED])
@pytest.mark.parametrize("start", [0, 1, 2**31 - 5, 2**32 - 5, 2**63 - 5, 2**64 - 16])
def test_words_at_the_edges_of_integers(seed: int, start: int) -> None:
    np.testing.assert_array_equal(ops.philox(seed, start, 11), reference.philox(seed, start, 11))


@pytest.mark.parametrize(
    ("seed", "start"), [(2024, 3), (LAST_SEED, 0), (5, 2**33 + 1), (2**40, 2**31 - 30_002)]
)
def test_normals_are_those_of_the_other_kernels(seed: int, start: int) -> None:
    count = (1 << 16) + 5
    got = ops.normal(seed, start, count)
    for other in (cpu, reference):
        np.testing.assert_allclose(got, other.normal(seed, start, count), rtol=0, atol=1e-6)


@triton.jit
def box_muller(bits, out, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    a, b = _normals(tl.load(bits + 2 * i), tl.load(bits + 2 * i + 1))
    tl.store(out + 2 * i, a)
    tl.store(out + 2 * i + 1, b)


def test_normals_of_extreme_integers() -> None:
    """Which random counters are unlikely to meet: u of 0, around 1e-7 and nearly 1, every turn."""
    radii = [0, 1, 214, 215, 1000, 0x7FFFFFC0, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF]
    eighths = [(k << 28) + d for k in range(8) for d in (-1, 0, 1) if (k, d) != (0, -1)]
    angles = [*eighths, 0x7FFFFFFF, 0x80000000, 0xC0000000, 0xFFFFFFFF]
    bits = np.array([(a, b) for a in radii for b in angles], np.uint32)
    bits = np.resize(bits, (512, 2))
    out = on_device(np.empty(bits.shape, np.float32))
    box_muller[(1,)](ops.array(bits.view(np.int32)), out, COUNT=len(bits))
    want = _box_muller(bits.reshape(-1, 4)).reshape(-1, 2)
    np.testing.assert_allclose(ops.host(out), want, rtol=0, atol=1e-6)


@distributions
@pytest.mark.parametrize(
    ("n", "offset"), [(1, 3), (63, 7), (1024, 0), (5001, 2**33 + 5), (2049, 2**31 - 1000)]
)
def test_seeded_axpy_and_dot(n: int, offset: int, distribution: str) -> None:
    rng = np.random.default_rng(n)
    seeds = rng.integers(0, 2**64, 5, np.uint64)
    coefficients = normals(rng, 5)
    options = {"offset": offset, "distribution": distribution}
    theta = normals(rng, n)
    there = on_device(theta.copy())
    want, got = theta.copy(), theta.copy()
    reference.seeded_axpy(want, seeds, coefficients, **options)
    for x in (got, there):  # in place, wherever it is
        ops.seeded_axpy(x, seeds, coefficients, **options)
        np.testing.assert_allclose(ops.host(x), want, atol=1e-5)
    for x in (theta, on_device(theta)):
        np.testing.assert_allclose(
            ops.seeded_dot(x, seeds, **options),
            reference.seeded_dot(theta, seeds, **options),
            atol=1e-4 * np.sqrt(n),
        )


def test_directions_of_nothing() -> None:
    empty, theta = np.empty(0, np.float32), np.ones(3, np.float32)
    ops.seeded_axpy(empty, SEED, np.ones(1, np.float32))
    np.testing.assert_array_equal(ops.seeded_dot(empty, SEED), [0])
    ops.seeded_axpy(theta, SEED[:0], empty)
    np.testing.assert_array_equal(theta, 1)
    assert ops.seeded_dot(theta, SEED[:0]).shape == (0,)


# Weights and products


@every_type
def test_decoding_is_exact(type: QuantType) -> None:
    rng = np.random.default_rng(1)
    weight = random_weight(rng, type, n_out=37, n_in=768)
    want = reference.dequantize(weight)
    ids = rng.integers(0, 37, 11).astype(np.int32)
    for w in (weight, ops.weight(weight)):
        np.testing.assert_array_equal(ops.dequantize(w), want)
        np.testing.assert_array_equal(ops.host(ops.embedding(w, ids)), want[ids])


def test_decoding_of_odd_rows() -> None:
    rng = np.random.default_rng(1)
    shapes = [(QuantType.BF16, 33), (QuantType.F16, 5), (QuantType.F32, 2051), (QuantType.Q4_0, 96)]
    shapes += [(QuantType.Q4_1, 160), (QuantType.Q8_0, 32), (QuantType.Q8_0, 96)]
    shapes += [(QuantType.Q5_0, 32), (QuantType.Q5_1, 96), (QuantType.MXFP4, 32)]
    shapes += [(QuantType.IQ4_NL, 160), (QuantType.IQ4_XS, 256), (QuantType.Q3_K, 256)]
    for type, n_in in shapes:
        weight = random_weight(rng, type, 3, n_in)
        np.testing.assert_array_equal(ops.dequantize(weight), reference.dequantize(weight))


@pytest.mark.filterwarnings("ignore:overflow")  # of NumPy, in the interpreter
def test_every_scale_of_mxfp4() -> None:
    weight = every_scale_of_mxfp4()
    np.testing.assert_array_equal(ops.dequantize(weight), reference.dequantize(weight))


@pytest.mark.parametrize(
    ("type", "rows", "n_in", "n_out"),
    [
        pytest.param(type, *shape, id="-".join(map(str, (type.name, *shape))))
        for type in SUPPORTED_TYPES
        for shape in (SHAPES[1:2] if type in BLOCKWISE else SHAPES)
    ],
)
def test_matmul(type: QuantType, rows: int, n_in: int, n_out: int) -> None:
    rng = np.random.default_rng(rows)
    weight = random_weight(rng, type, n_out, n_in)
    x, bias = normals(rng, rows, n_in), normals(rng, n_out)
    want = reference.matmul(x, weight, bias=bias)
    assert error(ops.matmul(x, weight, bias=bias, exact=True), want) < 1e-6
    got = ops.matmul(x, weight, bias=bias)
    assert got.dtype == torch.float32
    both = type in BLOCKWISE  # weights are rounded as well as rows
    assert error(got, want) < (2 if both else 1) * BF16


@pytest.mark.parametrize("type", [QuantType.F32, QuantType.F16, QuantType.BF16])
@settings(max_examples=8, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 90))
def test_matmul_of_odd_shapes(type: QuantType, rows: int, n_in: int, n_out: int) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, type, n_out, n_in)
    x = normals(rng, rows, n_in)
    want = reference.matmul(x, weight)
    assert error(ops.matmul(x, weight, exact=True), want) < 1e-6
    # A few numbers may cancel: their rounding is 2^-9 of what is summed, not of the sum.
    most = np.linalg.norm(np.abs(x) @ np.abs(reference.dequantize(weight)).T)
    assert np.linalg.norm(ops.host(ops.matmul(x, weight)) - want) < BF16 * most


@every_type
def test_both_routes_agree(monkeypatch: pytest.MonkeyPatch, type: QuantType) -> None:
    """Weights decoded where they are multiplied, all of them at once, and some at a time."""
    rng = np.random.default_rng(6)
    weight = ops.weight(random_weight(rng, type, 70, 256))
    x = on_device(normals(rng, 21, 256))
    monkeypatch.setattr(products, "SCRATCH_ROWS", 22)
    fused = ops.host(ops.matmul(x, weight))
    monkeypatch.setattr(products, "SCRATCH_ROWS", 21)
    monkeypatch.setattr(products, "fused", None)  # the other route
    scratch = ops.host(ops.matmul(x, weight))
    assert relative_error(scratch, fused) < BF16  # whose weights are not rounded
    for rows in (32, 0):
        monkeypatch.setattr(products, "SCRATCH_BYTES", rows * 2 * 256)
        assert error(ops.matmul(x, weight), scratch) < 1e-5


@pytest.mark.parametrize("rows", [1, 19, 70])
@pytest.mark.parametrize("type", STEPS, ids=lambda t: t.name)
def test_weights_of_few_rows_are_not_rounded(type: QuantType, rows: int) -> None:
    rng = np.random.default_rng(6)
    weight = random_weight(rng, type, 70, 2304)  # in four parts
    there = ops.weight(weight)
    for _ in range(2):  # programs count which of them are done, and begin from zero again
        x = on_device(normals(rng, rows, 2304), torch.bfloat16)
        got = products.fused(x, there, torch.float32)
        assert error(got, reference.matmul(ops.host(x), weight)) < 1e-5


@pytest.mark.parametrize("scratch_rows", [1, 1000])
def test_rows_of_bfloat16(monkeypatch: pytest.MonkeyPatch, scratch_rows: int) -> None:
    monkeypatch.setattr(products, "SCRATCH_ROWS", scratch_rows)
    rng = np.random.default_rng(6)
    weight, bias = random_weight(rng, QuantType.Q4_0, 70, 96), normals(rng, 70)
    x = on_device(normals(rng, 21, 96), torch.bfloat16)
    for options in ({}, {"bias": bias}, {"bias": bias, "exact": True}):
        got = ops.matmul(x, weight, **options)
        assert got.dtype == torch.bfloat16
        assert error(got, reference.matmul(ops.host(x), weight, bias=options.get("bias"))) < BF16


def test_no_rows() -> None:
    rng = np.random.default_rng(6)
    weight, lora = random_weight(rng, QuantType.F32, 7, 5), random_lora(rng, 5, 7, 2)
    assert ops.matmul(normals(rng, 0, 5), weight, lora=lora).shape == (0, 7)
    assert ops.embedding(weight, np.empty(0, np.int32)).shape == (0, 5)
    assert ops.cross_entropy(normals(rng, 0, 5), weight, np.empty(0, np.int32)).shape == (0,)
    assert ops.gelu(normals(rng, 0, 5)).shape == (0, 5)


# Seeded LoRA


@distributions
@settings(max_examples=10, deadline=None)
@given(
    n_lanes=st.integers(1, 4),
    rows=st.integers(1, 11),
    n_in=st.integers(1, 150),
    n_out=st.integers(1, 80),
    rank=st.sampled_from([1, 3, 4, 8, 9]),
)
def test_seeded_lora(
    distribution: str, n_lanes: int, rows: int, n_in: int, n_out: int, rank: int
) -> None:
    rng = np.random.default_rng(n_in)
    weight = random_weight(rng, QuantType.F32, n_out, n_in)
    lora, lanes = random_lora(rng, n_in, n_out, rank), random_lanes(rng, n_lanes, distribution)
    x = normals(rng, n_lanes * rows, n_in)
    want = reference.matmul(x, weight, lora=lora, lanes=lanes)
    assert error(ops.matmul(x, weight, lora=lora, lanes=lanes, exact=True), want) < 1e-5


# Rows and columns of several tiles; directions of A or of B in the midst of which positions no
# longer fit 31 bits.
@pytest.mark.parametrize(
    ("rows", "n_in", "n_out", "rank", "offset"),
    [
        (140, 36, 68, 4, 2**31 - 200),
        (3, 1100, 70, 8, 2**31 - 400),
        (3, 68, 40, 3, 2**31 - 150),
        (3, 68, 40, 1, 2**31 - 88),
    ],
)
@pytest.mark.parametrize("tangents", [True, False])
def test_seeded_lora_of_several_tiles(
    rows: int, n_in: int, n_out: int, rank: int, offset: int, tangents: bool
) -> None:
    rng = np.random.default_rng(n_in)
    weight = random_weight(rng, QuantType.F32, n_out, n_in)
    lora = LoRA(normals(rng, rank, n_in), normals(rng, n_out, rank), 0.7, offset)
    lanes = Lanes(
        np.array([2, LAST_SEED], np.uint64), np.array([0, 0.5], np.float32), tangents=tangents
    )
    x = normals(rng, 2 * rows, n_in)
    want = reference.matmul(x, weight, lora=lora, lanes=lanes)
    got = ops.host(ops.matmul(x, weight, lora=lora, lanes=lanes, exact=True))
    assert relative_error(got[:rows], want[:rows]) < 1e-5
    assert relative_error(got[rows:], want[rows:]) < 1e-5


@kinds
@settings(max_examples=8, deadline=None)
@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    n=st.integers(1, 2),
    n_in=st.integers(1, 150),
    n_out=st.integers(1, 80),
    rank=st.sampled_from([1, 3, 4, 8]),
    shared=st.booleans(),
    tangents=st.booleans(),
    distribution=st.sampled_from(["normal", "rademacher"]),
)
def test_every_kind_of_direction(
    kind: str,
    parts: list[int],
    n: int,
    n_in: int,
    n_out: int,
    rank: int,
    shared: bool,
    tangents: bool,
    distribution: str,
) -> None:
    """Of tangents and of lanes, with seeds for all rows of a lane or for parts of them."""
    rng = np.random.default_rng(n_in)
    weight = random_weight(rng, QuantType.F32, n_out, n_in)
    lora = with_direction(rng, random_lora(rng, n_in, n_out, rank), kind)
    lanes = tangent_lanes(rng, n, None if shared else parts, distribution)
    if not tangents:
        lanes = Lanes(lanes.seeds, lanes.coefficients, distribution, starts=lanes.starts)
    rows = sum(parts)
    x, bias = normals(rng, (1 + n) * rows, n_in), normals(rng, n_out)
    want = reference.matmul(x, weight, bias=bias, lora=lora, lanes=lanes)
    got = ops.host(ops.matmul(x, weight, bias=bias, lora=lora, lanes=lanes, exact=True))
    for lane in np.split(np.arange(len(x)), 1 + n):
        # Against all lanes: a tangent of rank 1 may be next to nothing.
        scale = np.linalg.norm(want) / np.sqrt(1 + n)
        assert np.linalg.norm(got[lane] - want[lane]) < 1e-5 * scale


def test_an_empty_basis_holds_a_factor_still() -> None:
    rng = np.random.default_rng(0)
    weight, lora = random_weight(rng, QuantType.F32, 30, 20), random_lora(rng, 20, 30, 3)
    empty = {"basis_a": np.zeros((0, 20), np.float32), "basis_b": np.zeros((0, 30), np.float32)}
    still = LoRA(lora.a, lora.b, lora.scale, lora.offset, **empty)
    lanes = Lanes(np.array([3, 3], np.uint64), np.array([0.5, -0.5], np.float32))
    x = normals(rng, 10, 20)
    got = ops.matmul(x, weight, lora=still, lanes=lanes, exact=True)
    np.testing.assert_array_equal(
        ops.host(got), ops.host(ops.matmul(x, weight, lora=lora, exact=True))
    )


@pytest.mark.parametrize("basis", [{"basis_a": 0}, {"basis_a": 4}, {"basis_b": 4}], ids=str)
def test_a_mask_beside_a_basis(basis: dict[str, int]) -> None:
    """It is of the other factor then, whose elements keep their place in it."""
    rng = np.random.default_rng(0)
    weight, lora = random_weight(rng, QuantType.F32, 30, 20), random_lora(rng, 20, 30, 3)
    mask = rng.integers(0, 2, 3 * 50).astype(np.float32)
    bases = {name: normals(rng, q, 20 if name == "basis_a" else 30) for name, q in basis.items()}
    lora = LoRA(lora.a, lora.b, lora.scale, lora.offset, mask, **bases)
    lanes = Lanes(np.array([3, 3], np.uint64), np.array([0.5, -0.5], np.float32))
    x = normals(rng, 10, 20)
    got = ops.matmul(x, weight, lora=lora, lanes=lanes, exact=True)
    assert error(got, reference.matmul(x, weight, lora=lora, lanes=lanes)) < 1e-5


@pytest.mark.parametrize("tangents", [True, False])
def test_seeded_lora_on_rows_of_bfloat16(tangents: bool) -> None:
    rng = np.random.default_rng(2)
    weight, lora = random_weight(rng, QuantType.Q4_0, 70, 96), random_lora(rng, 96, 70, 4)
    lanes = tangent_lanes(rng, 2, None) if tangents else random_lanes(rng, 3)
    x, bias = on_device(normals(rng, 3 * 7, 96), torch.bfloat16), normals(rng, 70)
    got = ops.matmul(x, weight, bias=bias, lora=lora, lanes=lanes)
    want = reference.matmul(ops.host(x), weight, bias=bias, lora=lora, lanes=lanes)
    assert got.dtype == torch.bfloat16
    for lane in np.split(np.arange(21), 3):
        assert relative_error(ops.host(got)[lane], want[lane]) < BF16


def test_factors_may_change_between_products() -> None:
    """Steps change an adapter in place; what never changes is copied to the device once."""
    rng = np.random.default_rng(0)
    weight, lora = random_weight(rng, QuantType.F32, 30, 20), random_lora(rng, 20, 30, 4)
    x = normals(rng, 5, 20)
    for _ in range(2):
        got = ops.matmul(x, weight, lora=lora, exact=True)
        assert error(got, reference.matmul(x, weight, lora=lora)) < 1e-5
        lora.a[:] *= 2
        lora.b[:] += 1


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_differences_between_lanes_keep_their_precision(type: QuantType, adapted: bool) -> None:
    """What lanes share is rounded once: their difference is right to 1%, however small."""
    rng = np.random.default_rng(8)
    weight = random_weight(rng, type, 64, 512)
    x, step = normals(rng, 10, 512), normals(rng, 10, 512, scale=1e-3)
    coefficients = np.array([1e-3, -1e-3], np.float32)
    lanes = Lanes(np.array([4, 4], np.uint64), coefficients)
    options = {}
    if adapted:
        a, b = normals(rng, 4, 512, scale=0.04), normals(rng, 64, 4, scale=0.1)
        options = {"lora": LoRA(a, b, 0.5, 8), "bias": normals(rng, 64)}
    rows = np.concatenate([x + step, x - step])
    got = ops.host(ops.matmul(rows, weight, lanes=lanes, **options))
    want = reference.matmul(rows, weight, lanes=lanes, **options)
    assert relative_error(got, want) < BF16
    assert relative_error(got[:10] - got[10:], want[:10] - want[10:]) < 0.01


def product_in_order(a: np.ndarray, b: np.ndarray, dtype: Any = None) -> np.ndarray:
    """a @ b, each element summed from the first term to the last, whatever the shapes."""
    total = np.zeros(np.broadcast_shapes(a[..., :1].shape, b[..., :1, :].shape), dtype or a.dtype)
    for k in range(a.shape[-1]):
        total += a[..., k, None] * b[..., None, k, :]
    return total


# Rows that are whole steps, in several parts, only if not exact: all of exactness is one kernel.
@pytest.mark.parametrize(("exact", "n_in"), [(True, 544), (False, 544), (False, 1152)])
@pytest.mark.parametrize("tangents", [True, False])
def test_batch_invariance(
    monkeypatch: pytest.MonkeyPatch, exact: bool, tangents: bool, n_in: int
) -> None:
    """With its reference alone, a lane has the bits that it has among others."""
    monkeypatch.setattr(products, "SCRATCH_ROWS", 10**9)
    if INTERPRETED:  # by NumPy, whose BLAS has an order of its own for each processor and shape
        monkeypatch.setattr(np, "matmul", product_in_order)
    rng = np.random.default_rng(3)
    weight, lora = random_weight(rng, QuantType.Q4_0, 70, n_in), random_lora(rng, n_in, 70, 4)
    seeds = np.array([0, 5, 9, 9, 2], np.uint64)
    coefficients = np.array([0, 0.01, -0.01, 1, 1], np.float32)
    rows = 7
    x = normals(rng, 5 * rows, n_in)
    labels = rng.integers(0, 70, 5 * rows).astype(np.int32)

    def run(chosen: list[int]) -> tuple[np.ndarray, np.ndarray]:
        lanes = Lanes(seeds[chosen], coefficients[chosen], tangents=tangents)
        at = np.concatenate([np.arange(rows) + rows * lane for lane in chosen])
        y = ops.matmul(x[at], weight, lora=lora, lanes=lanes, exact=exact)
        nll = ops.cross_entropy(x[at], weight, labels[at], lanes=lanes, exact=exact)
        return ops.host(y).reshape(-1, rows, 70), ops.host(nll).reshape(-1, rows)

    y, nll = run([0, 1, 2, 3, 4])
    for lane in (1, 2, 4):
        y_alone, nll_alone = run([0, lane])
        np.testing.assert_array_equal(y[[0, lane]], y_alone)
        np.testing.assert_array_equal(nll[[0, lane]], nll_alone)


# Layers


def stacked(
    rng: np.random.Generator, dtype: torch.dtype, *shape: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Rows on the device, and the same numbers here."""
    x = on_device(normals(rng, *shape, scale=2), dtype)
    return x, ops.host(x)


@both_dtypes
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 40), d=st.integers(1, 130), tangents=st.integers(0, 3))
def test_norms_and_activations(dtype: torch.dtype, rows: int, d: int, tangents: int) -> None:
    rng = np.random.default_rng(d)
    (x, x_here), (up, up_here) = (stacked(rng, dtype, (1 + tangents) * rows, d) for _ in range(2))
    w, b = normals(rng, d), normals(rng, d)
    pairs = [
        (ops.rms_norm(x, w, 1e-2, tangents), reference.rms_norm(x_here, w, 1e-2, tangents)),
        (
            ops.layer_norm(x, w, b, 1e-2, tangents),
            reference.layer_norm(x_here, w, b, 1e-2, tangents),
        ),
        (ops.swiglu(x, up, tangents), reference.swiglu(x_here, up_here, tangents)),
        (ops.geglu(x, up, tangents), reference.geglu(x_here, up_here, tangents)),
        (ops.gelu(x, tangents), reference.gelu(x_here, tangents)),
    ]
    for got, want in pairs:
        assert_close(got, want, dtype)


def test_rows_longer_than_a_tile() -> None:
    rng = np.random.default_rng(0)
    x, w = normals(rng, 6, 5000), normals(rng, 5000)
    assert_close(ops.rms_norm(x, w, 1e-2, 2), reference.rms_norm(x, w, 1e-2, 2), torch.float32)
    want = reference.layer_norm(x, w, w, 1e-2, 2)
    assert_close(ops.layer_norm(x, w, w, 1e-2, 2), want, torch.float32)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_activations_do_not_overflow() -> None:
    x = np.array([[-3e4, -200, -90, 0, 90, 200, 3e4]], np.float32)
    assert_close(ops.swiglu(x, x + 1), reference.swiglu(x, x + 1), torch.float32)
    assert_close(ops.geglu(x, x + 1), reference.geglu(x, x + 1), torch.float32)
    assert_close(ops.gelu(x), reference.gelu(x), torch.float32)


@both_dtypes
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("rotated", [16, 10])
def test_rope(dtype: torch.dtype, interleaved: bool, rotated: int) -> None:
    rng = np.random.default_rng(4)
    x, here = stacked(rng, dtype, 90, 48)
    angle = rng.uniform(0, 6, size=(20, rotated // 2))
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    positions = rng.integers(0, 20, 90).astype(np.int32)
    got = ops.rope(x, positions, cos, sin, 16, interleaved)
    assert_close(got, reference.rope(here, positions, cos, sin, 16, interleaved), dtype)
    np.testing.assert_array_equal(ops.host(x), here)


@both_dtypes
@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 33, 70]), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    head_dim=st.sampled_from([5, 20, 32]),
    mask=st.tuples(st.booleans(), st.sampled_from([0, 1, 9, 50])),
    softcap=st.sampled_from([0.0, 2.0]),
    tangents=st.integers(0, 2),
)
def test_attention(
    dtype: torch.dtype,
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    mask: tuple[bool, int],
    softcap: float,
    tangents: int,
) -> None:
    rng = np.random.default_rng(sum(lengths))
    starts = np.cumsum([0, *lengths * (1 + tangents)]).astype(np.int32)
    rows, width = int(starts[-1]), kv_heads * head_dim
    q, k, v = (on_device(normals(rng, rows, w), dtype) for w in (group * width, width, width))
    options = {"head_dim": head_dim, "scale": 0.3, "softcap": softcap, "tangents": tangents}
    options["causal"], options["window"] = mask
    got = ops.attention(q, k, v, starts, **options)
    want = reference.attention(*map(ops.host, (q, k, v)), starts, **options)
    assert got.dtype == dtype
    if dtype == torch.float32:
        return np.testing.assert_allclose(ops.host(got), want, rtol=3e-5, atol=1e-5)
    # Where terms of a tangent cancel, their rounding is more than of what is left.
    slices = (np.split(x, 1 + tangents) for x in (ops.host(got), want))
    for y, z in zip(*slices, strict=True):
        assert relative_error(y, z) < 2 * BF16


def test_heads_of_256() -> None:
    rng = np.random.default_rng(0)
    starts = np.array([0, 33, 66], np.int32)
    q, k, v = (normals(rng, 66, w) for w in (512, 256, 256))
    options = {"head_dim": 256, "scale": 1 / 16, "causal": True, "window": 9, "tangents": 1}
    want = reference.attention(q, k, v, starts, **options)
    assert_close(ops.attention(q, k, v, starts, **options), want, torch.float32)


@both_dtypes
@pytest.mark.parametrize("mask", [(True, 0), (True, 12), (False, 12)])
def test_a_sequence_has_the_same_bits_in_any_company(
    dtype: torch.dtype, mask: tuple[bool, int]
) -> None:
    rng = np.random.default_rng(0)
    starts = np.cumsum([0, *[70, 50] * 3]).astype(np.int32)
    q, k, v = (on_device(normals(rng, 360, w), dtype) for w in (40, 20, 20))
    options = {"head_dim": 20, "scale": 0.3, "tangents": 2}
    options["causal"], options["window"] = mask
    among = ops.attention(q, k, v, starts, **options)
    own = np.concatenate([np.arange(70, 120) + 120 * t for t in range(3)])
    own_starts = np.array([0, 50, 100, 150], np.int32)
    alone = ops.attention(q[own], k[own], v[own], own_starts, **options)
    np.testing.assert_array_equal(ops.host(among)[own], ops.host(alone))


# Losses


@exactness
@pytest.mark.parametrize("vocab", [5, 300, 4500])
@pytest.mark.parametrize("tangents", [True, False])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_cross_entropy(exact: bool, vocab: int, tangents: bool, softcap: float) -> None:
    rng = np.random.default_rng(vocab)
    weight = random_weight(rng, QuantType.F32, vocab, 64, scale=0.1)
    lanes = tangent_lanes(rng, 2, None) if tangents else random_lanes(rng, 3)
    x = normals(rng, 3 * 5, 64)
    labels = rng.integers(0, vocab, 3 * 5).astype(np.int32)
    # Rows whose largest logit is the first, or the last, which is of another part of 4,500 words.
    x[:2] = 10 * reference.dequantize(weight)[[0, -1]]
    labels[:2] = vocab - 1, 0
    if tangents:
        labels = np.tile(labels[:5], 3)
    want = reference.cross_entropy(x, weight, labels, lanes=lanes, softcap=softcap)
    got = ops.cross_entropy(x, weight, labels, lanes=lanes, softcap=softcap, exact=exact)
    assert got.dtype == torch.float64
    scale = 1 + np.abs(want).max()
    assert np.abs(ops.host(got) - want).max() < (1e-5 if exact else 0.01) * scale


def test_losses_of_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many rows at a time as their logits have room for."""
    rng = np.random.default_rng(1)
    weight = random_weight(rng, QuantType.Q8_0, 50, 64)
    x = normals(rng, 3 * 7, 64)
    labels = np.tile(rng.integers(0, 50, 7).astype(np.int32), 3)
    lanes = tangent_lanes(rng, 2, None)
    module = import_module("fwdllm.kernels.triton.cross_entropy")
    monkeypatch.setattr(module, "_LOGITS_BYTES", 2 * 3 * 4 * 4096)
    got = ops.cross_entropy(x, weight, labels, lanes=lanes, exact=True)
    want = reference.cross_entropy(x, weight, labels, lanes=lanes)
    np.testing.assert_allclose(ops.host(got), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("plain_first", [True, False])
def test_differences_of_losses_keep_their_precision(plain_first: bool) -> None:
    rng = np.random.default_rng(8)
    weight = random_weight(rng, QuantType.Q4_0, 300, 256)
    x, step = normals(rng, 6, 256), normals(rng, 6, 256, scale=1e-2)
    coefficients = np.array([0, 1e-3] if plain_first else [1e-3, -1e-3], np.float32)
    lanes = Lanes(np.array([4, 4], np.uint64), coefficients)
    rows = np.concatenate([x + step, x - step])
    labels = np.tile(rng.integers(0, 300, 6), 2).astype(np.int32)
    got = ops.host(ops.cross_entropy(rows, weight, labels, lanes=lanes))
    want = reference.cross_entropy(rows, weight, labels, lanes=lanes)
    assert relative_error(got[:6] - got[6:], want[:6] - want[6:]) < 0.02


# Values that are not numbers, and arguments that do not fit

quiet = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter


@quiet
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@exactness
def test_non_finite_values_are_not_swallowed(bad: float, exact: bool) -> None:
    rng = np.random.default_rng(0)
    weight, lora = random_weight(rng, QuantType.Q4_0, 64, 64), random_lora(rng, 64, 64, 2)
    x, w = normals(rng, 3, 64), normals(rng, 64)
    x[1, 5] = bad
    labels = np.array([1, 2, 3], np.int32)
    found = [
        ops.matmul(x, weight, exact=exact),
        ops.matmul(x, weight, lora=lora, exact=exact),
        ops.cross_entropy(x, weight, labels, exact=exact)[:, None],
        ops.rms_norm(x, w, 1e-5),
        ops.layer_norm(x, w, w, 1e-5),
        ops.gelu(x),
        ops.swiglu(x, x),
    ]
    for y in map(ops.host, found):
        assert not np.isfinite(y[1]).all()
        assert np.isfinite(y[[0, 2]]).all()
    fine = normals(rng, 3, 64)
    starts = np.array([0, 3], np.int32)
    for q, k, v in ((x, fine, fine), (fine, x, fine), (fine, fine, x)):
        y = ops.attention(q, k, v, starts, head_dim=64, scale=1.0, causal=False)
        assert not np.isfinite(ops.host(y)[1 if q is x else 0]).all()


@quiet
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@both_dtypes
def test_a_lane_that_is_not_finite(dtype: torch.dtype, bad: float) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, QuantType.Q4_0, 40, 64)
    lanes = Lanes(np.array([0, 1, 2], np.uint64), np.array([0, 1, 1], np.float32))
    for lane, fine in ((1, [0, 2]), (0, [])):  # lane 0 is the reference of the others
        x = normals(rng, 3, 64)
        x[lane, 3] = bad
        finite = np.isfinite(ops.host(ops.matmul(on_device(x, dtype), weight, lanes=lanes)))
        assert not finite[lane].any()
        assert finite[fine].all()


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def some_lanes(n: int, *options: object, coefficients: int | None = None) -> Lanes:
    return Lanes(
        np.ones(n, np.uint64), zeros(n if coefficients is None else coefficients), *options
    )


WEIGHT = random_weight(np.random.default_rng(0), QuantType.Q4_0, 8, 64)
TABLE = zeros(3, 2)


def product(rows: int = 4, n_in: int = 64, **options: object) -> Call:
    return call("matmul", zeros(rows, n_in), WEIGHT, **options)


def adapted(n_in: int, n_out: int, rank: int = 2, lanes: Lanes | None = None, **bases) -> Call:
    lora = LoRA(zeros(2, n_in), zeros(n_out, rank), 1.0, 0, **bases)
    lanes = lanes or Lanes(np.ones(2, np.uint64), zeros(2) + 1)
    return product(lora=lora, lanes=lanes)


def turned(width: int, position: int, table: np.ndarray = TABLE) -> Call:
    return call("rope", zeros(1, width), numbers(position), table, table, 8, True)


def attended(width: int, kv_width: int, *starts: int, tangents: int = 0) -> Call:
    q, k = zeros(3, width), zeros(3, kv_width)
    options = {"head_dim": 8, "scale": 1.0, "causal": True, "tangents": tangents}
    return call("attention", q, k, k, numbers(*starts), **options)


def loss(label: int, rows: int = 1, n_in: int = 64, **options: object) -> Call:
    return call("cross_entropy", zeros(rows, n_in), WEIGHT, numbers(*[label] * rows), **options)


REFUSED = {
    "rows of other columns": product(n_in=32),
    "rows of half a lane": product(3, lanes=some_lanes(2)),
    "no lanes": product(lanes=some_lanes(0)),
    "a bias of other columns": product(bias=zeros(7)),
    "A of other columns": adapted(60, 8),
    "B of other rows": adapted(64, 7),
    "two ranks": adapted(64, 8, 3),
    "a mask of other numbers": adapted(64, 8, mask=zeros(10)),
    "a basis of A of other columns": adapted(64, 8, basis_a=zeros(2, 60)),
    "a basis of B of other rows": adapted(64, 8, basis_b=zeros(2, 7)),
    "more parts than seeds": adapted(64, 8, lanes=some_lanes(2, "normal", False, numbers(0, 1, 2))),
    "a coefficient too few": adapted(64, 8, lanes=some_lanes(2, coefficients=1)),
    "an unknown distribution": adapted(64, 8, lanes=some_lanes(2, "uniform")),
    "a step along an unknown distribution": call(
        "seeded_axpy", zeros(4), SEED, zeros(1), distribution="uniform"
    ),
    "a product with one": call("seeded_dot", zeros(4), SEED, distribution="uniform"),
    "more coefficients than seeds": call("seeded_axpy", zeros(4), SEED, zeros(2)),
    "a token too many": call("embedding", WEIGHT, numbers(8)),
    "a token below 0": call("embedding", WEIGHT, numbers(3, -1)),
    "a label too many": loss(8),
    "a label below 0": loss(-1),
    "losses of other columns": loss(1, n_in=32),
    "losses of half a lane": loss(1, rows=4, lanes=some_lanes(3, "normal", True)),
    "a position too many": turned(8, 3),
    "a position below 0": turned(8, -1),
    "a turn of half a head": turned(12, 0),
    "turns of more than a head": turned(8, 0, zeros(3, 5)),
    "a gain of other columns": call("rms_norm", zeros(1, 8), zeros(7), 1e-5),
    "a shift of other columns": call("layer_norm", zeros(1, 8), zeros(8), zeros(7), 1e-5),
    "the norm of half a tangent": call("rms_norm", zeros(3, 8), zeros(8), 1e-5, 1),
    "half a tangent": call("gelu", zeros(3, 8), 1),
    "a gate of other columns": call("swiglu", zeros(3, 8), zeros(3, 7)),
    "starts before the end": attended(24, 24, 0, 2),
    "starts past the end": attended(24, 24, 0, 4),
    "starts that go back": attended(24, 24, 0, 2, 1, 3),
    "a tangent of other rows": attended(8, 8, 0, 2, 3, tangents=1),
    "half a group of heads": attended(24, 16, 0, 3),
    "half a head": attended(20, 20, 0, 3),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    """As the reference does: a GPU would read and write elsewhere."""
    for kernels in (reference, ops):
        with pytest.raises((ValueError, IndexError)):
            REFUSED[case](kernels)


# Arrays between operations


@exactness
@both_dtypes
def test_rows_of_new_lanes(dtype: torch.dtype, exact: bool) -> None:
    x = on_device(normals(np.random.default_rng(0), 3, 5), dtype)
    copies = ops.spread(x, some_lanes(2), exact)
    assert copies.dtype == dtype
    np.testing.assert_array_equal(ops.host(copies), np.tile(ops.host(x), (2, 1)))
    tangents = ops.spread(x, some_lanes(3, "normal", True), exact)
    assert tangents.dtype == (dtype if exact else torch.bfloat16)
    rounded = ops.host(x.to(tangents.dtype))
    np.testing.assert_array_equal(ops.host(tangents), np.concatenate([rounded, zeros(6, 5)]))


@both_dtypes
def test_some_rows_of_many(dtype: torch.dtype) -> None:
    x = on_device(normals(np.random.default_rng(0), 7, 5), dtype)
    for rows in (numbers(6, 0, 0), numbers()):
        got = ops.take(x, rows)
        assert got.dtype == dtype
        np.testing.assert_array_equal(ops.host(got), ops.host(x)[rows])


def test_arrays_there_and_back() -> None:
    x = normals(np.random.default_rng(0), 3, 5)
    np.testing.assert_array_equal(ops.host(ops.array(x)), x)
    np.testing.assert_array_equal(ops.host(x), x)
    there = ops.weight(WEIGHT)
    assert ops.weight(there) is there
    np.testing.assert_array_equal(ops.dequantize(there), reference.dequantize(WEIGHT))
    free = ops.free_bytes()
    assert free is None if INTERPRETED else free > 0
