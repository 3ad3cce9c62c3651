"""VJPs of operations: the reference and the C++ kernels against torch's autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_cpu import QUANTIZED, random_lora, relative_error
from test_tangents import attend, capped, masks, normals
from weights import random_weight

from fwdllm.kernels import cpu, reference
from fwdllm.kernels.reference import dequantize
from fwdllm.kernels.types import SUPPORTED_TYPES, QuantType

kernels = pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])


def autograd(
    f: Callable[..., torch.Tensor], dy: np.ndarray, *inputs: np.ndarray
) -> list[np.ndarray]:
    """The gradients of f(inputs) . dy by the inputs, in float64."""
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in inputs]
    f(*leaves).backward(torch.tensor(dy, dtype=torch.float64))
    return [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None]


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-5 * (1 + np.abs(want).max()))


@kernels
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 40), d=st.integers(1, 130))
def test_norms_and_activations(ops: ModuleType, rows: int, d: int) -> None:
    rng = np.random.default_rng(d)
    x, up, dy = (normals(rng, rows, d, scale=2) for _ in range(3))
    weight = normals(rng, d)
    w = torch.tensor(weight, dtype=torch.float64)
    cases = [
        ([ops.rms_norm_vjp(x, weight, 1e-2, dy)], lambda x: F.rms_norm(x, (d,), w, 1e-2), (x,)),
        (
            [ops.layer_norm_vjp(x, weight, 1e-2, dy)],
            lambda x: F.layer_norm(x, (d,), w, w, 1e-2),
            (x,),
        ),
        (ops.swiglu_vjp(x, up, dy), lambda g, u: F.silu(g) * u, (x, up)),
        (ops.geglu_vjp(x, up, dy), lambda g, u: F.gelu(g, approximate="tanh") * u, (x, up)),
        ([ops.gelu_vjp(x, dy)], lambda x: F.gelu(x, approximate="tanh"), (x,)),
    ]
    for found, f, inputs in cases:
        for got, want in zip(found, autograd(f, dy, *inputs), strict=True):
            assert_close(got, want)


@kernels
@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_backwards_is_rope_with_the_other_sine(ops: ModuleType, interleaved: bool) -> None:
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 9, 5).astype(np.int32)
    x, dy = normals(rng, 5, 3 * 14), normals(rng, 5, 3 * 14)
    cos, sin = normals(rng, 9, 6), normals(rng, 9, 6)  # of a scaled embedding no rotation
    y = ops.rope(x, positions, cos, sin, 14, interleaved)
    dx = ops.rope(dy, positions, cos, -sin, 14, interleaved)
    assert float(np.vdot(y, dy)) == pytest.approx(float(np.vdot(x, dx)), rel=1e-4)


@kernels
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 20, 64]),
    mask=masks,
    softcap=st.sampled_from([0.0, 0.7, 50.0]),
)
def test_attention(
    ops: ModuleType, lengths: list[int], kv_heads: int, group: int, head_dim: int,
    mask: tuple[bool, int], softcap: float,
) -> None:  # fmt: skip
    rng = np.random.default_rng(sum(lengths))
    rows, starts = sum(lengths), np.cumsum([0, *lengths]).astype(np.int32)
    q, dy = (normals(rng, rows, kv_heads * group * head_dim) for _ in range(2))
    k, v = (normals(rng, rows, kv_heads * head_dim) for _ in range(2))
    options = {"causal": mask[0], "window": mask[1], "softcap": softcap, "head_dim": head_dim}
    want = autograd(lambda q, k, v: attend(q, k, v, starts, **options), dy, q, k, v)
    options["scale"] = head_dim**-0.5
    found = ops.attention_vjp(q, k, v, starts, dy, **options)
    for got, exact in zip(found, want, strict=True):
        assert_close(got, exact)
    if ops is cpu:  # a sequence has its bits in any company
        last = slice(starts[-2], starts[-1])
        alone = np.array([0, lengths[-1]], np.int32)
        again = ops.attention_vjp(q[last], k[last], v[last], alone, dy[last], **options)
        for got, mine in zip(found, again, strict=True):
            np.testing.assert_array_equal(got[last], mine)


@settings(max_examples=60, deadline=None)
@given(
    type=st.sampled_from(SUPPORTED_TYPES),
    rows=st.integers(1, 30),
    n_in=st.integers(1, 4),
    n_out=st.integers(1, 150),
    rank=st.integers(0, 9),
    seed=st.integers(0, 99),
)
def test_matmul(type: QuantType, rows: int, n_in: int, n_out: int, rank: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight = random_weight(rng, type, n_out, 256 * n_in if type in QUANTIZED else 61 * n_in)
    dy = normals(rng, rows, n_out)
    lora = random_lora(rng, weight.n_in, n_out, rank) if rank else None
    w = dequantize(weight).astype(np.float64)
    want = dy @ w
    most = 1e-6 * float(np.linalg.norm(want))
    if lora is not None:
        want += lora.scale * (dy @ lora.b.astype(np.float64)) @ lora.a
        # Sums of few ranks may cancel, and with one rank such a sum is in every element.
        terms = lora.scale * (np.abs(dy) @ np.abs(lora.b)) @ np.abs(lora.a)
        most += 1e-7 * float(np.linalg.norm(terms))
    assert np.linalg.norm(reference.matmul_vjp(dy, weight, lora=lora) - want) < most
    assert np.linalg.norm(cpu.matmul_vjp(dy, weight, lora=lora, exact=True) - want) < most
    fast = cpu.matmul_vjp(dy, weight, lora=lora)
    assert relative_error(fast, want) < (0.02 if type in QUANTIZED else 5e-3)
    half = rows // 2  # a row has its bits in any company
    np.testing.assert_array_equal(cpu.matmul_vjp(dy[half:], weight, lora=lora), fast[half:])


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 60),
    n_in=st.integers(1, 100),
    n_out=st.integers(1, 100),
    rank=st.integers(1, 9),
)
def test_lora(rows: int, n_in: int, n_out: int, rank: int) -> None:
    rng = np.random.default_rng(rows)
    x, dy = normals(rng, rows, n_in), normals(rng, rows, n_out)
    lora = random_lora(rng, n_in, n_out, rank)
    want = autograd(
        lambda a, b: lora.scale * torch.tensor(x, dtype=torch.float64) @ a.T @ b.T,
        dy,
        lora.a,
        lora.b,
    )
    for ops in (reference, cpu):
        found = [np.ones_like(lora.a), np.ones_like(lora.b)]  # added to what is there
        ops.lora_vjp(x, dy, lora, *found)
        for got, exact in zip(found, want, strict=True):
            assert_close(got, exact + 1)
    half = rows // 2  # rows in two calls give the bits of one
    again = [np.ones_like(lora.a), np.ones_like(lora.b)]
    for part in (slice(0, half), slice(half, rows)):
        cpu.lora_vjp(x[part], dy[part], lora, *again)
    np.testing.assert_array_equal(again[0], found[0])
    np.testing.assert_array_equal(again[1], found[1])


@settings(max_examples=25, deadline=None)
@given(
    type=st.sampled_from(SUPPORTED_TYPES),
    rows=st.integers(1, 20),
    vocabulary=st.sampled_from([1, 7, 300, 2048, 2080, 4500]),
    scale=st.sampled_from([1.0, 30.0]),
    softcap=st.sampled_from([0.0, 5.0]),
)
def test_cross_entropy(
    type: QuantType, rows: int, vocabulary: int, scale: float, softcap: float
) -> None:
    rng = np.random.default_rng(rows)
    weight = random_weight(rng, type, vocabulary, 256)
    labels = rng.integers(0, vocabulary, rows).astype(np.int32)
    w = torch.tensor(dequantize(weight), dtype=torch.float64)
    # Logits of about ``scale``
    x = normals(rng, rows, 256, scale=scale / float(w.norm(dim=1).mean()))
    [want] = autograd(
        lambda x: F.cross_entropy(
            capped(x @ w.T, softcap), torch.tensor(labels).long(), reduction="none"
        ),
        np.ones(rows, np.float32),
        x,
    )
    for ops in (reference, cpu):
        nll, dx = ops.cross_entropy_vjp(x, weight, labels, softcap=softcap, exact=True)
        plain = ops.cross_entropy(x, weight, labels, softcap=softcap, exact=True)
        np.testing.assert_allclose(nll, plain)
        assert np.abs(dx - want).max() < 1e-5 * (1 + scale) * (1 + np.abs(want).max())
    nll, dx = cpu.cross_entropy_vjp(x, weight, labels, softcap=softcap)
    np.testing.assert_array_equal(nll, cpu.cross_entropy(x, weight, labels, softcap=softcap))
    # Rounded logits are other probabilities, so they are compared with those that they are.
    logits = torch.tensor(cpu.matmul(x, weight), dtype=torch.float64, requires_grad=True)
    loss = F.cross_entropy(capped(logits, softcap), torch.tensor(labels).long(), reduction="sum")
    [gone] = torch.autograd.grad(loss, logits)
    assert np.abs(dx - (gone @ w).numpy()).max() < 0.01 * np.abs(w.numpy()).max()
    alone = cpu.cross_entropy_vjp(x[-1:], weight, labels[-1:], softcap=softcap)
    np.testing.assert_array_equal(alone[1], dx[-1:])


def test_threads_change_no_bit() -> None:
    rng = np.random.default_rng(3)
    weight = random_weight(rng, QuantType.Q4_0, 320, 512)
    dy, x = normals(rng, 33, 320), normals(rng, 33, 512)
    lora = random_lora(rng, 512, 320, 5)
    labels = rng.integers(0, 320, 33).astype(np.int32)

    def everything() -> list[np.ndarray]:
        da, db = np.zeros_like(lora.a), np.zeros_like(lora.b)
        cpu.lora_vjp(x, dy, lora, da, db)
        return [
            cpu.matmul_vjp(dy, weight, lora=lora),
            cpu.cross_entropy_vjp(x, weight, labels)[1],
            da,
            db,
        ]

    before = cpu.num_threads()
    want = everything()
    try:
        for n in (1, 3):
            cpu.set_num_threads(n)
            for got, expected in zip(everything(), want, strict=True):
                np.testing.assert_array_equal(got, expected)
    finally:
        cpu.set_num_threads(before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_seen(bad: float) -> None:
    rng = np.random.default_rng(4)
    weight = random_weight(rng, QuantType.Q4_0, 64, 64)
    dy = normals(rng, 3, 64)
    dy[1, 5] = bad
    for exact in (False, True):
        dx = cpu.matmul_vjp(dy, weight, exact=exact)
        assert np.isfinite(dx).all(axis=1).tolist() == [True, False, True]
    half = np.array(weight.data)
    half[9, :2] = np.array(bad, np.float16).reshape(1).view(np.uint8)  # a block's scale
    broken = type(weight)(half, weight.type, weight.n_out, weight.n_in)
    assert not np.isfinite(cpu.matmul_vjp(normals(rng, 3, 64), broken)).all()
