"""Softmax attention inside each sequence, its derivative and its cotangents, without stored scores.

A program has a block of queries of one head and goes through the keys once with a running maximum
(FlashAttention, arXiv 2205.14135). It keeps the logarithm of each query's sum of exponentials, from
which the others compute the probabilities p again. A program of a tangent sums the terms of the
product rule: dy = sum p (ds - mean ds) v + sum p dv, where mean ds = sum p ds and sum p v = y.

Back, dQ = dS K, dK = dS^T Q and dV = P^T dY, where dS = scale P (dP - mean dP), dP = dY V^T and
mean dP = sum P dP = dY . Y of each query (FlashAttention-2, arXiv 2307.08691). Programs with a
block of queries add up dQ over the keys, and programs with a block of keys dK and dV over the
queries: each sum is of one program, in one order.

Products of float32 are three products of TF32 on tensor cores, of the high and the low halves of
their operands: what is left out, of both low halves, is 2^-22 of a product at most.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import (
    DEVICE,
    INTERPRETED,
    cast,
    cdiv,
    check_rows,
    dot,
    pow2,
    require,
    require_softcap,
    small,
    tanh,
    tensor,
)

# Of float32 operands; bfloat16 ones need no more than one product.
_PRECISION = tl.constexpr("tf32x3")
# Exponentials are powers of two, which GPUs have an instruction for.
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exponents(a, b, scale, SOFTCAP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """scale a b^T, or SOFTCAP tanh of it / SOFTCAP, by log2 e: [BM, BN] of [BM, D] and [BN, D]."""
    scores = dot(a, tl.trans(b), tl.zeros([BM, BN], tl.float32), _PRECISION)
    if SOFTCAP > 0:
        exponents = (SOFTCAP * _LOG2_E) * tanh((scale / SOFTCAP) * scores)
    else:
        exponents = (scale * _LOG2_E) * scores
    return exponents


@triton.jit
def _through_cap(x, exponents, SOFTCAP: tl.constexpr):
    """x times the slope of a soft cap that gave these exponents."""
    if SOFTCAP > 0:
        t = exponents / (SOFTCAP * _LOG2_E)
        x *= 1.0 - t * t
    return x


@triton.jit
def _seen(i, j, end, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether queries i see keys j."""
    seen = (j < end) & (i < end)
    if CAUSAL:
        seen = seen & (j <= i)
    if WINDOW > 0:
        seen = seen & (j > i - WINDOW)
        if not CAUSAL:
            seen = seen & (j < i + WINDOW)
    return seen


@triton.jit
def _keys(begin, end, first, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BM: tl.constexpr,
          BN: tl.constexpr):  # fmt: skip
    """Where to begin and to stop, BN keys at a time, for queries first .. first + BM.

    Whole blocks from the sequence's beginning: sums have one order whatever BM is.
    """
    start = begin
    stop = end
    if WINDOW > 0:
        start += tl.maximum(first - begin + 1 - WINDOW, 0) // BN * BN
    if CAUSAL:
        stop = tl.minimum(end, first + BM)
    elif WINDOW > 0:
        stop = tl.minimum(end, first + BM + WINDOW - 1)
    if first >= end:
        stop = start
    return start, stop


@triton.jit
def _attention(
    q,
    k,
    v,
    starts,
    y,
    whole,
    logs,
    rows,
    q_width,
    kv_width,
    group,
    head_dim,
    scale,
    blocks,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """y of a block of BM queries of one head, over BN keys at a time.

    whole: if WHOLE, also gets y, in float32.  logs: float32 [heads, rows], the logarithm to base 2
    of each query's sum of exponentials.
    """
    sequence, head = tl.program_id(0) // blocks, tl.program_id(1)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    first = begin + (tl.program_id(0) % blocks) * BM
    i = first + tl.arange(0, BM)
    d = tl.arange(0, D)
    i_in = (i[:, None] < end) & (d[None, :] < head_dim)
    q_at = i.to(tl.int64)[:, None] * q_width + head * head_dim + d[None, :]
    qs = tl.load(q + q_at, mask=i_in, other=0.0)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    start, stop = _keys(begin, end, first, CAUSAL, WINDOW, BM, BN)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        j_in = (j[:, None] < end) & (d[None, :] < head_dim)
        kv_at = j.to(tl.int64)[:, None] * kv_width + (head // group) * head_dim + d[None, :]
        ks = tl.load(k + kv_at, mask=j_in, other=0.0)
        vs = tl.load(v + kv_at, mask=j_in, other=0.0)
        exponents = _exponents(qs, ks, scale, SOFTCAP, BM, BN)
        seen = _seen(i[:, None], j[None, :], end, CAUSAL, WINDOW)
        exponents = tl.where(seen, exponents, float("-inf"))
        above = tl.maximum(largest, tl.max(exponents, axis=1))
        # A row that sees no key yet has the maximum -inf, and -inf minus -inf would be NaN.
        shift = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp2(exponents - shift[:, None])
        shrink = tl.exp2(largest - shift)
        largest = above
        total = total * shrink + tl.sum(p, axis=1)
        acc = dot(cast(p, vs.dtype), vs, acc * shrink[:, None], _PRECISION)
    total = tl.where(total == 0.0, 1.0, total)
    out = acc * (1.0 / total)[:, None]
    tl.store(y + q_at, cast(out, y.dtype.element_ty), mask=i_in)
    if WHOLE:
        tl.store(whole + q_at, out, mask=i_in)
    tl.store(logs + head.to(tl.int64) * rows + i, largest + tl.log2(total), mask=i < end)


@triton.jit
def _tangents(
    q,
    k,
    v,
    starts,
    y,
    whole,
    logs,
    rows,
    q_width,
    kv_width,
    group,
    head_dim,
    scale,
    blocks,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    """As ``_attention`` for one tangent of y, from the primal's ``whole`` and ``logs``."""
    sequence, head = tl.program_id(0) // blocks, tl.program_id(2)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    first = begin + (tl.program_id(0) % blocks) * BM
    i = first + tl.arange(0, BM)
    d = tl.arange(0, D)
    i_in = (i[:, None] < end) & (d[None, :] < head_dim)
    # Rows of a tangent come after those of the primal and of the tangents before it.
    move = (tl.program_id(1) + 1).to(tl.int64) * rows
    q_at = i.to(tl.int64)[:, None] * q_width + head * head_dim + d[None, :]
    qs = tl.load(q + q_at, mask=i_in, other=0.0)
    dqs = tl.load(q + q_at + move * q_width, mask=i_in, other=0.0)
    log = tl.load(logs + head.to(tl.int64) * rows + i, mask=i < end, other=0.0)
    slopes = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    start, stop = _keys(begin, end, first, CAUSAL, WINDOW, BM, BN)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        j_in = (j[:, None] < end) & (d[None, :] < head_dim)
        kv_at = j.to(tl.int64)[:, None] * kv_width + (head // group) * head_dim + d[None, :]
        ks = tl.load(k + kv_at, mask=j_in, other=0.0)
        vs = tl.load(v + kv_at, mask=j_in, other=0.0)
        dks = tl.load(k + kv_at + move * kv_width, mask=j_in, other=0.0)
        dvs = tl.load(v + kv_at + move * kv_width, mask=j_in, other=0.0)
        exponents = _exponents(qs, ks, scale, SOFTCAP, BM, BN)
        seen = _seen(i[:, None], j[None, :], end, CAUSAL, WINDOW)
        p = tl.where(seen, tl.exp2(exponents - log[:, None]), 0.0)
        ds = dot(dqs, tl.trans(ks), tl.zeros([BM, BN], tl.float32), _PRECISION)
        ds = dot(qs, tl.trans(dks), ds, _PRECISION)
        weighted = p * _through_cap(scale * ds, exponents, SOFTCAP)
        slopes += tl.sum(weighted, axis=1)
        acc = dot(cast(weighted, vs.dtype), vs, acc, _PRECISION)
        acc = dot(cast(p, vs.dtype), dvs, acc, _PRECISION)
    acc -= tl.load(whole + q_at, mask=i_in, other=0.0) * slopes[:, None]
    tl.store(y + q_at + move * q_width, cast(acc, y.dtype.element_ty), mask=i_in)


@lru_cache(maxsize=1)
def _large_tiles() -> bool:
    """Whether tensor cores read 64 rows at a time from shared memory, as those of an H100 do."""
    if INTERPRETED:
        return True
    target = triton.runtime.driver.active.get_current_target()
    return bool(target.backend == "cuda" and target.arch // 10 == 9)


def _tiles(kernel: Any, dtype: torch.dtype, head_dim: int, longest: int) -> dict[str, int]:
    """How a program works: for heads of 128 with few spills and 99 KB of shared memory or less.

    Of those, the fastest on an H200 (bench/studies/gpu_shapes.py). Larger heads, as Gemma's, have
    twice the warps and nothing loaded ahead.
    """
    narrow = dtype == torch.bfloat16
    # With float32 heads of 16 dimensions, a tangent kernel fails an LLVM assertion in Triton 3.9.
    wide = pow2(head_dim, 16 if narrow else 32)
    large = _large_tiles() and wide <= 128
    if narrow:
        rows = 64 if large or kernel is _attention else 32
    else:  # the cotangents of k and v have the most operands
        most = 64 if kernel is _keys_vjp else 128
        rows = 32 if wide <= most or (kernel is _attention and wide <= 128) else 16
    return {
        "BM": min(rows, pow2(longest, 16)),
        "BN": 32,
        "D": wide,
        "num_warps": 4 if wide <= 128 else 8,
        "num_stages": (3 if kernel is _attention else 2) if narrow and wide <= 128 else 1,
    }


def attention(
    q: Array,
    k: Array,
    v: Array,
    starts: np.ndarray,
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
    tangents: int = 0,
) -> torch.Tensor:
    """softmax(scale q k^T) v for every sequence and head: [rows, n_heads * head_dim] of q's type.

    q: [rows, n_heads * head_dim].  k, v: [rows, n_kv_heads * head_dim]; query head h reads
    key/value head h // (n_heads / n_kv_heads).  starts: int32 [n_sequences + 1]; with tangents
    first the primal's sequences, then those of each tangent.  causal: a row sees itself and the
    rows before it, else also those behind it.  window: of these only rows less than ``window``
    away; 0 is no bound.  softcap: c > 0 makes c tanh(s / c) of a score s. ValueError if starts do
    not run from 0 to rows in order, or for a window below 0.
    """
    mask = _mask(causal, window, softcap)
    q, k, v = tensor(q), tensor(k), tensor(v)
    _check(q, k, v, starts, head_dim)
    check_rows(len(q), 1 + tangents, f"a primal and {tangents} tangents")
    check_rows(len(starts) - 1, 1 + tangents, f"sequences of a primal and {tangents} tangents")
    sequences = (len(starts) - 1) // (1 + tangents)
    y = torch.empty_like(q)
    longest = int(np.diff(starts).max(initial=0))
    if longest == 0:
        return y
    heads, group = q.shape[1] // head_dim, q.shape[1] // k.shape[1]
    primal = len(q) // (1 + tangents)
    logs = torch.empty(heads, primal, dtype=torch.float32, device=DEVICE)
    # Where terms of a tangent cancel, the rounding of y would be much of what is left.
    separate = tangents > 0 and q.dtype != torch.float32
    whole = torch.empty_like(q[:primal], dtype=torch.float32) if separate else y
    arrays = (q, k, v, small(starts), y, whole, logs)
    shape = (primal, q.shape[1], k.shape[1], group, head_dim, scale)
    options = _tiles(_attention, q.dtype, head_dim, longest)
    blocks = cdiv(longest, options["BM"])
    _attention[(sequences * blocks, heads)](
        *arrays, *shape, blocks, **mask, WHOLE=separate, **options
    )
    if tangents:
        options = _tiles(_tangents, q.dtype, head_dim, longest)
        blocks = cdiv(longest, options["BM"])
        # All tangents of a head at about the same time, for what they read of the primal.
        grid = (sequences * blocks, tangents, heads)
        _tangents[grid](*arrays, *shape, blocks, **mask, **options)
    return y


def _mask(causal: bool, window: int, softcap: float) -> dict[str, Any]:
    """Constants of kernels; a model has one soft cap and at most one window."""
    require(window >= 0, f"a window of {window} rows")
    require_softcap(softcap)
    return {"CAUSAL": causal, "WINDOW": window, "SOFTCAP": float(softcap)}


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: np.ndarray, head_dim: int
) -> None:
    if starts[0] != 0 or starts[-1] != len(q) or np.any(np.diff(starts) < 0):
        raise ValueError(f"sequence starts must run from 0 to {len(q)} in order")
    fits = k.shape == v.shape and len(k) == len(q) and not (k.shape[1] or 1) % head_dim
    fits = fits and not q.shape[1] % head_dim and not q.shape[1] % k.shape[1]
    require(fits, f"heads of {head_dim} in {tuple(q.shape)} over {tuple(k.shape)}")


@triton.jit
def _queries_vjp(
    q,
    k,
    v,
    starts,
    y,
    logs,
    dy,
    means,
    dq,
    rows,
    q_width,
    kv_width,
    group,
    head_dim,
    scale,
    blocks,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    """dQ of a block of BM queries of one head, and for ``_keys_vjp`` mean dP of each query.

    y, logs: as of ``_attention``, both float32.  means: float32 [heads, rows].
    """
    sequence, head = tl.program_id(0) // blocks, tl.program_id(1)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    first = begin + (tl.program_id(0) % blocks) * BM
    i = first + tl.arange(0, BM)
    d = tl.arange(0, D)
    i_in = (i[:, None] < end) & (d[None, :] < head_dim)
    q_at = i.to(tl.int64)[:, None] * q_width + head * head_dim + d[None, :]
    qs = tl.load(q + q_at, mask=i_in, other=0.0)
    dys = tl.load(dy + q_at, mask=i_in, other=0.0)
    ys = tl.load(y + q_at, mask=i_in, other=0.0)
    mean = tl.sum(dys.to(tl.float32) * ys, axis=1)
    of_query = head.to(tl.int64) * rows + i
    log = tl.load(logs + of_query, mask=i < end, other=0.0)
    tl.store(means + of_query, mean, mask=i < end)
    acc = tl.zeros([BM, D], tl.float32)
    start, stop = _keys(begin, end, first, CAUSAL, WINDOW, BM, BN)
    for j0 in range(start, stop, BN):
        j = j0 + tl.arange(0, BN)
        j_in = (j[:, None] < end) & (d[None, :] < head_dim)
        kv_at = j.to(tl.int64)[:, None] * kv_width + (head // group) * head_dim + d[None, :]
        ks = tl.load(k + kv_at, mask=j_in, other=0.0)
        vs = tl.load(v + kv_at, mask=j_in, other=0.0)
        exponents = _exponents(qs, ks, scale, SOFTCAP, BM, BN)
        seen = _seen(i[:, None], j[None, :], end, CAUSAL, WINDOW)
        p = tl.where(seen, tl.exp2(exponents - log[:, None]), 0.0)
        dp = dot(dys, tl.trans(vs), tl.zeros([BM, BN], tl.float32), _PRECISION)
        ds = scale * p * _through_cap(dp - mean[:, None], exponents, SOFTCAP)
        acc = dot(cast(ds, ks.dtype), ks, acc, _PRECISION)
    tl.store(dq + q_at, acc, mask=i_in)


@triton.jit
def _keys_vjp(
    q,
    k,
    v,
    starts,
    logs,
    dy,
    means,
    dk,
    dv,
    rows,
    q_width,
    kv_width,
    group,
    head_dim,
    scale,
    blocks,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    """dK and dV of a block of BM keys of one key/value head, over one query head after the other.

    Scores are transposed, [keys, queries], as the products with dY and Q read them.
    """
    sequence, kv_head = tl.program_id(0) // blocks, tl.program_id(1)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    first = begin + (tl.program_id(0) % blocks) * BM
    j = first + tl.arange(0, BM)
    d = tl.arange(0, D)
    j_in = (j[:, None] < end) & (d[None, :] < head_dim)
    kv_at = j.to(tl.int64)[:, None] * kv_width + kv_head * head_dim + d[None, :]
    ks = tl.load(k + kv_at, mask=j_in, other=0.0)
    vs = tl.load(v + kv_at, mask=j_in, other=0.0)
    zero = tl.zeros([BM, BN], tl.float32)
    of_k = tl.zeros([BM, D], tl.float32)
    of_v = tl.zeros([BM, D], tl.float32)
    start = begin
    if CAUSAL:
        start = first
    elif WINDOW > 0:
        start += tl.maximum(first - begin + 1 - WINDOW, 0) // BN * BN
    stop = end
    if WINDOW > 0:
        stop = tl.minimum(end, first + BM + WINDOW - 1)
    if first >= end:
        stop = start
    for h in range(group):
        head = kv_head * group + h
        for i0 in range(start, stop, BN):
            i = i0 + tl.arange(0, BN)
            i_in = (i[:, None] < end) & (d[None, :] < head_dim)
            q_at = i.to(tl.int64)[:, None] * q_width + head * head_dim + d[None, :]
            qs = tl.load(q + q_at, mask=i_in, other=0.0)
            dys = tl.load(dy + q_at, mask=i_in, other=0.0)
            of_query = head.to(tl.int64) * rows + i
            log = tl.load(logs + of_query, mask=i < end, other=0.0)
            mean = tl.load(means + of_query, mask=i < end, other=0.0)
            exponents = _exponents(ks, qs, scale, SOFTCAP, BM, BN)
            seen = _seen(i[None, :], j[:, None], end, CAUSAL, WINDOW)
            p = tl.where(seen, tl.exp2(exponents - log[None, :]), 0.0)
            dp = dot(vs, tl.trans(dys), zero, _PRECISION)
            ds = scale * p * _through_cap(dp - mean[None, :], exponents, SOFTCAP)
            of_v = dot(cast(p, dys.dtype), dys, of_v, _PRECISION)
            of_k = dot(cast(ds, qs.dtype), qs, of_k, _PRECISION)
    tl.store(dk + kv_at, of_k, mask=j_in)
    tl.store(dv + kv_at, of_v, mask=j_in)


def attention_vjp(
    q: Array,
    k: Array,
    v: Array,
    starts: np.ndarray,
    dy: Array,
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cotangents of q, k and v, float32; probabilities are computed again, some at a time."""
    mask = _mask(causal, window, softcap)
    q, k, v = tensor(q), tensor(k), tensor(v)
    _check(q, k, v, starts, head_dim)
    require(dy.shape == q.shape, f"{tuple(dy.shape)} cotangents of {tuple(q.shape)}")
    dy = tensor(dy).to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    longest = int(np.diff(starts).max(initial=0))
    if longest == 0:
        return dq, dk, dv
    heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    y = torch.empty_like(q, dtype=torch.float32)
    logs, means = (torch.empty(heads, len(q), dtype=torch.float32, device=DEVICE) for _ in "lm")
    arrays = (q, k, v, small(starts))
    shape = (len(q), q.shape[1], k.shape[1], heads // kv_heads, head_dim, scale)
    sequences = len(starts) - 1
    options = _tiles(_attention, q.dtype, head_dim, longest)
    blocks = cdiv(longest, options["BM"])
    _attention[(sequences * blocks, heads)](
        *arrays, y, y, logs, *shape, blocks, **mask, WHOLE=False, **options
    )
    options = _tiles(_queries_vjp, q.dtype, head_dim, longest)
    blocks = cdiv(longest, options["BM"])
    _queries_vjp[(sequences * blocks, heads)](
        *arrays, y, logs, dy, means, dq, *shape, blocks, **mask, **options
    )
    options = _tiles(_keys_vjp, q.dtype, head_dim, longest)
    blocks = cdiv(longest, options["BM"])
    _keys_vjp[(sequences * blocks, kv_heads)](
        *arrays, logs, dy, means, dk, dv, *shape, blocks, **mask, **options
    )
    return dq, dk, dv
