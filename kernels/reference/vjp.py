"""Cotangents: from dy, the gradient of a loss by an operation's outputs, that by its inputs.

Float64 inside, float32 out. Each is of the operation of that name for one plain lane. Rotary
embedding has none of its own: it is linear, and its transpose is itself with -sin.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from fwdllm.kernels.api import Matrix
from fwdllm.kernels.reference.checks import require_window
from fwdllm.kernels.reference.decode import dequantize
from fwdllm.kernels.reference.layers import gelu_and_slope, seen, softcapped
from fwdllm.kernels.reference.linear import row_products
from fwdllm.kernels.reference.loss import cross_entropy
from fwdllm.kernels.types import LoRA


def matmul_vjp(
    dy: np.ndarray, weight: Matrix, *, lora: LoRA | None = None, exact: bool = False
) -> np.ndarray:
    """dx = dy W + scale (dy B) A: float32 [rows, n_out] to [rows, n_in]. exact: see ``matmul``."""
    dx = row_products(dy, dequantize(weight).T)
    if lora is not None:
        dx += lora.scale * row_products(row_products(dy, lora.b.T), lora.a.T)
    return dx.astype(np.float32)


def lora_vjp(x: np.ndarray, dy: np.ndarray, lora: LoRA, da: np.ndarray, db: np.ndarray) -> None:
    """da += scale (dy B)^T x and db += scale dy^T (x A^T), in place.

    x: [rows, n_in].  dy: [rows, n_out].  da, db: of the shapes of A and B.
    """
    da += lora.scale * (row_products(dy, lora.b.T).T @ x.astype(np.float64))
    db += lora.scale * (dy.T.astype(np.float64) @ row_products(x, lora.a))


def cross_entropy_vjp(
    x: np.ndarray,
    weight: Matrix,
    labels: np.ndarray,
    *,
    softcap: float = 0.0,
    exact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The losses, and dx[r] = sum_j p[r, j] W[j] - W[labels[r]], each row's of its own loss.

    float64 [rows] and float32 [rows, n_in]; p is the softmax of the row's logits. With a soft cap
    each term is times its slope.
    """
    nll = cross_entropy(x, weight, labels, softcap=softcap, exact=exact)
    w = dequantize(weight).astype(np.float64)
    logits, slope = softcapped(row_products(x, w), softcap)
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    p[np.arange(len(x)), labels] -= 1
    return nll, row_products(p * slope, w.T).astype(np.float32)


def rms_norm_vjp(x: np.ndarray, weight: np.ndarray, eps: float, dy: np.ndarray) -> np.ndarray:
    """dx = scale (g - x scale^2 mean(x g)), g = dy weight, scale = 1 / sqrt(mean(x^2) + eps)."""
    x, g = x.astype(np.float64), dy.astype(np.float64) * weight
    scale = 1 / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps)
    dx = scale * (g - x * scale**2 * np.mean(x * g, axis=-1, keepdims=True))
    return dx.astype(np.float32)


def layer_norm_vjp(x: np.ndarray, weight: np.ndarray, eps: float, dy: np.ndarray) -> np.ndarray:
    """That of ``rms_norm_vjp`` for the centred x, without its mean."""
    centred = x - np.mean(x, axis=-1, keepdims=True, dtype=np.float64)
    g = dy.astype(np.float64) * weight
    scale = 1 / np.sqrt(np.mean(centred**2, axis=-1, keepdims=True) + eps)
    dx = scale * (g - centred * scale**2 * np.mean(centred * g, axis=-1, keepdims=True))
    return (dx - np.mean(dx, axis=-1, keepdims=True)).astype(np.float32)


def swiglu_vjp(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of gate silu'(gate) up dy, and of up silu(gate) dy."""
    gate, up, dy = (a.astype(np.float64) for a in (gate, up, dy))
    sigmoid = np.exp(-np.logaddexp(0, -gate))
    dgate = sigmoid * (1 + gate * (1 - sigmoid)) * up * dy
    return dgate.astype(np.float32), (gate * sigmoid * dy).astype(np.float32)


def geglu_vjp(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of gate gelu'(gate) up dy, and of up gelu(gate) dy."""
    value, slope = gelu_and_slope(gate.astype(np.float64))
    return (slope * up * dy).astype(np.float32), (value * dy).astype(np.float32)


def gelu_vjp(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """dx = gelu'(x) dy."""
    return (gelu_and_slope(x.astype(np.float64))[1] * dy).astype(np.float32)


def attention_vjp(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    starts: np.ndarray,
    dy: np.ndarray,
    *,
    head_dim: int,
    scale: float,
    causal: bool,
    window: int = 0,
    softcap: float = 0.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dV = P^T dY, dS = scale P (dP - rowsum(P dP)), dP = dY V^T, dQ = dS K, dK = dS^T Q.

    With a soft cap dS is times its slope.
    """
    require_window(window, softcap)
    group = q.shape[1] // k.shape[1]
    q, k, v, dy = (
        a.astype(np.float64).reshape(len(a), a.shape[1] // head_dim, head_dim)
        for a in (q, k, v, dy)
    )
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    for begin, end in pairwise(starts):
        rows = slice(begin, end)
        for h in range(q.shape[1]):
            g = h // group
            scores, slope = softcapped(scale * (q[rows, h] @ k[rows, g].T), softcap)
            scores[~seen(end - begin, causal, window)] = -np.inf
            p = np.exp(scores - scores.max(axis=-1, keepdims=True, initial=-np.inf))
            p /= p.sum(axis=-1, keepdims=True)
            dp = dy[rows, h] @ v[rows, g].T
            ds = scale * slope * p * (dp - np.sum(p * dp, axis=-1, keepdims=True))
            dq[rows, h] = ds @ k[rows, g]
            dk[rows, g] += ds.T @ q[rows, h]
            dv[rows, g] += p.T @ dy[rows, h]
    of_q, of_k, of_v = (
        a.reshape(len(a), a.shape[1] * head_dim).astype(np.float32) for a in (dq, dk, dv)
    )
    return of_q, of_k, of_v
