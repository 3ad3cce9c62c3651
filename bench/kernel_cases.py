"""Every kernel on inputs of the sizes in a model of a billion parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from fwdllm.bench.shapes import random_weights
from fwdllm.engine.models.rotary import Rotary
from fwdllm.kernels import cpu
from fwdllm.kernels.types import Lanes, LoRA, QuantType, Weight, row_bytes

Call = Callable[[], object]

DEFAULT_TYPES = (QuantType.Q4_0, QuantType.Q4_K, QuantType.Q8_0)
DEFAULT_ROWS = (512,)

# n_out, n_in: TinyLlama's attention and feed-forward, and a 7B model's attention.
MATRICES = ((2048, 2048), (5632, 2048), (2048, 5632), (4096, 4096))
LANES, RANK = 8, 8
TANGENTS = LANES - 1
N_VOCAB, WIDTH, HEADS, KV_HEADS, HEAD_DIM = 32000, 2048, 32, 4, 64
LOSS_ROWS = 256
LAYER_ROWS = 2048  # 16 MiB an array: measures memory, not a cache
N_NORMALS, N_SEEDS = 1 << 20, 32

_GIGA = 1e9


@dataclass(frozen=True)
class Case:
    """One kernel on one input.

    name: unique; AxBxC is a matrix of A outputs and B inputs on C rows.  kernel: the function.
    work: of one call, in 10^9 units.  unit: of the rate, work / seconds.  limit: what bounds the
    rate: "int8" or "fp32" operations, "read" (of memory), "normal" (the random generator), "none".
    prepare: makes the inputs and returns the call.  baseline: the same for the call relative to
    which the overhead is measured.  traffic: 10^9 bytes that a call reads and writes at least: its
    operands and results, each once; 0 where the unit is not operations.
    """

    name: str
    kernel: str
    unit: str
    work: float
    limit: str
    prepare: Callable[[], Call]
    baseline: Callable[[], Call] | None = None
    traffic: float = 0.0


def cases(types: Sequence[QuantType], rows: Sequence[int]) -> Iterator[Case]:
    """Every case. types, rows: of matmuls."""
    yield generator()
    for name, prepare in (("seeded_axpy", _seeded_axpy), ("seeded_dot", _seeded_dot)):
        work = N_NORMALS * N_SEEDS / _GIGA
        yield Case(f"{name} {N_SEEDS} seeds", name, "G/s", work, "normal", prepare)
    for type in types:
        yield from _products(type, rows)
    yield from _layers()
    yield _attention_case(1, 512)
    yield _attention_case(8, 64)
    yield _attention_case(1, 64, TANGENTS)


def generator() -> Case:
    """The random generator, which bounds the seeded kernels."""
    return Case("normal", "normal", "G/s", N_NORMALS / _GIGA, "none", _normal)


def _products(type: QuantType, rows: Sequence[int]) -> Iterator[Case]:
    floats = type in (QuantType.F32, QuantType.F16, QuantType.BF16)
    limit = "fp32" if floats else "int8"
    for n in rows:
        for n_out, n_in in MATRICES:
            work = 2 * n * n_out * n_in / _GIGA
            traffic = _traffic(type, n_out, n_in, n * (n_in + n_out))
            name = f"matmul {type.name} {n_out}x{n_in}x{n}"
            plain = partial(_matmul, type, n_out, n_in, n)
            yield Case(name, "matmul", "GOPS", work, limit, plain, traffic=traffic)
            for lanes, what in (
                (_pairs(), f"{LANES} lanes"),
                (_tangents(), f"{TANGENTS} tangents"),
            ):
                adapted = partial(plain, lanes=lanes)
                yield Case(
                    f"{name}, {what}", "matmul", "GOPS", work, limit, adapted, plain, traffic
                )
        n_out, n_in = MATRICES[0]
        work = 2 * n * n_out * n_in / _GIGA
        traffic = _traffic(type, n_out, n_in, n * (n_in + n_out))
        exact = partial(_matmul, type, n_out, n_in, n, exact=True)
        name = f"exact matmul {type.name} {n_out}x{n_in}x{n}"
        yield Case(name, "matmul", "GOPS", work, "fp32", exact, traffic=traffic)
    work = 2 * LOSS_ROWS * N_VOCAB * WIDTH / _GIGA
    traffic = _traffic(type, N_VOCAB, WIDTH, LOSS_ROWS * WIDTH)
    name = f"cross_entropy {type.name} {N_VOCAB}x{WIDTH}x{LOSS_ROWS}"
    loss = partial(_cross_entropy, type)
    yield Case(name, "cross_entropy", "GOPS", work, limit, loss, traffic=traffic)
    work = 4 * LAYER_ROWS * WIDTH / _GIGA
    gather = partial(_embedding, type)
    yield Case(f"embedding {type.name}", "embedding", "GB/s", work, "read", gather)


def _traffic(type: QuantType, n_out: int, n_in: int, floats: int) -> float:
    """10^9 bytes of a weight as it is stored, and of some float32 numbers."""
    return (n_out * row_bytes(type, n_in) + 4 * floats) / _GIGA


def _layers() -> Iterator[Case]:
    array = 4 * LAYER_ROWS * WIDTH / _GIGA
    kernels: tuple[tuple[str, int, Callable[..., Call]], ...] = (
        ("rms_norm", 2, _rms_norm),
        ("layer_norm", 2, _layer_norm),
        ("rope", 2, _rope),
        ("swiglu", 3, _swiglu),
        ("gelu", 2, _gelu),
    )
    for name, arrays, prepare in kernels:  # arrays read and written
        yield Case(f"{name} {LAYER_ROWS}x{WIDTH}", name, "GB/s", arrays * array, "read", prepare)
        if name == "rope":  # rope is linear: it treats tangents like other rows
            continue
        with_tangents = partial(prepare, tangents=TANGENTS)
        name_t = f"{name} {LAYER_ROWS}x{WIDTH}, {TANGENTS} tangents"
        yield Case(name_t, name, "GB/s", arrays * array, "read", with_tangents)


def _attention_case(sequences: int, tokens: int, tangents: int = 0) -> Case:
    pairs = sequences * tokens * (tokens + 1) // 2
    # One matmul for scores and one for weighted sums; a tangent needs two for each.
    work = 4 * pairs * HEADS * HEAD_DIM * (1 + 2 * tangents) / _GIGA
    name = f"attention {sequences}x{tokens}, {HEADS}/{KV_HEADS} heads of {HEAD_DIM}"
    if tangents:
        name += f", {tangents} tangents"
    prepare = partial(_attention, sequences, tokens, tangents)
    # Queries and results, keys and values.
    width = 2 * (HEADS + KV_HEADS) * HEAD_DIM
    traffic = 4 * sequences * tokens * width * (1 + tangents) / _GIGA
    return Case(name, "attention", "GOPS", work, "fp32", prepare, traffic=traffic)


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def _weight(type: QuantType, n_out: int, n_in: int) -> Weight:
    rng = np.random.default_rng(0)
    return Weight(random_weights(rng, type, n_out, n_in, n_in**-0.5), type, n_out, n_in)


def _pairs() -> Lanes:
    signs = np.tile(np.array([1e-3, -1e-3], np.float32), LANES // 2)
    return Lanes(np.repeat(np.arange(LANES // 2, dtype=np.uint64), 2), signs)


def _tangents() -> Lanes:
    coefficients = np.r_[np.float32(0), np.ones(TANGENTS, np.float32)]
    return Lanes(np.arange(LANES, dtype=np.uint64), coefficients, tangents=True)


def _matmul(
    type: QuantType,
    n_out: int,
    n_in: int,
    rows: int,
    lanes: Lanes | None = None,
    exact: bool = False,
) -> Call:
    x, weight = _random(rows, n_in), _weight(type, n_out, n_in)
    plain = partial(cpu.matmul, x, weight, exact=exact)
    if lanes is None:
        return plain
    lora = LoRA(_random(RANK, n_in), _random(n_out, RANK), scale=2.0, offset=0)
    return partial(plain, lora=lora, lanes=lanes)


def _cross_entropy(type: QuantType) -> Call:
    x, weight = _random(LOSS_ROWS, WIDTH), _weight(type, N_VOCAB, WIDTH)
    return partial(cpu.cross_entropy, x, weight, np.arange(LOSS_ROWS, dtype=np.int32))


def _embedding(type: QuantType) -> Call:
    ids = np.random.default_rng(0).integers(0, N_VOCAB, LAYER_ROWS, np.int32)
    return partial(cpu.embedding, _weight(type, N_VOCAB, WIDTH), ids)


def _normal() -> Call:
    return partial(cpu.normal, 0, 0, N_NORMALS)


def _seeded_axpy() -> Call:
    seeds = np.arange(N_SEEDS, dtype=np.uint64)
    return partial(cpu.seeded_axpy, _random(N_NORMALS), seeds, np.full(N_SEEDS, 1e-6))


def _seeded_dot() -> Call:
    return partial(cpu.seeded_dot, _random(N_NORMALS), np.arange(N_SEEDS, dtype=np.uint64))


def _rms_norm(tangents: int = 0) -> Call:
    return partial(cpu.rms_norm, _random(LAYER_ROWS, WIDTH), _random(WIDTH), 1e-5, tangents)


def _layer_norm(tangents: int = 0) -> Call:
    x, weight, bias = _random(LAYER_ROWS, WIDTH), _random(WIDTH), _random(WIDTH)
    return partial(cpu.layer_norm, x, weight, bias, 1e-5, tangents)


def _rope() -> Call:
    positions = np.arange(LAYER_ROWS, dtype=np.int32)
    cos, sin = Rotary(dim=HEAD_DIM, base=10000.0).tables(LAYER_ROWS)
    return partial(cpu.rope, _random(LAYER_ROWS, WIDTH), positions, cos, sin, HEAD_DIM, True)


def _swiglu(tangents: int = 0) -> Call:
    return partial(cpu.swiglu, _random(LAYER_ROWS, WIDTH), _random(LAYER_ROWS, WIDTH), tangents)


def _gelu(tangents: int = 0) -> Call:
    return partial(cpu.gelu, _random(LAYER_ROWS, WIDTH), tangents)


def _attention(sequences: int, tokens: int, tangents: int) -> Call:
    rows = sequences * tokens * (1 + tangents)
    q = _random(rows, HEADS * HEAD_DIM)
    k, v = _random(rows, KV_HEADS * HEAD_DIM), _random(rows, KV_HEADS * HEAD_DIM)
    starts = np.arange(0, rows + 1, tokens, dtype=np.int32)
    scale = HEAD_DIM**-0.5
    options = {"head_dim": HEAD_DIM, "scale": scale, "causal": True, "tangents": tangents}
    return partial(cpu.attention, q, k, v, starts, **options)
