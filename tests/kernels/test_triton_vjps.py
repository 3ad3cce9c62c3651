"""VJPs of the Triton kernels against the NumPy reference, on a GPU or else under the interpreter.

Shapes are as in test_triton.py: few and small, and they end inside tiles.
"""

from __future__ import annotations

from importlib import import_module
from operator import methodcaller as call
from typing import TypeAlias

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton", reason="triton is published for Linux on x86-64")
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_cpu import random_lora, relative_error
from test_kernels_cpu import types as every_type
from test_tangents import normals
from test_triton import BF16, both_dtypes, exactness, product_in_order
from weights import random_weight

from fwdllm.kernels import reference
from fwdllm.kernels import triton as ops
from fwdllm.kernels.triton import products
from fwdllm.kernels.triton.runtime import INTERPRETED
from fwdllm.kernels.types import LoRA, QuantType

import_module("interpreter")

Call: TypeAlias = call


def error(got: torch.Tensor, want: np.ndarray) -> float:
    assert got.dtype == torch.float32
    return relative_error(ops.host(got), want)


def stacked(
    rng: np.random.Generator, dtype: torch.dtype, *shape: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Rows on the device, and the same numbers here."""
    x = ops.array(normals(rng, *shape, scale=2)).to(dtype)
    return x, ops.host(x)


@pytest.fixture
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums in the order of the kernels alone, for tests of bits."""
    monkeypatch.setattr(products, "SCRATCH_ROWS", 10**9)
    if INTERPRETED:  # by NumPy, whose BLAS has an order of its own for each processor and shape
        monkeypatch.setattr(np, "matmul", product_in_order)


@both_dtypes
@settings(max_examples=10, deadline=None)
@given(rows=st.integers(1, 40), d=st.integers(1, 130))
def test_norms_and_activations(dtype: torch.dtype, rows: int, d: int) -> None:
    rng = np.random.default_rng(d)
    (x, x_here), (up, up_here), (dy, dy_here) = (stacked(rng, dtype, rows, d) for _ in range(3))
    w = normals(rng, d)
    pairs = [
        (ops.rms_norm_vjp(x, w, 1e-2, dy), reference.rms_norm_vjp(x_here, w, 1e-2, dy_here)),
        (ops.layer_norm_vjp(x, w, 1e-2, dy), reference.layer_norm_vjp(x_here, w, 1e-2, dy_here)),
        (ops.gelu_vjp(x, dy), reference.gelu_vjp(x_here, dy_here)),
        *zip(
            ops.swiglu_vjp(x, up, dy),
            reference.swiglu_vjp(x_here, up_here, dy_here),
            strict=True,
        ),
        *zip(ops.geglu_vjp(x, up, dy), reference.geglu_vjp(x_here, up_here, dy_here), strict=True),
    ]
    for got, want in pairs:
        assert got.dtype == torch.float32
        atol = 1e-5 * (1 + np.abs(want).max())
        np.testing.assert_allclose(ops.host(got), want, rtol=3e-5, atol=atol)


def test_rows_longer_than_a_tile() -> None:
    rng = np.random.default_rng(0)
    x, dy, w = normals(rng, 2, 5000), normals(rng, 2, 5000), normals(rng, 5000)
    for name in ("rms_norm_vjp", "layer_norm_vjp"):
        vjp = call(name, x, w, 1e-2, dy)
        assert error(vjp(ops), vjp(reference)) < 1e-6


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_activations_do_not_overflow() -> None:
    x = np.array([[-3e4, -200, -90, 0, 90, 200, 3e4]], np.float32)
    got = [*ops.swiglu_vjp(x, x + 1, x + 2), ops.gelu_vjp(x, x + 1)]
    want = [*reference.swiglu_vjp(x, x + 1, x + 2), reference.gelu_vjp(x, x + 1)]
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(ops.host(a), b, rtol=3e-5, atol=1e-5)


@every_type
def test_matmul(type: QuantType) -> None:
    rng = np.random.default_rng(0)
    weight, lora = random_weight(rng, type, 33, 256), random_lora(rng, 256, 33, 3)
    dy = normals(rng, 19, 33)
    for adapter in (lora, None):
        want = reference.matmul_vjp(dy, weight, lora=adapter)
        assert error(ops.matmul_vjp(dy, weight, lora=adapter, exact=True), want) < 1e-6
    assert error(ops.matmul_vjp(dy, weight), want) < BF16


def test_a_sum_of_several_programs() -> None:
    rng = np.random.default_rng(0)
    weight, lora = random_weight(rng, QuantType.Q4_0, 530, 96), random_lora(rng, 96, 530, 3)
    dy = normals(rng, 2, 530)
    want = reference.matmul_vjp(dy, weight, lora=lora)
    assert error(ops.matmul_vjp(dy, weight, lora=lora, exact=True), want) < 1e-6
    assert error(ops.matmul_vjp(dy, weight, lora=lora), want) < BF16


@pytest.mark.parametrize("type", [QuantType.F32, QuantType.BF16])
@settings(max_examples=5, deadline=None)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 90), st.integers(1, 9))
def test_matmul_of_odd_shapes(type: QuantType, rows: int, n_in: int, n_out: int, rank: int) -> None:
    rng = np.random.default_rng(0)
    weight, lora = random_weight(rng, type, n_out, n_in), random_lora(rng, n_in, n_out, rank)
    dy = normals(rng, rows, n_out)
    want = reference.matmul_vjp(dy, weight, lora=lora)
    assert error(ops.matmul_vjp(dy, weight, lora=lora, exact=True), want) < 1e-5


@pytest.mark.parametrize("type", [QuantType.Q4_0, QuantType.Q6_K], ids=lambda t: t.name)
def test_both_routes_agree(monkeypatch: pytest.MonkeyPatch, type: QuantType) -> None:
    """Weights decoded where they are multiplied, all of them at once, and some at a time."""
    rng = np.random.default_rng(6)
    weight = ops.weight(random_weight(rng, type, 70, 256))
    dy, _ = stacked(rng, torch.float32, 21, 70)
    monkeypatch.setattr(products, "SCRATCH_ROWS", 22)
    fused = ops.host(ops.matmul_vjp(dy, weight))
    monkeypatch.setattr(products, "SCRATCH_ROWS", 21)
    monkeypatch.setattr(products, "decode", None)  # what the kernel of the other route calls
    for rows in (70, 32):
        monkeypatch.setattr(products, "SCRATCH_BYTES", rows * 2 * 256)
        assert error(ops.matmul_vjp(dy, weight), fused) < 1e-5


@both_dtypes
@settings(max_examples=5, deadline=None)
@given(
    rows=st.integers(1, 30),
    n_in=st.integers(1, 100),
    n_out=st.integers(1, 100),
    rank=st.sampled_from([1, 3, 8, 17]),
)
def test_lora(dtype: torch.dtype, rows: int, n_in: int, n_out: int, rank: int) -> None:
    rng = np.random.default_rng(rows)
    (x, x_here), (dy, dy_here) = (stacked(rng, dtype, rows, n) for n in (n_in, n_out))
    lora = random_lora(rng, n_in, n_out, rank)
    want = [np.ones_like(lora.a), np.ones_like(lora.b)]  # added to what is there
    here, there = [x.copy() for x in want], [ops.array(x).clone() for x in want]
    reference.lora_vjp(x_here, dy_here, lora, *want)
    for found in (here, there):  # in place, wherever it is
        ops.lora_vjp(x, dy, lora, *found)
        for got, exact in zip(found, want, strict=True):
            # Factors are rounded to bfloat16 beside such rows. What is added may cancel the ones.
            most = 1e-5 if dtype == torch.float32 else BF16
            size = np.linalg.norm(1 + np.abs(exact - 1))
            assert np.linalg.norm(ops.host(got) - exact) < most * size


def test_rows_in_several_calls_give_the_bits_of_one(in_order: None) -> None:
    rng = np.random.default_rng(1)
    x, dy = normals(rng, 37, 40), normals(rng, 37, 70)
    lora = random_lora(rng, 40, 70, 5)
    found = []
    for ends in ([37], [1, 18, 18, 37]):
        found.append([normals(np.random.default_rng(2), *f.shape) for f in (lora.a, lora.b)])
        for begin, end in zip([0, *ends], ends, strict=False):
            ops.lora_vjp(x[begin:end], dy[begin:end], lora, *found[-1])
    for one, several in zip(*found, strict=True):
        np.testing.assert_array_equal(one, several)


def test_an_exact_row_has_its_bits_in_any_company(in_order: None) -> None:
    rng = np.random.default_rng(3)
    weight, lora = random_weight(rng, QuantType.Q4_0, 530, 64), random_lora(rng, 64, 530, 4)
    dy, x = normals(rng, 19, 530), normals(rng, 19, 64)
    labels = rng.integers(0, 530, 19).astype(np.int32)

    def run(rows: slice) -> list[np.ndarray]:
        dx = ops.matmul_vjp(dy[rows], weight, lora=lora, exact=True)
        losses, of_x = ops.cross_entropy_vjp(x[rows], weight, labels[rows], exact=True)
        return [ops.host(found) for found in (dx, losses, of_x)]

    for among, alone in zip(run(slice(0, 19)), run(slice(17, 19)), strict=True):
        np.testing.assert_array_equal(among[17:], alone)


@exactness
@pytest.mark.parametrize("type", [QuantType.F32, QuantType.Q4_0], ids=lambda t: t.name)
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, exact: bool, type: QuantType, softcap: float
) -> None:
    """Of a vocabulary in three parts, and of rows in as many as their logits have room for."""
    module = import_module("fwdllm.kernels.triton.cross_entropy")
    monkeypatch.setattr(module, "_WORDS", 64)
    monkeypatch.setattr(module, "_LOGITS_BYTES", 4 * 4 * 64)
    rng = np.random.default_rng(7)
    weight = random_weight(rng, type, 150, 64, scale=0.1)
    x = normals(rng, 6, 64)
    labels = rng.integers(0, 150, 6).astype(np.int32)
    # Rows whose largest logit is the first, or the last; of the last row it is the label's.
    w = reference.dequantize(weight)
    x[:3] = 10 * w[[0, -1, 77]] / np.abs(w).max() / 0.3
    labels[:3] = 149, 0, 77
    losses, dx = ops.cross_entropy_vjp(x, weight, labels, softcap=softcap, exact=exact)
    assert (losses.dtype, dx.dtype) == (torch.float64, torch.float32)
    plain = ops.cross_entropy(x, weight, labels, softcap=softcap, exact=exact)
    np.testing.assert_array_equal(ops.host(losses), ops.host(plain))
    want_losses, want = reference.cross_entropy_vjp(x, weight, labels, softcap=softcap)
    most = 1e-5 if exact else 0.02
    assert np.abs(ops.host(losses) - want_losses).max() < most * (1 + want_losses.max())
    for got, row in zip(ops.host(dx), want, strict=True):
        assert np.abs(got - row).max() < most * (np.abs(row).max() + np.abs(w).max())


@both_dtypes
@settings(max_examples=6, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 7, 33]), min_size=1, max_size=2),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    head_dim=st.sampled_from([5, 32, 80]),
    mask=st.tuples(st.booleans(), st.sampled_from([0, 1, 9, 40])),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_attention(
    dtype: torch.dtype,
    lengths: list[int],
    kv_heads: int,
    group: int,
    head_dim: int,
    mask: tuple[bool, int],
    softcap: float,
) -> None:
    rng = np.random.default_rng(sum(lengths))
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    rows, width = sum(lengths), kv_heads * head_dim
    q, k, v, dy = (
        ops.array(normals(rng, rows, w)).to(dtype)
        for w in (group * width, width, width, group * width)
    )
    options = {"head_dim": head_dim, "scale": 0.3, "softcap": softcap}
    options["causal"], options["window"] = mask
    found = ops.attention_vjp(q, k, v, starts, dy, **options)
    q, k, v, dy = map(ops.host, (q, k, v, dy))
    want = reference.attention_vjp(q, k, v, starts, dy, **options)
    for got, exact in zip(found, want, strict=True):
        assert got.dtype == torch.float32
        # Against all of it: where a query sees one key, dQ and dK are next to nothing.
        scale = 1 + np.abs(exact).max(initial=0)
        most = 1e-5 if dtype == torch.float32 else 4 * BF16
        np.testing.assert_allclose(ops.host(got), exact, rtol=most, atol=most * scale)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [1, 9, 40])
def test_windows_over_several_blocks(causal: bool, window: int) -> None:
    rng, starts = np.random.default_rng(0), np.array([0, 3, 100], np.int32)
    q, k, v, dy = (normals(rng, 100, 5) for _ in range(4))
    options = {"head_dim": 5, "scale": 0.3, "causal": causal, "window": window}
    found = ops.attention_vjp(q, k, v, starts, dy, **options)
    for got, want in zip(
        found, reference.attention_vjp(q, k, v, starts, dy, **options), strict=True
    ):
        np.testing.assert_allclose(ops.host(got), want, rtol=1e-5, atol=1e-5)


@both_dtypes
@pytest.mark.parametrize("mask", [(True, 0), (False, 12)])
def test_a_sequence_has_the_same_bits_in_any_company(
    dtype: torch.dtype, mask: tuple[bool, int]
) -> None:
    rng = np.random.default_rng(0)
    q, k, v, dy = (ops.array(normals(rng, 71, w)).to(dtype) for w in (40, 20, 20, 40))
    options = {"head_dim": 20, "scale": 0.3, "causal": mask[0], "window": mask[1]}
    among = ops.attention_vjp(q, k, v, np.array([0, 50, 71], np.int32), dy, **options)
    own = slice(50, 71)
    starts = np.array([0, 21], np.int32)
    alone = ops.attention_vjp(q[own], k[own], v[own], starts, dy[own], **options)
    for some, mine in zip(among, alone, strict=True):
        np.testing.assert_array_equal(ops.host(some)[own], ops.host(mine))


def test_no_rows() -> None:
    rng = np.random.default_rng(6)
    weight, lora = random_weight(rng, QuantType.F32, 7, 5), random_lora(rng, 5, 7, 2)
    x, dy, none = normals(rng, 0, 5), normals(rng, 0, 7), np.empty(0, np.int32)
    assert ops.matmul_vjp(dy, weight, lora=lora).shape == (0, 5)
    assert [len(found) for found in ops.cross_entropy_vjp(x, weight, none)] == [0, 0]
    assert ops.gelu_vjp(x, x).shape == (0, 5)
    da = np.ones_like(lora.a)
    ops.lora_vjp(x, dy, lora, da, np.ones_like(lora.b))
    np.testing.assert_array_equal(da, 1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_values_are_not_swallowed(bad: float) -> None:
    rng = np.random.default_rng(0)
    weight, lora = random_weight(rng, QuantType.Q4_0, 64, 64), random_lora(rng, 64, 64, 2)
    x, dy, w = normals(rng, 3, 64), normals(rng, 3, 64), normals(rng, 64)
    labels = np.array([1, 2, 3], np.int32)
    x[1, 5] = dy[1, 5] = bad
    found = [
        ops.matmul_vjp(dy, weight, exact=True),
        ops.matmul_vjp(dy, weight, lora=lora),
        ops.cross_entropy_vjp(x, weight, labels)[0][:, None],
        ops.cross_entropy_vjp(x, weight, labels)[1],
        ops.rms_norm_vjp(x, w, 1e-5, dy),
        ops.layer_norm_vjp(x, w, 1e-5, dy),
        ops.gelu_vjp(x, dy),
        ops.swiglu_vjp(x, x, dy)[0],
    ]
    for y in map(ops.host, found):
        assert np.isfinite(y).all(axis=1).tolist() == [True, False, True]
    starts, fine = np.array([0, 3], np.int32), normals(rng, 3, 64)
    options = {"head_dim": 64, "scale": 1.0, "causal": False}
    for q, of_y in ((x, fine), (fine, dy)):
        dq, _, dv = ops.attention_vjp(q, fine, fine, starts, of_y, **options)
        assert np.isfinite(ops.host(dq)).all(axis=1).tolist() == [True, False, True]
        assert not np.isfinite(ops.host(dv)).all()
    da, db = np.zeros_like(lora.a), np.zeros_like(lora.b)
    ops.lora_vjp(x, dy, lora, da, db)
    assert not np.isfinite(da).all()
    assert not np.isfinite(db).all()


def zeros(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def numbers(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


WEIGHT = random_weight(np.random.default_rng(0), QuantType.Q4_0, 8, 64)
FACTORS = LoRA(zeros(2, 64), zeros(8, 2), 1.0, 0)


def of_factors(
    x: tuple[int, int] = (3, 64),
    dy: tuple[int, int] = (3, 8),
    da: tuple[int, int] = (2, 64),
    db: tuple[int, int] = (8, 2),
) -> Call:
    return call("lora_vjp", zeros(*x), zeros(*dy), FACTORS, zeros(*da), zeros(*db))


def attended(width: int, kv_width: int, dy_width: int, *starts: int) -> Call:
    q, k, dy = zeros(3, width), zeros(3, kv_width), zeros(3, dy_width)
    options = {"head_dim": 8, "scale": 1.0, "causal": True}
    return call("attention_vjp", q, k, k, numbers(*starts), dy, **options)


REFUSED = {
    "cotangents of other columns": call("matmul_vjp", zeros(3, 7), WEIGHT),
    "factors of other columns": call(
        "matmul_vjp", zeros(3, 8), WEIGHT, lora=LoRA(zeros(2, 60), zeros(8, 2), 1.0, 0)
    ),
    "rows of other columns": of_factors(x=(3, 60)),
    "cotangents of other rows": of_factors(dy=(2, 8)),
    "a cotangent of another A": of_factors(da=(2, 60)),
    "a cotangent of another B": of_factors(db=(2, 8)),
    "a label too many": call("cross_entropy_vjp", zeros(1, 64), WEIGHT, numbers(8)),
    "losses of other columns": call("cross_entropy_vjp", zeros(1, 32), WEIGHT, numbers(1)),
    "a label too few": call("cross_entropy_vjp", zeros(2, 64), WEIGHT, numbers(1)),
    "a gain of other columns": call("rms_norm_vjp", zeros(1, 8), zeros(7), 1e-5, zeros(1, 8)),
    "another norm's rows": call("layer_norm_vjp", zeros(2, 8), zeros(8), 1e-5, zeros(3, 8)),
    "other activations": call("gelu_vjp", zeros(3, 8), zeros(3, 7)),
    "another gate": call("swiglu_vjp", zeros(3, 8), zeros(3, 7), zeros(3, 8)),
    "starts past the end": attended(24, 24, 24, 0, 4),
    "starts that go back": attended(24, 24, 24, 0, 2, 1, 3),
    "half a group of heads": attended(24, 16, 24, 0, 3),
    "cotangents of other heads": attended(24, 24, 16, 0, 3),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case: str) -> None:
    """A GPU would read and write elsewhere."""
    with pytest.raises((ValueError, IndexError)):
        REFUSED[case](ops)
