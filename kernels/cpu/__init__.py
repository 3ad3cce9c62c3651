"""Kernels for processors: the operations of ``kernels.api`` in C++ (kernels/cpu/*.h).

``isa`` names the instruction set chosen at import, the fastest of ``isas``, all of this machine
(``choice``); FWDLLM_ISA overrides it and FWDLLM_NUM_THREADS the number of threads. ``compiler``
built the kernels. With ``exact=True`` matmuls are fp32; otherwise activations that meet quantized
weights are rounded to what ``activations`` says: "int8" with a scale per 32 values, or "bf16";
perturbed lanes as their difference to a reference lane (``Lanes.references``), tangents with scales
of their own.

tangents: an argument of operations that are not linear. Rows are then 1 + tangents equal slices, a
primal and directional derivatives of it, and so is the result.
"""

from __future__ import annotations

import numpy as np

from fwdllm.kernels.api import Matrix
from fwdllm.kernels.cpu import _native, choice  # type: ignore[attr-defined]
from fwdllm.kernels.reference.arrays import (
    array,
    contiguous,
    free_bytes,
    host,
    repeated,
    spread,
    take,
    weight,
    zeros,
)
from fwdllm.kernels.types import Lanes, LoRA

isa: str = choice.use_fastest(_native)
isas: tuple[str, ...] = _native.isas
activations: str = "bf16" if isa in ("amx", "avx512_bf16") else "int8"
compiler: str = _native.compiler
num_threads = _native.num_threads
set_num_threads = _native.set_num_threads

__all__ = [
    "activations",
    "add_lora",
    "array",
    "attention",
    "attention_vjp",
    "compiler",
    "contiguous",
    "cross_entropy",
    "cross_entropy_vjp",
    "dequantize",
    "embedding",
    "free_bytes",
    "from_relative",
    "geglu",
    "geglu_vjp",
    "gelu",
    "gelu_vjp",
    "host",
    "isa",
    "isas",
    "layer_norm",
    "layer_norm_vjp",
    "lora_vjp",
    "matmul",
    "matmul_vjp",
    "normal",
    "num_threads",
    "peak",
    "philox",
    "rademacher",
    "repeated",
    "rms_norm",
    "rms_norm_vjp",
    "rope",
    "seeded_axpy",
    "seeded_dot",
    "set_num_threads",
    "spread",
    "swiglu",
    "swiglu_vjp",
    "take",
    "to_relative",
    "weight",
    "zeros",
]


def _f32(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float32)


def peak(kind: str) -> float:
    """This machine's own limit with ``isa`` on all threads, measured now (about 0.1 s).

    kind: "int8", "bf16" or "fp32", operations per second of that multiply-add (0 if ``isa`` has no
    instruction for it), or "read", bytes per second streamed from memory.
    """
    rate: float = _native.peak(kind)
    return rate


def philox(seed: int, start: int, count: int) -> np.ndarray:
    """Philox-4x32-10 words of counters start .. start+count: uint32 [count, 4]."""
    out = np.empty((count, 4), np.uint32)
    _native.philox(int(seed), int(start), out)
    return out


def normal(seed: int, start: int, count: int) -> np.ndarray:
    """Elements start .. start+count of the normal direction v(seed): float32 [count]."""
    out = np.empty(count, np.float32)
    _native.random_values("normal", int(seed), int(start), out)
    return out


def rademacher(seed: int, start: int, count: int) -> np.ndarray:
    """Elements start .. start+count of the direction of signs: float32 [count], -1 or +1."""
    out = np.empty(count, np.float32)
    _native.random_values("rademacher", int(seed), int(start), out)
    return out


def seeded_axpy(
    theta: np.ndarray,
    seeds: np.ndarray,
    coefficients: np.ndarray,
    *,
    offset: int = 0,
    distribution: str = "normal",
) -> None:
    """theta += sum_k coefficients[k] v(seeds[k])[offset:], in place; theta float32 [n]."""
    seeds = np.ascontiguousarray(seeds, np.uint64)
    _native.seeded_axpy(
        theta, seeds, _f32(coefficients), offset=int(offset), distribution=distribution
    )


def seeded_dot(
    g: np.ndarray, seeds: np.ndarray, *, offset: int = 0, distribution: str = "normal"
) -> np.ndarray:
    """g . v(seeds[k])[offset:] for every k: float64 [k]; g float32 [n]."""
    out = np.empty(len(seeds), np.float64)
    seeds = np.ascontiguousarray(seeds, np.uint64)
    _native.seeded_dot(_f32(g), seeds, offset=int(offset), distribution=distribution, out=out)
    return out


def embedding(weight: Matrix, ids: np.ndarray) -> np.ndarray:
    """Rows ``ids`` (int32 [rows]) of a weight, decoded: float32 [rows, n_in]."""
    out = np.empty((len(ids), weight.n_in), np.float32)
    ids = np.ascontiguousarray(ids, np.int32)
    _native.gather(_weight(weight), ids, out)
    return out


def dequantize(weight: Matrix) -> np.ndarray:
    """The whole weight as float32 [n_out, n_in]."""
    return embedding(weight, np.arange(weight.n_out, dtype=np.int32))


def matmul(
    x: np.ndarray,
    weight: Matrix,
    *,
    bias: np.ndarray | None = None,
    lora: LoRA | None = None,
    lanes: Lanes | None = None,
    exact: bool = False,
) -> np.ndarray:
    """x W^T + bias + seeded LoRA, float32 [rows, n_out]; x float32 [rows, n_in].

    Rows of lane l are multiplied by its own variant of the adapter (see ``Lanes``).
    """
    lanes = lanes or Lanes.plain()
    y = np.empty((len(x), weight.n_out), np.float32)
    _native.matmul(
        _f32(x),
        _weight(weight),
        bias=bias,
        lora=None if lora is None else _lora(lora),
        lanes=_lanes(lanes, len(x)),
        references=_row_references(lanes, len(x)),
        exact=exact,
        y=y,
    )
    return y


def add_lora(y: np.ndarray, x: np.ndarray, lora: LoRA, lanes: Lanes) -> None:
    """y += seeded LoRA term of x, in place: what ``matmul`` adds, for an x W^T computed elsewhere.

    y float32 [rows, n_out], x float32 [rows, n_in].
    """
    _native.add_lora(_f32(x), lora=_lora(lora), lanes=_lanes(lanes, len(x)), y=y)


def to_relative(x: np.ndarray, references: np.ndarray) -> np.ndarray:
    """x[r] = (x[r] - x[references[r]]) s[r] if the reference is another row; returns s.

    x: float32 [rows, d], changed in place.  references: int32 [rows]; a reference is an earlier
    row, or r itself, and must be its own reference.  s: float32 [rows], powers of two that bring a
    row's largest magnitude to 1 .. 2; 1 if it is almost 0 or almost infinite. What rows have in
    common is then rounded once by the matmul that reads them.
    """
    scales = np.ones(len(x), np.float32)
    _native.to_relative(x, references, scales)
    return scales


def from_relative(y: np.ndarray, references: np.ndarray, scales: np.ndarray) -> None:
    """Undoes ``to_relative`` after a matmul: y[r] = y[r] / scales[r] + y[references[r]].

    It changes y in place, only in rows whose reference is another row.
    """
    _native.from_relative(y, references, scales)


def _weight(weight: Matrix) -> _native.Weight:
    return _native.Weight(weight.data, type=int(weight.type), n_in=weight.n_in)


def _lanes(lanes: Lanes, rows: int) -> _native.Lanes:
    starts = [0, rows // len(lanes)] if lanes.starts is None else lanes.starts
    return _native.Lanes(
        seeds=np.ascontiguousarray(lanes.seeds, np.uint64).reshape(len(lanes), -1),
        coefficients=lanes.coefficients,
        starts=np.asarray(starts, np.int32),
        distribution=lanes.distribution,
        tangents=lanes.tangents,
    )


def _lora(lora: LoRA) -> _native.LoRA:
    mask_a, mask_b = None, None
    if lora.mask is not None:
        mask_a, mask_b = np.split(_f32(lora.mask), [lora.a.size])
    a = _native.Factor(_f32(lora.a), offset=int(lora.offset), mask=mask_a, basis=lora.basis_a)
    b = _native.Factor(_f32(lora.b), offset=int(lora.offset_b), mask=mask_b, basis=lora.basis_b)
    return _native.LoRA(a, b, scale=lora.scale)


def _row_references(lanes: Lanes, rows: int) -> np.ndarray:
    per_lane = rows // len(lanes)
    if per_lane * len(lanes) != rows:
        raise ValueError(f"{rows} rows are not whole lanes of {len(lanes)}")
    starts = lanes.references * per_lane
    return (starts[:, None] + np.arange(per_lane)).astype(np.int32).ravel()


def cross_entropy(
    x: np.ndarray,
    weight: Matrix,
    labels: np.ndarray,
    *,
    lanes: Lanes | None = None,
    softcap: float = 0.0,
    exact: bool = False,
) -> np.ndarray:
    """-log softmax(x W^T)[labels] in nats, float64 [rows]; the logits are never stored.

    Rows of tangents have the derivatives of those losses.  softcap: c > 0 makes c tanh(l / c) of a
    logit l.
    """
    nll = np.empty(len(x), np.float64)
    lanes = lanes or Lanes.plain()
    _native.cross_entropy(
        _f32(x),
        _weight(weight),
        np.ascontiguousarray(labels, np.int32),
        references=_row_references(lanes, len(x)),
        tangents=lanes.n_tangents,
        softcap=softcap,
        exact=exact,
        nll=nll,
    )
    return nll


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float, tangents: int = 0) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight along rows; x float32 [rows, d]."""
    y = np.empty_like(x)
    _native.rms_norm(x, weight, eps=eps, tangents=tangents, y=y)
    return y


def layer_norm(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float, tangents: int = 0
) -> np.ndarray:
    """(x - mean) / sqrt(var + eps) * weight + bias along rows; x float32 [rows, d]."""
    y = np.empty_like(x)
    _native.layer_norm(x, weight, bias, eps=eps, tangents=tangents, y=y)
    return y


def rope(
    x: np.ndarray,
    positions: np.ndarray,
    cos: np.ndarray,
    sin: np.ndarray,
    head_dim: int,
    interleaved: bool,
) -> np.ndarray:
    """Rotary embedding of x [rows, heads * head_dim]; cos, sin [n_positions, rotated / 2].

    interleaved: pairs (2i, 2i+1), the layout of llama GGUF files; else (i, i + rotated / 2).
    """
    y = np.empty_like(x)
    _native.rope(x, positions, cos, sin, head_dim=head_dim, interleaved=interleaved, y=y)
    return y


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
    """Softmax attention inside each sequence starts[i] .. starts[i+1] of the rows.

    q float32 [rows, heads * head_dim]; k, v [rows, kv_heads * head_dim], kv_heads dividing heads.
    With tangents, starts has first the primal's sequences, then those of each tangent.  causal: a
    row sees itself and those before it.  window: of what it sees only rows less than so many away;
    0 is all.  softcap: c > 0 makes c tanh(s / c) of a score s.
    """
    y = np.empty_like(q)
    _native.attention(
        q,
        k,
        v,
        starts,
        head_dim=head_dim,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        tangents=tangents,
        y=y,
    )
    return y


def swiglu(gate: np.ndarray, up: np.ndarray, tangents: int = 0) -> np.ndarray:
    """silu(gate) * up, elementwise on float32 [rows, d]."""
    y = np.empty_like(gate)
    _native.swiglu(gate, up, tangents=tangents, y=y)
    return y


def geglu(gate: np.ndarray, up: np.ndarray, tangents: int = 0) -> np.ndarray:
    """gelu(gate) * up, elementwise on float32 [rows, d]."""
    y = np.empty_like(gate)
    _native.geglu(gate, up, tangents=tangents, y=y)
    return y


def gelu(x: np.ndarray, tangents: int = 0) -> np.ndarray:
    """GELU by its tanh approximation, as llama.cpp computes it; float32 [rows, d]."""
    y = np.empty_like(x)
    _native.gelu(x, tangents=tangents, y=y)
    return y


def matmul_vjp(
    dy: np.ndarray, weight: Matrix, *, lora: LoRA | None = None, exact: bool = False
) -> np.ndarray:
    """dx = dy W + scale (dy B) A: float32 [rows, n_out] to [rows, n_in].

    Without ``exact`` dy goes to int8 with a scale per 32 outputs, and so do the weights, whose own
    scales lie along the inputs.
    """
    dx = np.empty((len(dy), weight.n_in), np.float32)
    term = None if lora is None else _lora(lora)
    _native.matmul_vjp(_f32(dy), _weight(weight), term, exact=exact, dx=dx)
    return dx


def lora_vjp(x: np.ndarray, dy: np.ndarray, lora: LoRA, da: np.ndarray, db: np.ndarray) -> None:
    """da += scale (dy B)^T x and db += scale dy^T (x A^T), in place, row after row."""
    _native.lora_vjp(_f32(x), _f32(dy), _lora(lora), da, db)


def cross_entropy_vjp(
    x: np.ndarray,
    weight: Matrix,
    labels: np.ndarray,
    *,
    softcap: float = 0.0,
    exact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """``cross_entropy`` [rows] and the cotangents of x [rows, n_in], each of its row's loss."""
    nll, dx = np.empty(len(x), np.float64), np.empty((len(x), weight.n_in), np.float32)
    labels = np.ascontiguousarray(labels, np.int32)
    _native.cross_entropy_vjp(
        _f32(x), _weight(weight), labels, softcap=softcap, exact=exact, nll=nll, dx=dx
    )
    return nll, dx


def rms_norm_vjp(x: np.ndarray, weight: np.ndarray, eps: float, dy: np.ndarray) -> np.ndarray:
    """The cotangent of x of ``rms_norm``: float32 [rows, d]."""
    dx = np.empty_like(x)
    _native.rms_norm_vjp(x, weight, eps=eps, dy=dy, dx=dx)
    return dx


def layer_norm_vjp(x: np.ndarray, weight: np.ndarray, eps: float, dy: np.ndarray) -> np.ndarray:
    """The cotangent of x of ``layer_norm``: float32 [rows, d]."""
    dx = np.empty_like(x)
    _native.layer_norm_vjp(x, weight, eps=eps, dy=dy, dx=dx)
    return dx


def swiglu_vjp(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cotangents of gate and up: float32 [rows, d] each."""
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    _native.swiglu_vjp(gate, up, dy, dgate=dgate, dup=dup)
    return dgate, dup


def geglu_vjp(gate: np.ndarray, up: np.ndarray, dy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cotangents of gate and up: float32 [rows, d] each."""
    dgate, dup = np.empty_like(gate), np.empty_like(up)
    _native.geglu_vjp(gate, up, dy, dgate=dgate, dup=dup)
    return dgate, dup


def gelu_vjp(x: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """The cotangent of x of ``gelu``: float32 [rows, d]."""
    dx = np.empty_like(x)
    _native.gelu_vjp(x, dy, dx=dx)
    return dx


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
    """The cotangents of q, k and v; scores are computed again, some queries at a time."""
    dq, dk, dv = np.empty_like(q), np.empty_like(k), np.empty_like(v)
    _native.attention_vjp(
        q,
        k,
        v,
        starts,
        head_dim=head_dim,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        dy=dy,
        dq=dq,
        dk=dk,
        dv=dv,
    )
    return dq, dk, dv
