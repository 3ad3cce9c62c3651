"""What stands between the matrix products of a transformer; float64 inside, float32 out."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fwdllm.kernels.reference.checks import require_indices


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: float32 [rows, d] and [d]."""
    x = x.astype(np.float64)
    mean_square = np.mean(x**2, axis=-1, keepdims=True)
    return (x / np.sqrt(mean_square + eps) * weight).astype(np.float32)


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias: float32 [rows, d], [d] and [d]."""
    x = x.astype(np.float64)
    x = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(x**2, axis=-1, keepdims=True)
    return (x / np.sqrt(variance + eps) * weight + bias).astype(np.float32)


def rope(
    x: np.ndarray,
    positions: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    head_dim: int,
    interleaved: bool,
) -> np.ndarray:
    """Rotate pair i of every head by the angle at [position, i] (RoFormer, section 3.2).

    x: float32 [rows, n_heads * head_dim].  positions: int32 [rows].
    cos, sin: float32 [n_positions, rot / 2], rot <= head_dim; dimensions from rot on pass through.
    interleaved: pair i is dimensions (2i, 2i + 1), as llama, else (i, i + rot / 2), as NeoX.
    IndexError if a position is outside the tables.
    """
    require_indices(positions, len(cos), "positions")
    half = cos.shape[1]
    first = slice(0, 2 * half, 2) if interleaved else slice(0, half)
    second = slice(1, 2 * half, 2) if interleaved else slice(half, 2 * half)
    y = _heads(x, head_dim)
    a, b = y[..., first].copy(), y[..., second].copy()
    c, s = cos[positions][:, None, :], sin[positions][:, None, :]
    y[..., first] = a * c - b * s
    y[..., second] = a * s + b * c
    return y.reshape(x.shape).astype(np.float32)


def attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    starts: np.ndarray,
    *,
    head_dim: int,
    scale: float,
    causal: bool,
) -> np.ndarray:
    """softmax(scale q k^T) v for every sequence and head: float32 [rows, n_heads * head_dim].

    q: float32 [rows, n_heads * head_dim].  k, v: float32 [rows, n_kv_heads * head_dim]; query
    head h reads key/value head h // (n_heads / n_kv_heads).
    starts: int32 [n_sequences + 1]; sequence s is rows starts[s] .. starts[s + 1] and sees no
    other rows. causal: a row sees itself and the rows before it.
    ValueError if starts do not run from 0 to rows in order.
    """
    if starts[0] != 0 or starts[-1] != len(q) or np.any(np.diff(starts) < 0):
        raise ValueError(f"sequence starts must run from 0 to {len(q)} in order")
    q, k, v = (_heads(t, head_dim) for t in (q, k, v))
    n_heads = q.shape[1]
    group = n_heads // k.shape[1]
    out = np.empty(q.shape)
    for begin, end in pairwise(starts):
        for h in range(n_heads):
            keys, values = k[begin:end, h // group], v[begin:end, h // group]
            scores = scale * (q[begin:end, h] @ keys.T)
            if causal:
                scores[np.triu(np.ones(scores.shape, bool), 1)] = -np.inf
            out[begin:end, h] = _softmax(scores) @ values
    return out.reshape(len(q), n_heads * head_dim).astype(np.float32)


def _heads(x: np.ndarray, head_dim: int) -> np.ndarray:
    """A float64 copy as [rows, n_heads, head_dim]."""
    return x.astype(np.float64).reshape(len(x), x.shape[1] // head_dim, head_dim)


def _softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis, shifted so that nothing overflows."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True, initial=-np.inf))
    return e / np.sum(e, axis=-1, keepdims=True)


def swiglu(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """silu(gate) * up, element by element, float32; silu(g) = g / (1 + exp(-g))."""
    gate = gate.astype(np.float64)
    sigmoid = np.exp(-np.logaddexp(0, -gate))  # 1 / (1 + exp(-g)) without overflow
    return (gate * sigmoid * up).astype(np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh approximation, element by element, float32 (ggml's GGML_OP_GELU)."""
    x = x.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    return (0.5 * x * (1 + np.tanh(inner))).astype(np.float32)
