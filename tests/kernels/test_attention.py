"""Attention over several blocks of queries, panels of keys and steps of either, and their edges.

On AMX's tiles, which take sequences of 32 tokens or more, all of these are 32; elsewhere smaller.
"""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_cpu import relative_error

from fwdllm.kernels import cpu, reference

# Of fp32; operands on tiles have 16 bits, 2^-17 of them at most is lost, and products of two low
# halves, of 2^-16 at most, are left out. bf16 alone would be 3e-3.
BOUND = 2e-5 if cpu.isa == "amx" else 3e-6

shapes = given(
    lengths=st.lists(st.sampled_from([1, 31, 32, 33, 48, 64, 65, 97, 150]), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([8, 15, 16, 17, 32, 33, 64, 80, 100, 256]),
    causal=st.booleans(),
    window=st.sampled_from([0, 1, 16, 32, 33, 70]),
    softcap=st.sampled_from([0.0, 1.5]),
)


def normals(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.normal(size=shape).astype(np.float32)


def options_of(head_dim: int, causal: bool, window: int, softcap: float) -> dict:
    return {
        "head_dim": head_dim,
        "scale": head_dim**-0.5,
        "causal": causal,
        "window": window,
        "softcap": softcap,
    }


@settings(max_examples=60, deadline=None)
@shapes
def test_attention_and_its_tangents(
    lengths: list[int], kv_heads: int, group: int, head_dim: int, **mask
) -> None:
    rng = np.random.default_rng(sum(lengths))
    options, rows, tangents = options_of(head_dim, **mask), sum(lengths), 2
    starts = np.cumsum([0, *lengths * (1 + tangents)]).astype(np.int32)
    q = normals(rng, (1 + tangents) * rows, kv_heads * group * head_dim)
    k, v = (normals(rng, (1 + tangents) * rows, kv_heads * head_dim) for _ in range(2))
    got = cpu.attention(q, k, v, starts, **options, tangents=tangents)
    want = reference.attention(q, k, v, starts, **options, tangents=tangents)
    for lane in np.split(np.arange(len(q)), 1 + tangents):
        for a, b in pairwise(starts[: len(lengths) + 1]):
            mine = lane[a:b]
            if mask["window"] == 1 or b - a == 1:  # of one key the weight has no slope
                np.testing.assert_allclose(got[mine], want[mine], rtol=BOUND, atol=5 * BOUND)
            else:
                assert relative_error(got[mine], want[mine]) < BOUND
    # A sequence has its bits in any company, the primal without tangents.
    last = slice(rows - lengths[-1], rows)
    alone = np.array([0, lengths[-1]], np.int32)
    mine = cpu.attention(q[last], k[last], v[last], alone, **options)
    np.testing.assert_array_equal(got[last], mine)


@settings(max_examples=60, deadline=None)
@shapes
def test_cotangents(lengths: list[int], kv_heads: int, group: int, head_dim: int, **mask) -> None:
    rng = np.random.default_rng(sum(lengths))
    options, rows = options_of(head_dim, **mask), sum(lengths)
    starts = np.cumsum([0, *lengths]).astype(np.int32)
    q, dy = (normals(rng, rows, kv_heads * group * head_dim) for _ in range(2))
    k, v = (normals(rng, rows, kv_heads * head_dim) for _ in range(2))
    found = cpu.attention_vjp(q, k, v, starts, dy, **options)
    wanted = reference.attention_vjp(q, k, v, starts, dy, **options)
    last = slice(rows - lengths[-1], rows)
    alone = np.array([0, lengths[-1]], np.int32)
    again = cpu.attention_vjp(q[last], k[last], v[last], alone, dy[last], **options)
    for got, want, mine in zip(found, wanted, again, strict=True):
        for a, b in pairwise(starts):
            np.testing.assert_allclose(got[a:b], want[a:b], rtol=BOUND, atol=30 * BOUND)
            if np.abs(want[a:b]).max() > 1e-3:
                assert relative_error(got[a:b], want[a:b]) < BOUND
        np.testing.assert_array_equal(got[last], mine)


def test_threads_change_no_bit() -> None:
    rng = np.random.default_rng(7)
    lengths = [70, 33, 128, 5]
    starts = np.cumsum([0, *lengths, *lengths]).astype(np.int32)
    rows, options = sum(lengths), options_of(40, True, 50, 0.0)
    q, k, v = normals(rng, 2 * rows, 6 * 40), *(normals(rng, 2 * rows, 2 * 40) for _ in "kv")

    def everything() -> list[np.ndarray]:
        mine = starts[: len(lengths) + 1]
        back = cpu.attention_vjp(q[:rows], k[:rows], v[:rows], mine, q[rows:], **options)
        return [cpu.attention(q, k, v, starts, **options, tangents=1), *back]

    before = cpu.num_threads()
    try:
        cpu.set_num_threads(1)
        want = everything()
        cpu.set_num_threads(3)
        for got, expected in zip(everything(), want, strict=True):
            np.testing.assert_array_equal(got, expected)
    finally:
        cpu.set_num_threads(before)


# All bits of a word, as a file of nothing but ones has them, are a NaN, too.
NANS = [struct.unpack("f", struct.pack("I", bits))[0] for bits in (0x7FC00000, 0xFFFFFFFF)]


@pytest.mark.parametrize("bad", [*NANS, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["q", "k", "v"])
def test_what_is_not_finite_is_seen(bad: float, where: str) -> None:
    rng = np.random.default_rng(1)
    inputs = {name: normals(rng, 100, 32) for name in "qkv"}
    inputs[where][70, 3] = bad
    starts, options = np.array([0, 100], np.int32), options_of(32, True, 0, 0.0)
    y = cpu.attention(*inputs.values(), starts, **options)
    assert np.isfinite(y[:64]).all()
    assert not np.isfinite(y[70:]).all()
    back = cpu.attention_vjp(*inputs.values(), starts, normals(rng, 100, 32), **options)
    assert not all(np.isfinite(x).all() for x in back)
