"""The NumPy reference against independent implementations: gguf-py and PyTorch."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf import GGML_QUANT_SIZES
from gguf import quants as gguf_quants
from hypothesis import given, settings
from hypothesis import strategies as st
from weights import every_scale_of_mxfp4, random_weight

from fwdllm.kernels import reference
from fwdllm.kernels.types import DISTRIBUTIONS, SUPPORTED_TYPES, Lanes, LoRA, QuantType

# One rounding from float64 to float32 on each side.
FLOAT32 = {"rtol": 1.2e-7, "atol": 1e-30}


def normals(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def float64(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.asarray(x, np.float64))


def assert_same(ours: np.ndarray, theirs: torch.Tensor) -> None:
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs.numpy(), **FLOAT32)


# --- decode -----------------------------------------------------------------------------

every_type = pytest.mark.parametrize("type", SUPPORTED_TYPES, ids=lambda t: t.name)


@every_type
@pytest.mark.parametrize("n_out", [1, 5, 17])
def test_dequantize_is_ggufs_bit_for_bit(type: QuantType, n_out: int) -> None:
    n_in = 3 * max(GGML_QUANT_SIZES[type][0], 7)
    weight = random_weight(np.random.default_rng(n_out), type, n_out, n_in, 1.0)
    got = reference.dequantize(weight)
    assert got.dtype == np.float32
    want = gguf_quants.dequantize(weight.data, type).reshape(n_out, n_in)
    np.testing.assert_array_equal(got, want)


def test_every_scale_of_mxfp4() -> None:
    """From subnormal ones to those of numbers above the largest float32."""
    weight = every_scale_of_mxfp4()
    got = reference.dequantize(weight)
    with np.errstate(over="ignore"):
        want = gguf_quants.dequantize(weight.data, weight.type)
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    assert got[0, 1] == 2.0**-128 and np.isinf(got[255, 7])


@every_type
def test_embedding_is_rows_of_the_matrix(type: QuantType) -> None:
    weight = random_weight(np.random.default_rng(0), type, 9, 512, 1.0)
    ids = np.array([8, 0, 3, 3], np.int32)
    got = reference.embedding(weight, ids)
    np.testing.assert_array_equal(got, reference.dequantize(weight)[ids])
    assert reference.embedding(weight, ids[:0]).shape == (0, 512)


def test_embedding_decodes_only_the_rows_asked() -> None:
    weight = random_weight(np.random.default_rng(0), QuantType.Q4_0, 20_000, 256, 1.0)
    tracemalloc.start()
    reference.embedding(weight, np.array([1, 19_999], np.int32))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000  # the whole matrix is 20 MB


@pytest.mark.parametrize("bad", [-1, 9])
def test_indices_outside_are_refused(bad: int) -> None:
    weight = random_weight(np.random.default_rng(0), QuantType.F32, 9, 4, 1.0)
    ids, x = np.array([0, bad], np.int32), np.ones((2, 4), np.float32)
    table = np.ones((9, 2), np.float32)
    with pytest.raises(IndexError, match="token ids"):
        reference.embedding(weight, ids)
    with pytest.raises(IndexError, match="labels"):
        reference.cross_entropy(x, weight, ids)
    with pytest.raises(IndexError, match="positions"):
        reference.rope(x, ids, table, table, 4, False)


# --- linear -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    type=st.sampled_from(SUPPORTED_TYPES),
    n_lanes=st.integers(1, 4),
    rows_per_lane=st.integers(0, 3),
    n_out=st.integers(1, 9),
    rank=st.integers(1, 4),
    distribution=st.sampled_from(DISTRIBUTIONS),
    offset=st.integers(0, 2**34),
    seed=st.integers(0, 1000),
)
def test_matmul_is_the_materialized_formula(
    type: QuantType, n_lanes: int, rows_per_lane: int, n_out: int, rank: int,
    distribution: str, offset: int, seed: int,
) -> None:  # fmt: skip
    rng, n_in = np.random.default_rng(seed), 256
    weight = random_weight(rng, type, n_out, n_in)
    x, bias = normals(rng, n_lanes * rows_per_lane, n_in), normals(rng, n_out)
    lora = LoRA(normals(rng, rank, n_in), normals(rng, n_out, rank), 1.5, offset)
    lanes = Lanes(
        rng.integers(0, 2**64 - 1, n_lanes, np.uint64, endpoint=True),
        normals(rng, n_lanes),
        distribution,
    )
    got = reference.matmul(x, weight, bias=bias, lora=lora, lanes=lanes)

    w, n_a = float64(reference.dequantize(weight)), rank * n_in
    for lane in range(n_lanes):
        rows = slice(lane * rows_per_lane, (lane + 1) * rows_per_lane)
        stream = getattr(reference, distribution)
        z = float64(stream(int(lanes.seeds[lane]), offset, n_a + n_out * rank))
        z = z * float(lanes.coefficients[lane])
        a = float64(lora.a) + z[:n_a].view(rank, n_in)
        b = float64(lora.b) + z[n_a:].view(n_out, rank)
        want = F.linear(float64(x[rows]), w + 1.5 * b @ a, float64(bias))
        np.testing.assert_allclose(got[rows], want.numpy(), rtol=1e-7, atol=1e-11)

        alone = Lanes(lanes.seeds[[lane]], lanes.coefficients[[lane]], distribution)
        same = reference.matmul(x[rows], weight, bias=bias, lora=lora, lanes=alone, exact=True)
        np.testing.assert_array_equal(same, got[rows])
    assert got.dtype == np.float32


def test_matmul_parts_are_optional() -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, QuantType.Q8_0, 6, 64, 1.0)
    x, w = normals(rng, 4, 64), float64(reference.dequantize(weight))
    lora = LoRA(normals(rng, 2, 64), normals(rng, 6, 2), 2.0, 0)
    lanes = Lanes(np.array([1, 2], np.uint64), np.ones(2, np.float32))
    plain = F.linear(float64(x), w)
    adapted = plain + 2.0 * float64(x) @ float64(lora.a).T @ float64(lora.b).T
    assert_same(reference.matmul(x, weight), plain)
    assert_same(reference.matmul(x, weight, lanes=lanes), plain)
    assert_same(reference.matmul(x, weight, lora=lora), adapted)
    assert_same(reference.matmul(x, weight, lora=lora, lanes=Lanes.plain()), adapted)


@pytest.mark.parametrize("n_lanes", [0, 3])
def test_matmul_refuses_unequal_lanes(n_lanes: int) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, QuantType.F32, 6, 8, 1.0)
    lora = LoRA(normals(rng, 2, 8), normals(rng, 6, 2), 2.0, 0)
    lanes = Lanes(np.zeros(n_lanes, np.uint64), np.zeros(n_lanes, np.float32))
    with pytest.raises(ValueError, match=f"4 rows are not {n_lanes} equal lanes"):
        reference.matmul(normals(rng, 4, 8), weight, lora=lora, lanes=lanes)


# --- layers -----------------------------------------------------------------------------


@settings(deadline=None)
@given(rows=st.integers(0, 5), d=st.integers(1, 40), scale=st.sampled_from([1e-4, 1, 1e4]))
def test_norms(rows: int, d: int, scale: float) -> None:
    rng = np.random.default_rng(d)
    x, weight, bias = normals(rng, rows, d) * np.float32(scale), normals(rng, d), normals(rng, d)
    wide_x, wide_weight, wide_bias = float64(x), float64(weight), float64(bias)
    assert_same(reference.rms_norm(x, weight, 1e-5), F.rms_norm(wide_x, (d,), wide_weight, 1e-5))
    np.testing.assert_allclose(
        reference.layer_norm(x, weight, bias, 1e-12),
        F.layer_norm(wide_x, (d,), wide_weight, wide_bias, 1e-12).numpy(),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("rot", [2, 6, 8])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_is_a_complex_rotation(rot: int, interleaved: bool) -> None:
    rng, head_dim, n_heads = np.random.default_rng(0), 8, 3
    positions = np.array([4, 0, 9, 9], np.int32)
    x = normals(rng, 4, n_heads * head_dim)
    angles = np.arange(10)[:, None] * 100.0 ** -np.arange(0, 1, 2 / rot)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    heads = float64(x).view(4, n_heads, head_dim)
    turned, passed = heads[..., :rot], heads[..., rot:]
    if not interleaved:  # bring (i, i + rot / 2) together
        turned = turned.unflatten(-1, (2, rot // 2)).transpose(-1, -2).flatten(-2)
    pairs = torch.view_as_complex(turned.unflatten(-1, (rot // 2, 2)).contiguous())
    turn = torch.complex(float64(cos[positions]), float64(sin[positions]))[:, None, :]
    turned = torch.view_as_real(pairs * turn).flatten(-2)
    if not interleaved:
        turned = turned.unflatten(-1, (rot // 2, 2)).transpose(-1, -2).flatten(-2)
    want = torch.cat([turned, passed], dim=-1).flatten(1)
    assert_same(reference.rope(x, positions, cos, sin, head_dim, interleaved), want)


@pytest.mark.parametrize("causal", [True, False])
@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=4),
    n_kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
)
def test_attention(causal: bool, lengths: list[int], n_kv_heads: int, group: int) -> None:
    rng, head_dim, rows = np.random.default_rng(sum(lengths)), 5, sum(lengths)
    q = 3 * normals(rng, rows, n_kv_heads * group * head_dim)
    k, v = (normals(rng, rows, n_kv_heads * head_dim) for _ in range(2))
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    options = {"head_dim": head_dim, "scale": 0.3, "causal": causal}
    got = reference.attention(q, k, v, starts, **options)

    sequence = torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))
    mask = sequence[:, None] == sequence[None, :]
    if causal:
        mask = mask.tril()
    heads = [float64(t).unflatten(1, (-1, head_dim)).movedim(1, 0) for t in (q, k, v)]
    want = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=0.3, enable_gqa=True)
    assert got.dtype == np.float32
    np.testing.assert_allclose(
        got, want.movedim(0, 1).reshape(q.shape).numpy(), rtol=1e-7, atol=1e-13
    )
    for begin, end in pairwise(starts):  # batch invariance
        s = slice(begin, end)
        alone = np.array([0, end - begin], np.int32)
        np.testing.assert_array_equal(
            reference.attention(q[s], k[s], v[s], alone, **options), got[s]
        )


@pytest.mark.parametrize("starts", [[1, 4], [0, 3], [0, 3, 2, 4]])
def test_attention_refuses_bad_starts(starts: list[int]) -> None:
    x = np.ones((4, 2), np.float32)
    with pytest.raises(ValueError, match="from 0 to 4"):
        reference.attention(x, x, x, np.array(starts), head_dim=2, scale=1.0, causal=True)


def test_swiglu_and_gelu() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([normals(rng, 200) * 3, np.float32([0, -0.0, 80, -80, 1e4, -1e4])])
    up = normals(rng, len(x))
    want = F.silu(float64(x)) * float64(up)
    with np.errstate(over="raise", invalid="raise"):
        np.testing.assert_allclose(reference.swiglu(x, up), want.numpy(), rtol=1e-7, atol=1e-40)
        got = reference.gelu(x)
    want = F.gelu(float64(x), approximate="tanh")
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-7, atol=1e-13)
    assert got.dtype == np.float32


# --- loss -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 30.0])
def test_cross_entropy(scale: float) -> None:
    rng = np.random.default_rng(0)
    weight = random_weight(rng, QuantType.Q6_K, 101, 256, scale)
    x, labels = normals(rng, 7, 256), rng.integers(0, 101, 7, np.int32)
    logits = float64(x) @ float64(reference.dequantize(weight)).T
    want = F.cross_entropy(logits, torch.from_numpy(labels).long(), reduction="none")
    got = reference.cross_entropy(x, weight, labels)
    assert got.dtype == np.float64
    np.testing.assert_allclose(got, want.numpy(), rtol=1e-11)
    np.testing.assert_array_equal(reference.cross_entropy(x[3:4], weight, labels[3:4]), got[3:4])
