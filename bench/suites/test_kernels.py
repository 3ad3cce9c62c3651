"""Every kernel under pytest-benchmark, which can save and compare results:

    python -m pytest bench/suites --benchmark-only [--benchmark-autosave] [-k matmul]

FWDLLM_ISA chooses the instruction set.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from fwdllm.bench.kernel_cases import DEFAULT_ROWS, DEFAULT_TYPES, Case, cases
from fwdllm.kernels import cpu

CASES = list(cases(DEFAULT_TYPES, DEFAULT_ROWS))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_kernel(benchmark: BenchmarkFixture, case: Case) -> None:
    benchmark.group = case.kernel
    benchmark(case.prepare())
    benchmark.extra_info["isa"] = cpu.isa
    if benchmark.stats:  # None under --benchmark-disable
        benchmark.extra_info[case.unit] = case.work / benchmark.stats.stats.median
