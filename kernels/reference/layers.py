"""The operations between the matmuls of a transformer; float64 inside, float32 out.

tangents: rows are 1 + tangents equal slices, a primal and directional derivatives of it; so is the
result. Rotary embedding is linear: it needs no such number.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fwdllm.kernels.reference.checks import require_indices, require_window
from fwdllm.kernels.reference.tangents import join, split


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, tangents: int = 0) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis: float32 [rows, d] and [d]."""
    x, dx = split(x, tangents)
    scale = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    dscale = -(scale**3) * np.mean(x * dx, axis=-1, keepdims=True)
    return join(x * scale * weight, (dx * scale + x * dscale) * weight)


def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, tangents: int = 0
) -> np.ndarray:
    """(x - mean) / sqrt(variance + eps) * weight + bias: float32 [rows, d], [d] and [d]."""
    x, dx = (t - np.mean(t, axis=-1, keepdims=True) for t in split(x, tangents))
    scale = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    dscale = -(scale**3) * np.mean(x * dx, axis=-1, keepdims=True)
    return join(x * scale * weight + bias, (dx * scale + x * dscale) * weight)


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
    window: int = 0,
    softcap: float = 0.0,
    tangents: int = 0,
) -> np.ndarray:
    """softmax(scale q k^T) v for every sequence and head: float32 [rows, n_heads * head_dim].

    q: float32 [rows, n_heads * head_dim].  k, v: float32 [rows, n_kv_heads * head_dim]; query
    head h reads key/value head h // (n_heads / n_kv_heads).
    starts: int32 [n_sequences + 1]; sequence s is rows starts[s] .. starts[s + 1] and sees no
    other rows. With tangents first the primal's sequences, then those of each tangent.
    causal: a row sees itself and the rows before it, else also those behind it.  window: of these
    only rows less than ``window`` away; 0 is no bound.  softcap: c > 0 makes c tanh(s / c) of a
    score s. ValueError if starts do not run from 0 to rows in order, or for a window below 0.
    """
    require_window(window, softcap)
    if starts[0] != 0 or starts[-1] != len(q) or np.any(np.diff(starts) < 0):
        raise ValueError(f"sequence starts must run from 0 to {len(q)} in order")
    n_heads, group = q.shape[1] // head_dim, q.shape[1] // k.shape[1]
    (q, dq), (k, dk), (v, dv) = (split(_heads(t, head_dim), tangents) for t in (q, k, v))
    y, dy = np.empty(q.shape), np.empty(dq.shape)
    for begin, end in pairwise(starts[: (len(starts) - 1) // (1 + tangents) + 1]):
        rows = slice(begin, end)
        for h in range(n_heads):
            g = h // group
            scores, slope = softcapped(scale * (q[rows, h] @ k[rows, g].T), softcap)
            scores[~seen(end - begin, causal, window)] = -np.inf
            p = _softmax(scores)
            y[rows, h] = p @ v[rows, g]
            for t in range(tangents):
                ds = scale * (dq[t, rows, h] @ k[rows, g].T + q[rows, h] @ dk[t, rows, g].T)
                ds *= slope
                dp = p * (ds - np.sum(p * ds, axis=-1, keepdims=True))
                dy[t, rows, h] = dp @ v[rows, g] + p @ dv[t, rows, g]
    return join(y, dy).reshape(-1, n_heads * head_dim)


def softcapped(x: np.ndarray, softcap: float) -> tuple[np.ndarray, np.ndarray]:
    """softcap tanh(x / softcap) and its slope; x and ones if softcap is 0.

    NaN if x is infinite, so that overflow is seen.
    """
    if softcap == 0:
        return x, np.ones_like(x)
    t = np.tanh(x / softcap) + 0 * x
    return softcap * t, 1 - t**2


def seen(n: int, causal: bool, window: int) -> np.ndarray:
    """Whether row i of a sequence sees row j: bool [n, n]."""
    behind = np.arange(n)[:, None] - np.arange(n)
    within = np.abs(behind) < window if window else np.ones((n, n), bool)
    return within & (behind >= 0) if causal else within


def _heads(x: np.ndarray, head_dim: int) -> np.ndarray:
    """A float64 copy as [rows, n_heads, head_dim]."""
    return x.astype(np.float64).reshape(len(x), x.shape[1] // head_dim, head_dim)


def _softmax(x: np.ndarray) -> np.ndarray:
    """exp(x) / sum(exp(x)) over the last axis, shifted so that nothing overflows."""
    e = np.exp(x - np.max(x, axis=-1, keepdims=True, initial=-np.inf))
    return e / np.sum(e, axis=-1, keepdims=True)


def swiglu(gate: np.ndarray, up: np.ndarray, tangents: int = 0) -> np.ndarray:
    """silu(gate) * up, element by element, float32; silu(g) = g / (1 + exp(-g))."""
    (gate, dgate), (up, dup) = split(gate, tangents), split(up, tangents)
    sigmoid = _sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return join(gate * sigmoid * up, slope * dgate * up + gate * sigmoid * dup)


def geglu(gate: np.ndarray, up: np.ndarray, tangents: int = 0) -> np.ndarray:
    """gelu(gate) * up, element by element, float32."""
    (gate, dgate), (up, dup) = split(gate, tangents), split(up, tangents)
    value, slope = gelu_and_slope(gate)
    return join(value * up, slope * dgate * up + value * dup)


def gelu(x: np.ndarray, tangents: int = 0) -> np.ndarray:
    """GELU in its tanh approximation, element by element, float32 (ggml's GGML_OP_GELU).

    0.5 x (1 + tanh(t)) = x sigmoid(2 t), t = sqrt(2 / pi) (x + 0.044715 x^3).
    """
    x, dx = split(x, tangents)
    value, slope = gelu_and_slope(x)
    return join(value, slope * dx)


def gelu_and_slope(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """gelu(x) and its derivative s + x s (1 - s) dz/dx, s = sigmoid(z), z = 2 t; x float64."""
    s = _sigmoid(2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))
    steep = 2 * np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return x * s, s + x * s * (1 - s) * steep


def _sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)) without overflow."""
    return np.exp(-np.logaddexp(0, -x))
