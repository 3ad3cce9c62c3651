"""JVPs of operations: the reference and the C++ kernels against torch.func.jvp in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels_cpu import QUANTIZED, random_lora, relative_error
from weights import random_weight

from fwdllm.kernels import cpu, reference
from fwdllm.kernels.types import SUPPORTED_TYPES, Lanes, LoRA, QuantType

# Whether attention is causal, and its window.
masks = st.tuples(st.booleans(), st.sampled_from([0, 1, 5, 17, 99]))
shapes = given(
    rows=st.integers(1, 40), d=st.integers(1, 130), tangents=st.integers(1, 4)
)  # fmt: skip
kernels = pytest.mark.parametrize("ops", [reference, cpu], ids=["reference", "cpu"])


def normals(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return rng.normal(size=shape, scale=scale).astype(np.float32)


def torch_jvp(f: Callable[..., torch.Tensor], tangents: int, *stacked: np.ndarray) -> np.ndarray:
    """f and its derivatives in float64, stacked like its arguments: [1 + tangents] slices."""
    slices = [torch.tensor(x, dtype=torch.float64).reshape(1 + tangents, -1, *x.shape[1:])
              for x in stacked]  # fmt: skip
    primals = tuple(s[0] for s in slices)
    found = [f(*primals)]
    for t in range(1, 1 + tangents):
        found.append(torch.func.jvp(f, primals, tuple(s[t] for s in slices))[1])
    return torch.cat(found).numpy()


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    starts: np.ndarray,
    head_dim: int,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
) -> torch.Tensor:
    found = []
    for a, b in pairwise(starts):
        heads = [x[a:b].unflatten(1, (-1, head_dim)).transpose(0, 1) for x in (q, k, v)]
        group = len(heads[0]) // len(heads[1])
        keys, values = (x.repeat_interleave(group, 0) for x in heads[1:])
        scores = capped(heads[0] @ keys.transpose(1, 2) * head_dim**-0.5, softcap)
        ones = torch.ones(b - a, b - a, dtype=torch.bool)
        if causal:
            scores = scores.masked_fill(ones.triu(1), -torch.inf)
        if window:
            scores = scores.masked_fill(ones.tril(-window) | ones.triu(window), -torch.inf)
        found.append((scores.softmax(-1) @ values).transpose(0, 1).flatten(1))
    return torch.cat(found)


def capped(x: torch.Tensor, softcap: float) -> torch.Tensor:
    return softcap * torch.tanh(x / softcap) if softcap else x


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=3e-5, atol=1e-5 * (1 + np.abs(want).max()))


@kernels
@settings(max_examples=25, deadline=None)
@shapes
def test_norms_and_activations(ops, rows: int, d: int, tangents: int) -> None:
    rng = np.random.default_rng(d)
    x, up = (normals(rng, (1 + tangents) * rows, d, scale=2) for _ in range(2))
    weight, bias = normals(rng, d), normals(rng, d)
    w, b = torch.tensor(weight, dtype=torch.float64), torch.tensor(bias, dtype=torch.float64)
    cases = [
        (ops.rms_norm(x, weight, 1e-2, tangents), lambda x: F.rms_norm(x, (d,), w, 1e-2), (x,)),
        (
            ops.layer_norm(x, weight, bias, 1e-2, tangents),
            lambda x: F.layer_norm(x, (d,), w, b, 1e-2),
            (x,),
        ),
        (ops.swiglu(x, up, tangents), lambda g, u: F.silu(g) * u, (x, up)),
        (ops.geglu(x, up, tangents), lambda g, u: F.gelu(g, approximate="tanh") * u, (x, up)),
        (ops.gelu(x, tangents), lambda x: F.gelu(x, approximate="tanh"), (x,)),
    ]
    for got, f, arguments in cases:
        assert_close(got, torch_jvp(f, tangents, *arguments))


@kernels
@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([4, 20, 64]),
    mask=masks,
    softcap=st.sampled_from([0.0, 0.7, 50.0]),
    tangents=st.integers(1, 3),
)
def test_attention(
    ops, lengths: list[int], kv_heads: int, group: int, head_dim: int, mask: tuple[bool, int],
    softcap: float, tangents: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(sum(lengths))
    rows = sum(lengths)
    ends = np.cumsum(lengths * (1 + tangents))
    starts = np.concatenate([[0], ends]).astype(np.int32)
    q = normals(rng, (1 + tangents) * rows, kv_heads * group * head_dim)
    k, v = (normals(rng, (1 + tangents) * rows, kv_heads * head_dim) for _ in range(2))

    options = {"causal": mask[0], "window": mask[1], "softcap": softcap, "head_dim": head_dim}
    mine = starts[: len(lengths) + 1]
    want = torch_jvp(lambda q, k, v: attend(q, k, v, mine, **options), tangents, q, k, v)
    options["scale"] = head_dim**-0.5
    got = ops.attention(q, k, v, starts, **options, tangents=tangents)
    assert_close(got, want)
    if ops is cpu:  # the primal is the same bits as without tangents
        primal = cpu.attention(q[:rows], k[:rows], v[:rows], starts[: len(lengths) + 1], **options)
        np.testing.assert_array_equal(got[:rows], primal)


def tangent_lanes(
    rng: np.random.Generator, n: int, parts: list[int] | None, distribution: str = "normal"
) -> Lanes:
    """A primal and n tangents, with seeds of their own for parts of so many rows."""
    shape = (1 + n,) if parts is None else (1 + n, len(parts))
    coefficients = np.concatenate([[0], rng.choice([1.0, 0.0, -0.5], n)]).astype(np.float32)
    starts = None if parts is None else np.cumsum([0, *parts]).astype(np.int32)
    return Lanes(rng.integers(0, 2**63, shape, np.uint64), coefficients, distribution, True, starts)


def with_direction(rng: np.random.Generator, lora: LoRA, kind: str) -> LoRA:
    """The factors with another kind of direction."""
    (rank, n_in), n_out = lora.a.shape, len(lora.b)
    if kind == "masked":
        mask = rng.integers(0, 2, rank * (n_in + n_out)).astype(np.float32)
        return LoRA(lora.a, lora.b, lora.scale, lora.offset, mask=mask)
    if kind == "frozen A":
        return LoRA(
            lora.a, lora.b, lora.scale, lora.offset, basis_a=np.zeros((0, n_in), np.float32)
        )
    if kind == "subspace":
        bases = {"basis_a": normals(rng, 3, n_in), "basis_b": normals(rng, 70, n_out)}
        return LoRA(lora.a, lora.b, lora.scale, lora.offset, **bases)
    return lora


kinds = pytest.mark.parametrize("kind", ["dense", "masked", "frozen A", "subspace"])


@kinds
@settings(max_examples=15, deadline=None)
@given(
    parts=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    n=st.integers(1, 3),
    n_in=st.integers(1, 330),
    n_out=st.integers(1, 150),
    rank=st.integers(1, 9),
    shared=st.booleans(),
)
def test_product_rule(
    kind: str, parts: list[int], n: int, n_in: int, n_out: int, rank: int, shared: bool
) -> None:
    """The reference is the derivative of the perturbed product; the C++ kernel is the reference."""
    rng = np.random.default_rng(n_in)
    weight = random_weight(rng, QuantType.F32, n_out, n_in)
    lora = with_direction(rng, random_lora(rng, n_in, n_out, rank), kind)
    lanes = tangent_lanes(rng, n, None if shared else parts)
    rows = sum(parts)
    x, bias = normals(rng, (1 + n) * rows, n_in), normals(rng, n_out)
    want = reference.matmul(x, weight, bias=bias, lora=lora, lanes=lanes)
    got = cpu.matmul(x, weight, bias=bias, lora=lora, lanes=lanes, exact=True)
    for t in range(1 + n):
        lane = slice(t * rows, (t + 1) * rows)
        assert relative_error(got[lane], want[lane]) < 1e-4
    step = 1e-3
    for t in range(1, 1 + n):
        sides = []
        for sign in (1, -1):
            moved = x[:rows] + sign * step * x[t * rows : (t + 1) * rows].astype(np.float64)
            coefficient = sign * step * lanes.coefficients[[t]]
            lane = Lanes(lanes.seeds[[t]], coefficient, starts=lanes.starts)
            sides.append(reference.matmul(moved, weight, bias=bias, lora=lora, lanes=lane))
        slope = (sides[0].astype(np.float64) - sides[1]) / (2 * step)
        assert relative_error(want[t * rows : (t + 1) * rows], slope) < 0.02


@pytest.mark.parametrize("type", QUANTIZED, ids=lambda t: t.name)
def test_the_primal_of_tangents_is_rounded_less(type: QuantType) -> None:
    rng = np.random.default_rng(2)
    weight = random_weight(rng, type, 130, 768)
    x = normals(rng, 3 * 17, 768)
    want = reference.matmul(x, weight)
    got = cpu.matmul(x, weight, lanes=tangent_lanes(rng, 2, None))
    assert relative_error(got[17:], want[17:]) < 0.012
    assert relative_error(got[:17], want[:17]) < (0.012 if cpu.activations == "bf16" else 1e-4)


@pytest.mark.parametrize("type", SUPPORTED_TYPES, ids=lambda t: t.name)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_a_tangent_has_the_same_bits_in_any_company(
    type: QuantType, exact: bool, shared: bool
) -> None:
    rng = np.random.default_rng(3)
    weight, lora = random_weight(rng, type, 130, 768), random_lora(rng, 768, 130, 8)
    parts = [4, 3, 7]
    rows = sum(parts)
    lanes = tangent_lanes(rng, 4, None if shared else parts)
    x = normals(rng, 5 * rows, 768)
    labels = rng.integers(0, 130, len(x)).astype(np.int32)

    def run(chosen: list[int], threads: int) -> tuple[np.ndarray, np.ndarray]:
        cpu.set_num_threads(threads)
        some = Lanes(
            lanes.seeds[chosen], lanes.coefficients[chosen], tangents=True, starts=lanes.starts
        )
        at = np.concatenate([np.arange(i * rows, (i + 1) * rows) for i in chosen])
        y = cpu.matmul(x[at], weight, lora=lora, lanes=some, exact=exact)
        nll = cpu.cross_entropy(x[at], weight, labels[at], lanes=some, exact=exact)
        return y.reshape(len(chosen), rows, -1), nll.reshape(len(chosen), rows)

    before = cpu.num_threads()
    try:
        y, nll = run(list(range(5)), threads=3)
        for t in range(1, 5):
            y_alone, nll_alone = run([0, t], threads=1)
            np.testing.assert_array_equal(y[[0, t]], y_alone)
            np.testing.assert_array_equal(nll[[0, t]], nll_alone)
    finally:
        cpu.set_num_threads(before)


@kernels
@pytest.mark.parametrize("softcap", [0.0, 3.0])
@pytest.mark.parametrize("vocab", [5, 300, 1100])
def test_cross_entropy(ops, vocab: int, softcap: float) -> None:
    rng = np.random.default_rng(vocab)
    weight = random_weight(rng, QuantType.Q4_0, vocab, 256)
    w = torch.tensor(reference.dequantize(weight), dtype=torch.float64)
    tangents, rows = 2, 13
    x = normals(rng, (1 + tangents) * rows, 256)
    labels = np.tile(rng.integers(0, vocab, rows).astype(np.int32), 1 + tangents)
    label = torch.tensor(labels[:rows], dtype=torch.long)

    def losses(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(capped(x @ w.T, softcap), label, reduction="none")

    want = torch_jvp(losses, tangents, x)
    options = {"lanes": tangent_lanes(rng, tangents, None), "softcap": softcap}
    got = ops.cross_entropy(x, weight, labels, **options, exact=True)
    assert_close(got, want)
    fast = ops.cross_entropy(x, weight, labels, **options)
    assert np.abs(fast - want).max() < 0.03 * (1 + np.abs(want).max())


@kernels
def test_bad_tangents_are_refused(ops) -> None:
    x = np.zeros((5, 32), np.float32)
    for f in (lambda: ops.gelu(x, 1), lambda: ops.rms_norm(x, x[0], 1e-5, 2)):
        with pytest.raises(ValueError, match="tangents"):
            f()


def test_rows_of_a_block_keep_the_seeds_of_their_parts() -> None:
    rng = np.random.default_rng(0)
    lanes = tangent_lanes(rng, 2, [5, 7, 8])
    for first, end in [(0, 20), (0, 5), (3, 12), (5, 12), (11, 20), (6, 7)]:
        some = lanes.take(first, end)
        assert some.starts is not None
        part = np.repeat([0, 1, 2], [5, 7, 8])[first:end]
        np.testing.assert_array_equal(
            np.repeat(some.seeds, np.diff(some.starts), axis=1), lanes.seeds[:, part]
        )
