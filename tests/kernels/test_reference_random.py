"""The NumPy random stream against Random123's known answers and Triton's interpreter."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fwdllm.kernels import reference
from fwdllm.kernels.reference.random import _box_muller, philox4x32
from fwdllm.kernels.types import DISTRIBUTIONS

LAST_SEED = 2**64 - 1
SEEDS = st.integers(0, LAST_SEED)


# counter, key and output words from Random123's kat_vectors, philox4x32 with 10 rounds
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000",
     "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff",
     "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0",
     "d16cfe09 94fdcceb 5001e420 24126ea1"),
]  # fmt: skip


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN_ANSWERS)
def test_philox_known_answers(counter: str, key: str, want: str) -> None:
    def words(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    low, high = words(key)
    got = philox4x32(np.array([words(counter)], np.uint32), (low, high))
    assert got.dtype == np.uint32
    assert got.tolist() == [words(want)]


TRITON_COUNT = 1 << 15
TRITON_CASES = [(0, 0), (7, 5), (LAST_SEED, 1000), (12345678901234567890, 2**31 - TRITON_COUNT),
                (3, 2**32 - 9), (LAST_SEED - 1, LAST_SEED - 2 * TRITON_COUNT)]  # fmt: skip


@pytest.fixture(scope="module")
def triton_stream(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed (it is published for Linux on x86-64)")
    out = tmp_path_factory.mktemp("triton") / "stream.npz"
    script = Path(__file__).with_name("triton_stream.py")
    cases = [f"{seed}:{start}" for seed, start in TRITON_CASES]
    subprocess.run([sys.executable, script, out, str(TRITON_COUNT), *cases], check=True)
    with np.load(out) as arrays:
        return dict(arrays)


@pytest.mark.parametrize("k", range(len(TRITON_CASES)))
def test_philox_is_tritons(triton_stream: dict[str, np.ndarray], k: int) -> None:
    seed, start = TRITON_CASES[k]
    np.testing.assert_array_equal(
        reference.philox(seed, start, TRITON_COUNT), triton_stream[f"ints{k}"]
    )


@pytest.mark.parametrize("k", range(4))
def test_normal_is_tritons_randn4x(triton_stream: dict[str, np.ndarray], k: int) -> None:
    seed, start = TRITON_CASES[k]
    got = reference.normal(seed, 4 * start, 4 * TRITON_COUNT)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, triton_stream[f"normals{k}"].ravel(), rtol=0, atol=1e-6)


def test_box_muller_of_extreme_integers_is_tritons(triton_stream: dict[str, np.ndarray]) -> None:
    bits, want = triton_stream["edge_bits"], triton_stream["edge_normals"]
    assert np.isfinite(want).all()
    got = _box_muller(bits.reshape(-1, 4)).reshape(-1, 2)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-6)


def test_moments_of_the_normals() -> None:
    n = 1 << 20
    z = reference.normal(42, 0, n).astype(np.float64)
    # E z^m is 0, 1, 0, 3 and Var z^m is E z^2m - (E z^m)^2 = 1, 2, 15, 96
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(np.mean(z**power) - mean) < 4 * np.sqrt(variance / n)
    correlations = np.corrcoef(z.reshape(-1, 4), rowvar=False) - np.eye(4)
    assert np.abs(correlations).max() < 5 / np.sqrt(n / 4)
    other = reference.normal(43, 0, n)
    assert abs(np.mean(z * other)) < 4 / np.sqrt(n)


def test_rademacher_is_the_sign_bit() -> None:
    signs = reference.rademacher(9, 3, 1001)
    bits = reference.philox(9, 0, 251).ravel()[3:1004]
    assert signs.dtype == np.float32
    np.testing.assert_array_equal(signs, [-1 if b >= 2**31 else 1 for b in bits.tolist()])


@settings(deadline=None)
@given(SEEDS, st.integers(0, 2**62), st.integers(0, 40), st.integers(0, 60))
def test_slices_equal_slices_of_the_whole(seed: int, base: int, start: int, count: int) -> None:
    base -= base % 4
    for stream in (reference.normal, reference.rademacher):
        whole = stream(seed, base, 100)
        assert len(whole) == 100
        np.testing.assert_array_equal(
            stream(seed, base + start, count), whole[start : start + count]
        )
    np.testing.assert_array_equal(
        reference.philox(seed, base + start, count),
        reference.philox(seed, base, 100)[start : start + count],
    )


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@settings(deadline=None)
@given(seeds=st.lists(SEEDS, max_size=4), offset=st.integers(0, 2**35), n=st.integers(0, 50))
def test_axpy_and_dot_use_the_materialized_direction(
    distribution: str, seeds: list[int], offset: int, n: int
) -> None:
    stream = getattr(reference, distribution)
    v = np.array([stream(seed, offset, n) for seed in seeds], np.float64).reshape(len(seeds), n)
    rng = np.random.default_rng(n)
    theta = rng.standard_normal(n, np.float32)
    coefficients = rng.standard_normal(len(seeds), np.float32)
    names = np.array(seeds, np.uint64)

    dots = reference.seeded_dot(theta, names, offset=offset, distribution=distribution)
    assert dots.dtype == np.float64
    np.testing.assert_allclose(dots, v @ theta.astype(np.float64), rtol=1e-12, atol=1e-12)

    want = theta + coefficients.astype(np.float64) @ v
    reference.seeded_axpy(theta, names, coefficients, offset=offset, distribution=distribution)
    np.testing.assert_allclose(theta, want, rtol=1e-7, atol=1e-13)


def test_axpy_and_dot_default_to_normals_from_element_zero() -> None:
    theta, seeds = np.ones(6, np.float32), np.array([5], np.uint64)
    v = reference.normal(5, 0, 6)
    np.testing.assert_allclose(reference.seeded_dot(theta, seeds), [v.sum()], rtol=1e-6)
    reference.seeded_axpy(theta, seeds, np.array([0.5], np.float32))
    np.testing.assert_allclose(theta, 1 + 0.5 * v, rtol=1e-6)


def test_axpy_and_dot_refuse_what_they_cannot_mean() -> None:
    theta, seeds = np.ones(6, np.float32), np.array([5, 6], np.uint64)
    with pytest.raises(ValueError, match="shorter"):
        reference.seeded_axpy(theta, seeds, np.ones(1, np.float32))
    with pytest.raises(ValueError, match="unknown distribution 'uniform'"):
        reference.seeded_dot(theta, seeds, distribution="uniform")
