"""Exact samples of the discrete Gaussian (Canonne, Kamath, Steinke, arXiv 2004.00010).

A float's noise is no sample of a Gaussian, and its low bits tell of what it was added to (Mironov,
CCS 2012). Integers with exact noise have no such bits, and keep the Gaussian's guarantee.
"""

from __future__ import annotations

import math
from collections.abc import Callable


def discrete_gaussian(variance: int, below: Callable[[int], int]) -> int:
    """An integer x with a probability proportional to exp(-x^2 / (2 variance)); Algorithm 3.

    variance: at least 1.  below: gives an integer at random from 0 up to its argument, without it.
    """
    t = math.isqrt(variance) + 1
    while True:
        x = _laplace(t, below)
        # exp(-(|x| - variance / t)^2 / (2 variance)), as a quotient of integers.
        if _bernoulli_exp((abs(x) * t - variance) ** 2, 2 * variance * t * t, below):
            return x


def _laplace(t: int, below: Callable[[int], int]) -> int:
    """An integer x with a probability proportional to exp(-|x| / t); Algorithm 2."""
    while True:
        rest = below(t)
        if not _bernoulli_exp(rest, t, below):
            continue
        whole = 0
        while _bernoulli_exp(1, 1, below):
            whole += 1
        x = rest + t * whole
        is_negative = below(2) == 1
        if not (is_negative and x == 0):  # else zero would come twice as often
            return -x if is_negative else x


def _bernoulli_exp(numerator: int, denominator: int, below: Callable[[int], int]) -> bool:
    """True with probability exp(-numerator / denominator); Algorithm 1."""
    while numerator > denominator:
        if not _bernoulli_exp(1, 1, below):
            return False
        numerator -= denominator
    k = 1
    while below(denominator * k) < numerator:
        k += 1
    return k % 2 == 1
