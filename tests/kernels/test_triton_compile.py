"""Every Triton kernel as compiled for GPUs that are not here: an A100 (80) and an H100 (90).

What the interpreter cannot see: that kernels compile, keep to registers, fit the shared memory of
consumer cards and use tensor cores. No GPU is needed; triton_compile.py does the work.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import fwdllm.kernels
from fwdllm.kernels.types import SUPPORTED_TYPES, QuantType

if any(importlib.util.find_spec(name) is None for name in ("torch", "triton")):
    pytest.skip("torch or triton is not installed", allow_module_level=True)

from triton_compile import CAPABILITIES, FEW_TYPES

from fwdllm.kernels.triton.tiles import STEPS

SCRIPT = Path(__file__).with_name("triton_compile.py")
KERNELS = Path(fwdllm.kernels.__file__).parent / "triton"
# The instruction of their tensor cores for whole tiles.
FULL_TILE = {80: "mma.sync", 90: "wgmma.mma_async"}
ATTENTION = {"_attention", "_tangents", "_queries_vjp", "_keys_vjp"}
# Types that are decoded in whole tiles.
IN_TILES = {int(type) for type in STEPS}
# Whose float32 operands are taken by tensor cores, in three products of TF32.
IN_PARTS = {"_up", "_down", *ATTENTION}
# A program's on consumer cards, compute capability 8.6 to 12.
SHARED_BYTES = 99 * 1024
# Of a thread: 48 registers, kept where they are seldom read. On an H200 the two that have most were
# 8 and 13% faster so than in shapes that need fewer.
STACK_BYTES = 192

Variant = dict[str, Any]


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[int, Future]]:
    """Of all capabilities at a time: Triton compiles on one core.

    Kernels that have not changed come from Triton's own cache.
    """

    def run(capability: int) -> list[Variant]:
        env = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        env.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(SCRIPT), str(capability)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor() as pool:
        yield {capability: pool.submit(run, capability) for capability in CAPABILITIES}


@pytest.fixture(params=CAPABILITIES)
def capability(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture
def variants(compilations: dict[int, Future], capability: int) -> list[Variant]:
    """All kernels that the operations launched."""
    return compilations[capability].result()


def launched() -> set[str]:
    """The kernels that the sources launch, as kernel[grid](...)."""
    nodes = [n for path in KERNELS.glob("*.py") for n in ast.walk(ast.parse(path.read_text()))]
    kernels = {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.decorator_list}
    calls = {ast.unparse(n.func.value) for n in nodes
             if isinstance(n, ast.Call) and isinstance(n.func, ast.Subscript)}  # fmt: skip
    return kernels & calls


def operands(variant: Variant) -> str:
    """The type of the activations."""
    types = variant["types"]
    return str(types["y"] if variant["name"] == "_up" else next(iter(types.values())))


def exact(variant: Variant) -> bool:
    """Whether only ``exact`` has it: products and tangents of float32."""
    tangents = variant["constants"].get("TANGENTS") or variant["name"] == "_tangents"
    return operands(variant) == "*fp32" and bool(variant["name"] == "_fused" or tangents)


def types(variants: list[Variant], name: str) -> set[QuantType]:
    """Those of the weights that a kernel was compiled for."""
    return {v["constants"]["TYPE"] for v in variants if v["name"] == name}


def compiled_types(capability: int) -> set[QuantType]:
    return set(SUPPORTED_TYPES if capability == CAPABILITIES[-1] else FEW_TYPES)


def described(variants: list[Variant]) -> str:
    return "\n".join(json.dumps(variant) for variant in variants)


def test_every_kernel_compiles(variants: list[Variant], capability: int) -> None:
    names = {variant["name"] for variant in variants}
    assert names == launched() if capability == CAPABILITIES[-1] else names < launched()
    wanted = compiled_types(capability)
    assert types(variants, "_rows") == wanted
    assert types(variants, "_fused") >= wanted - IN_TILES
    for name in ("_few", "_steps"):
        assert types(variants, name) == IN_TILES


def test_kernels_keep_to_registers(variants: list[Variant]) -> None:
    spilled = [v for v in variants if v["stack"] > STACK_BYTES and not exact(v)]
    assert not spilled, described(spilled)


def test_kernels_fit_consumer_cards(variants: list[Variant]) -> None:
    large = [v for v in variants if v["shared"] > SHARED_BYTES]
    assert not large, described(large)


@pytest.mark.parametrize("name", sorted({"_fused", "_few", "_down", *ATTENTION}))
def test_products_of_bfloat16_are_for_tensor_cores(variants: list[Variant], name: str) -> None:
    products = [v for v in variants if v["name"] == name and operands(v) == "*bf16"]
    assert products
    without = [v for v in products if not v["mma"]]
    assert not without, described(without)


def test_full_tiles_have_the_instructions_of_the_card(
    variants: list[Variant], capability: int
) -> None:
    tiles = [
        v
        for v in variants
        if v["name"] == "_fused" and operands(v) == "*bf16" and v["constants"]["BM"] >= 64
    ]
    assert {v["constants"]["TYPE"] for v in tiles} == compiled_types(capability) - IN_TILES
    other = [v for v in tiles if not all(i.startswith(FULL_TILE[capability]) for i in v["mma"])]
    assert not other, described(other)


def test_exact_products_are_not_rounded(variants: list[Variant]) -> None:
    """No TF32, which tensor cores would make of float32."""
    exact = [v for v in variants if operands(v) == "*fp32" and v["name"] not in IN_PARTS]
    rounded = [v for v in exact if v["mma"] or v["precisions"] not in ([], ["ieee"])]
    assert not rounded, described(rounded)


def test_float32_on_tensor_cores_is_in_three_parts(
    variants: list[Variant], capability: int
) -> None:
    found = [v for v in variants if operands(v) == "*fp32" and v["name"] in IN_PARTS]
    found = [v for v in found if v["precisions"]]  # without an adapter, ``_up`` has no product
    names = IN_PARTS if capability == CAPABILITIES[-1] else {"_up", "_down"}
    assert {v["name"] for v in found} == names
    for v in found:
        assert v["precisions"] == ["tf32x3"], described([v])
        assert v["mma"] and all("tf32" in i for i in v["mma"]), described([v])
        assert v["mma_count"] % 3 == 0, described([v])
