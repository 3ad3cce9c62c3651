"""Softmax attention inside each sequence, its derivative and its cotangents, without stored scores.

A program has a block of queries of one head and goes through the keys once with a running maximum
(FlashAttention, arXiv 2205.14135). A program of a tangent computes the primal's probabilities p
again, and also sums the terms of the product rule: dy = sum p (ds - mean ds) v + sum p dv, where
mean ds = sum p ds.

Back, dQ = dS K, dK = dS^T Q and dV = P^T dY, where dS = scale P (dP - mean dP), dP = dY V^T and
mean dP = sum P dP of each query (FlashAttention-2, arXiv 2307.08691). Programs with a block of
queries add up dQ over the keys, and programs with a block of keys dK and dV over the queries: each
sum is of one program, in one order.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from fwdllm.kernels.api import Array
from fwdllm.kernels.triton.runtime import (
    DEVICE,
    cast,
    cdiv,
    check_rows,
    dot,
    pow2,
    require,
    small,
    tensor,
)


@triton.jit
def _scores(qs, ks, i, j, end, scale, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """scale q k^T of queries i and keys j, -inf where a query does not see a key: [BM, BN]."""
    scores = scale * dot(qs, tl.trans(ks), tl.zeros([BM, BN], tl.float32), "ieee")
    seen = j[None, :] < end
    if CAUSAL:
        seen = seen & (j[None, :] <= i[:, None])
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _attention(
    q,
    k,
    v,
    starts,
    y,
    rows,
    q_width,
    kv_width,
    group,
    head_dim,
    scale,
    blocks,
    CAUSAL: tl.constexpr,
    TANGENT: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
):
    sequence, head = tl.program_id(0) // blocks, tl.program_id(1)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    first = begin + (tl.program_id(0) % blocks) * BM
    i = first + tl.arange(0, BM)
    d = tl.arange(0, D)
    i_in = (i[:, None] < end) & (d[None, :] < head_dim)
    # Rows of a tangent come after those of the primal and of the tangents before it.
    move = (tl.program_id(2) + 1).to(tl.int64) * rows
    q_at = i.to(tl.int64)[:, None] * q_width + head * head_dim + d[None, :]
    qs = tl.load(q + q_at, mask=i_in, other=0.0)
    largest = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    if TANGENT:
        dqs = tl.load(q + q_at + move * q_width, mask=i_in, other=0.0)
        slopes = tl.zeros([BM], tl.float32)
        dacc = tl.zeros([BM, D], tl.float32)
    stop = end
    if CAUSAL:
        stop = tl.minimum(end, first + BM)
    if first >= end:
        stop = begin
    for j0 in range(begin, stop, BN):
        j = j0 + tl.arange(0, BN)
        j_in = (j[:, None] < end) & (d[None, :] < head_dim)
        kv_at = j.to(tl.int64)[:, None] * kv_width + (head // group) * head_dim + d[None, :]
        ks = tl.load(k + kv_at, mask=j_in, other=0.0)
        vs = tl.load(v + kv_at, mask=j_in, other=0.0)
        scores = _scores(qs, ks, i, j, end, scale, CAUSAL, BM, BN)
        above = tl.maximum(largest, tl.max(scores, axis=1))
        # A row past the end sees no key: its maximum is -inf, and -inf minus -inf would be NaN.
        shift = tl.where(above == float("-inf"), 0.0, above)
        p = tl.exp(scores - shift[:, None])
        shrink = tl.exp(largest - shift)
        largest = above
        total = total * shrink + tl.sum(p, axis=1)
        acc = dot(cast(p, vs.dtype), vs, acc * shrink[:, None], "ieee")
        if TANGENT:
            dks = tl.load(k + kv_at + move * kv_width, mask=j_in, other=0.0)
            dvs = tl.load(v + kv_at + move * kv_width, mask=j_in, other=0.0)
            ds = dot(dqs, tl.trans(ks), tl.zeros([BM, BN], tl.float32), "ieee")
            ds = scale * dot(qs, tl.trans(dks), ds, "ieee")
            weighted = p * ds
            slopes = slopes * shrink + tl.sum(weighted, axis=1)
            dacc = dot(cast(weighted, vs.dtype), vs, dacc * shrink[:, None], "ieee")
            dacc = dot(cast(p, vs.dtype), dvs, dacc, "ieee")
    total = tl.where(total == 0.0, 1.0, total)[:, None]
    out = acc / total
    if TANGENT:
        out = dacc / total - out * (slopes[:, None] / total)
        tl.store(y + q_at + move * q_width, cast(out, y.dtype.element_ty), mask=i_in)
    else:
        tl.store(y + q_at, cast(out, y.dtype.element_ty), mask=i_in)


def attention(
    q: Array,
    k: Array,
    v: Array,
    starts: np.ndarray,
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    tangents: int = 0,
) -> torch.Tensor:
    """softmax(scale q k^T) v for every sequence and head: [rows, n_heads * head_dim] of q's type.

    q: [rows, n_heads * head_dim].  k, v: [rows, n_kv_heads * head_dim]; query head h reads
    key/value head h // (n_heads / n_kv_heads).  starts: int32 [n_sequences + 1]; with tangents
    first the primal's sequences, then those of each tangent.  causal: a row sees itself and the
    rows before it. ValueError if starts do not run from 0 to rows in order.
    """
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
    # Float32 matmuls have their operands in shared memory, of which GPUs have 99 KB or more.
    narrow = q.dtype == torch.bfloat16
    # With float32 heads of 16 dimensions, the tangent kernel fails an LLVM assertion in Triton 3.9.
    wide = pow2(head_dim, 16 if narrow else 32)
    most = 64 if narrow else 32
    # The tangent kernel has five operands in registers, the primal kernel three.
    for tangent, block in ((False, min(most, pow2(longest, 16))), (True, 32))[: 1 + bool(tangents)]:
        blocks = cdiv(longest, block)
        _attention[(sequences * blocks, heads, tangents if tangent else 1)](
            q,
            k,
            v,
            small(starts),
            y,
            len(q) // (1 + tangents),
            q.shape[1],
            k.shape[1],
            group,
            head_dim,
            scale,
            blocks,
            CAUSAL=causal,
            TANGENT=tangent,
            BM=block,
            BN=32,
            D=wide,
            num_warps=4,
            num_stages=2 if narrow else 1,
        )
    return y


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
    dy,
    sums,
    dq,
    rows,
    q_width,
    kv_width,
    group,
    head_dim,
    scale,
    blocks,
    CAUSAL: tl.constexpr,
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """dQ of a block of queries of one head, and for ``_keys_vjp`` the sums of each query.

    The keys are gone through twice, because dS needs the sums. sums: float32 [2, heads, rows], the
    logarithm of the sum of exponentials, and mean dP.
    """
    sequence, head = tl.program_id(0) // blocks, tl.program_id(1)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    first = begin + (tl.program_id(0) % blocks) * BLOCK
    i = first + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    i_in = (i[:, None] < end) & (d[None, :] < head_dim)
    q_at = i.to(tl.int64)[:, None] * q_width + head * head_dim + d[None, :]
    qs = tl.load(q + q_at, mask=i_in, other=0.0)
    dys = tl.load(dy + q_at, mask=i_in, other=0.0)
    zero = tl.zeros([BLOCK, BLOCK], tl.float32)
    stop = end
    if CAUSAL:
        stop = tl.minimum(end, first + BLOCK)
    if first >= end:
        stop = begin
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    mean = tl.zeros([BLOCK], tl.float32)
    for j0 in range(begin, stop, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        j_in = (j[:, None] < end) & (d[None, :] < head_dim)
        kv_at = j.to(tl.int64)[:, None] * kv_width + (head // group) * head_dim + d[None, :]
        ks = tl.load(k + kv_at, mask=j_in, other=0.0)
        vs = tl.load(v + kv_at, mask=j_in, other=0.0)
        scores = _scores(qs, ks, i, j, end, scale, CAUSAL, BLOCK, BLOCK)
        above = tl.maximum(largest, tl.max(scores, axis=1))
        p = tl.exp(scores - above[:, None])
        shrink = tl.exp(largest - above)
        largest = above
        total = total * shrink + tl.sum(p, axis=1)
        mean = mean * shrink + tl.sum(p * dot(dys, tl.trans(vs), zero, "ieee"), axis=1)
    total = tl.where(total == 0.0, 1.0, total)
    mean /= total
    logarithm = largest + tl.log(total)
    sums_at = head.to(tl.int64) * rows + i
    tl.store(sums + sums_at, logarithm, mask=i < end)
    tl.store(sums + tl.num_programs(1).to(tl.int64) * rows + sums_at, mean, mask=i < end)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for j0 in range(begin, stop, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        j_in = (j[:, None] < end) & (d[None, :] < head_dim)
        kv_at = j.to(tl.int64)[:, None] * kv_width + (head // group) * head_dim + d[None, :]
        ks = tl.load(k + kv_at, mask=j_in, other=0.0)
        vs = tl.load(v + kv_at, mask=j_in, other=0.0)
        p = tl.exp(_scores(qs, ks, i, j, end, scale, CAUSAL, BLOCK, BLOCK) - logarithm[:, None])
        ds = scale * p * (dot(dys, tl.trans(vs), zero, "ieee") - mean[:, None])
        acc = dot(cast(ds, ks.dtype), ks, acc, "ieee")
    tl.store(dq + q_at, acc, mask=i_in)


@triton.jit
def _keys_vjp(
    q,
    k,
    v,
    starts,
    dy,
    sums,
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
    BLOCK: tl.constexpr,
    D: tl.constexpr,
):
    """dK and dV of a block of keys of one key/value head, over one query head after the other.

    Scores are transposed, [keys, queries], as the products with dY and Q read them.
    """
    sequence, kv_head = tl.program_id(0) // blocks, tl.program_id(1)
    begin, end = tl.load(starts + sequence), tl.load(starts + sequence + 1)
    first = begin + (tl.program_id(0) % blocks) * BLOCK
    j = first + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    j_in = (j[:, None] < end) & (d[None, :] < head_dim)
    kv_at = j.to(tl.int64)[:, None] * kv_width + kv_head * head_dim + d[None, :]
    ks = tl.load(k + kv_at, mask=j_in, other=0.0)
    vs = tl.load(v + kv_at, mask=j_in, other=0.0)
    zero = tl.zeros([BLOCK, BLOCK], tl.float32)
    means = sums + (tl.num_programs(1) * group).to(tl.int64) * rows
    of_k = tl.zeros([BLOCK, D], tl.float32)
    of_v = tl.zeros([BLOCK, D], tl.float32)
    start = begin
    if CAUSAL:
        start = first
    stop = end
    if first >= end:
        stop = start
    for h in range(group):
        head = kv_head * group + h
        for i0 in range(start, stop, BLOCK):
            i = i0 + tl.arange(0, BLOCK)
            i_in = (i[:, None] < end) & (d[None, :] < head_dim)
            q_at = i.to(tl.int64)[:, None] * q_width + head * head_dim + d[None, :]
            qs = tl.load(q + q_at, mask=i_in, other=0.0)
            dys = tl.load(dy + q_at, mask=i_in, other=0.0)
            sums_at = head.to(tl.int64) * rows + i
            logarithm = tl.load(sums + sums_at, mask=i < end, other=0.0)
            mean = tl.load(means + sums_at, mask=i < end, other=0.0)
            seen = (j[:, None] < end) & (i[None, :] < end)
            if CAUSAL:
                seen = seen & (j[:, None] <= i[None, :])
            scores = scale * dot(ks, tl.trans(qs), zero, "ieee") - logarithm[None, :]
            p = tl.where(seen, tl.exp(scores), 0.0)
            ds = scale * p * (dot(vs, tl.trans(dys), zero, "ieee") - mean[None, :])
            of_v = dot(cast(p, dys.dtype), dys, of_v, "ieee")
            of_k = dot(cast(ds, qs.dtype), qs, of_k, "ieee")
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The cotangents of q, k and v, float32; probabilities are computed again, some at a time."""
    q, k, v = tensor(q), tensor(k), tensor(v)
    _check(q, k, v, starts, head_dim)
    require(dy.shape == q.shape, f"{tuple(dy.shape)} cotangents of {tuple(q.shape)}")
    dy = tensor(dy).to(q.dtype)
    dq, dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (q, k, v))
    longest = int(np.diff(starts).max(initial=0))
    if longest == 0:
        return dq, dk, dv
    heads, kv_heads = q.shape[1] // head_dim, k.shape[1] // head_dim
    sums = torch.empty(2, heads, len(q), dtype=torch.float32, device=DEVICE)
    narrow = q.dtype == torch.bfloat16
    wide = pow2(head_dim, 16 if narrow else 32)  # as in ``attention``
    # Five operands are in registers, for float32 matmuls whole: larger blocks of wide heads spill.
    block = 32 if narrow or wide <= 64 else 16
    blocks = cdiv(longest, block)
    programs = (len(starts) - 1) * blocks
    shape = (len(q), q.shape[1], k.shape[1], heads // kv_heads, head_dim, scale, blocks)
    options = {
        "CAUSAL": causal,
        "BLOCK": block,
        "D": wide,
        "num_warps": 4 if narrow else 8,
        "num_stages": 2 if narrow else 1,
    }
    _queries_vjp[(programs, heads)](q, k, v, small(starts), dy, sums, dq, *shape, **options)
    _keys_vjp[(programs, kv_heads)](q, k, v, small(starts), dy, sums, dk, dv, *shape, **options)
    return dq, dk, dv
