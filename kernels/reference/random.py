"""The one random stream of every device: Philox-4x32-10 and Box-Muller.

Element i of direction v(seed) is component i % 4 of Triton's ``tl.randn4x(seed, i // 4)``.
Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11), and
triton/language/random.py.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

_MASK = 0xFFFFFFFF
_N_ROUNDS = 10


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Philox-4x32-10 of whole counters: uint32 [n, 4] and two 32-bit key words -> uint32 [n, 4]."""
    c0, c1, c2, c3 = counter.astype(np.uint64).T  # 64 bits wide, so that products keep both halves
    k0, k1 = key
    for _ in range(_N_ROUNDS):
        p0, p2 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p2 >> 32) ^ c1 ^ k0, p2 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def philox(seed: int, start: int, count: int) -> np.ndarray:
    """Random integers of counters start .. start + count, as uint32 [count, 4].

    seed: uint64, the key (low word first).  start: uint64, in words 0 and 1 of the counter.
    """
    index = np.uint64(start) + np.arange(count, dtype=np.uint64)
    zero = np.zeros_like(index)
    counter = np.stack([index & _MASK, index >> 32, zero, zero], axis=1)
    key = int(np.uint64(seed))
    return philox4x32(counter, (key & _MASK, key >> 32))


def normal(seed: int, start: int, count: int) -> np.ndarray:
    """Standard normals: elements start .. start + count of v(seed), as float32 [count]."""
    return _elements(_box_muller, seed, start, count)


def rademacher(seed: int, start: int, count: int) -> np.ndarray:
    """Signs: -1 where the top bit of the integer is set, else +1, as float32 [count]."""
    return _elements(_signs, seed, start, count)


def direction(seed: int, start: int, count: int, distribution: str) -> np.ndarray:
    """Elements start .. start + count of v(seed); ValueError for an unknown distribution."""
    if distribution == "normal":
        return normal(seed, start, count)
    if distribution == "rademacher":
        return rademacher(seed, start, count)
    raise ValueError(f"unknown distribution {distribution!r}: use 'normal' or 'rademacher'")


def seeded_axpy(
    theta: np.ndarray,
    seeds: np.ndarray,
    coefficients: np.ndarray,
    *,
    offset: int = 0,
    distribution: str = "normal",
) -> None:
    """theta += sum_k coefficients[k] * v(seeds[k])[offset : offset + n], in place.

    theta: float32 [n].  seeds: uint64 [k].  coefficients: float32 [k]. The sum is taken in
    float64, in the order of the seeds, and rounded once. ValueError if the lengths differ.
    """
    total = theta.astype(np.float64)
    for seed, coefficient in zip(seeds, coefficients, strict=True):
        v = direction(seed, offset, len(theta), distribution)
        total += np.float64(coefficient) * v
    theta[:] = total


def seeded_dot(
    g: np.ndarray, seeds: np.ndarray, *, offset: int = 0, distribution: str = "normal"
) -> np.ndarray:
    """g . v(seeds[k])[offset : offset + n] for each k, as float64 [k].  g: float32 [n]."""
    wide = g.astype(np.float64)
    dots = [wide @ direction(seed, offset, len(g), distribution) for seed in seeds]
    return np.array(dots, np.float64)


def _elements(
    transform: Callable[[np.ndarray], np.ndarray], seed: int, start: int, count: int
) -> np.ndarray:
    first = start // 4
    last = (start + count + 3) // 4
    values = transform(philox(seed, first, last - first)).ravel()
    return values[start - 4 * first :][:count]


def _signs(bits: np.ndarray) -> np.ndarray:
    return np.where(bits >> 31, np.float32(-1), np.float32(1))


def _uniform(bits: np.ndarray) -> np.ndarray:
    """Triton's ``uint_to_uniform_float``: uint32 to float32 in [0, 1)."""
    x = bits.view(np.int32)
    x = np.where(x < 0, ~x, x)
    return x.astype(np.float32) * np.float32(4.6566127342e-10)


def _box_muller(bits: np.ndarray) -> np.ndarray:
    """Triton's ``pair_uniform_to_normal`` on components (0, 1) and (2, 3).

    The angle is rounded to float32 because Triton's is, and this changes the result noticeably.
    The rest is in float64, in the middle of what the float32 libraries of devices give.
    """
    u = _uniform(bits)
    u1, u2 = np.maximum(u[:, 0::2], np.float32(1e-7)), u[:, 1::2]
    angle = (np.float32(6.283185307179586) * u2).astype(np.float64)
    radius = np.sqrt(-2.0 * np.log(u1.astype(np.float64)))
    z = np.empty(bits.shape, np.float32)
    z[:, 0::2] = radius * np.cos(angle)
    z[:, 1::2] = radius * np.sin(angle)
    return z
