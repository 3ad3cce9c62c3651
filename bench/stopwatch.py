"""The time of a pass by operation: kernels that time every call."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import numpy as np

from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.kernels.api import Array, Kernels, Matrix
from fwdllm.kernels.types import LoRA

# The names under which operations are shown; others are shown under their own name.
_OPERATIONS = {
    "rms_norm": "norms",
    "layer_norm": "norms",
    "swiglu": "activation",
    "geglu": "activation",
    "gelu": "activation",
    "seeded_axpy": "update",
    "add_lora": "lora",
}


class Stopwatch:
    """Times every operation. kernels: use it in place of ``ops``.  seconds: by operation.

    spent: seconds of all calls.
    Matmuls are listed by the kind of their tensor, such as attn_q. A matmul with an adapter is also
    run without the adapter; the difference in time is "lora".
    """

    def __init__(self, ops: Kernels) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.spent = 0.0
        self._matmul = ops.matmul
        self._addresses: list[int] = []
        self._kinds: list[str] = []
        timed = ModuleType("timed")
        assert isinstance(ops, ModuleType)
        for name in ops.__all__:
            value = getattr(ops, name)
            if callable(value):
                value = self._timed(_OPERATIONS.get(name, name), value)
            setattr(timed, name, value)
        timed.matmul = self._timed_matmul  # type: ignore[attr-defined]
        self.kernels = cast(Kernels, timed)

    def name_tensors(self, file: GGUFFile) -> None:
        """Note the addresses of the file's matrices, to find the names of matrices in calls."""
        names = [name for name, tensor in file.tensors.items() if len(tensor.shape) == 2]
        places = sorted((_address(file.weight(name).data), name) for name in names)
        self._addresses = [address for address, _ in places]
        self._kinds = [name.removesuffix(".weight").split(".")[-1] for _, name in places]

    def _timed(self, operation: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **options)
            seconds = time.perf_counter() - start
            self.seconds[operation] += seconds
            self.spent += seconds
            return result

        return call

    def _timed_matmul(
        self, x: Array, weight: Matrix, *, lora: LoRA | None = None, **options: Any
    ) -> Array:
        kind = self._kinds[bisect_right(self._addresses, _address(weight.data)) - 1]
        before = self.spent
        y: Array = self._timed(kind, self._matmul)(x, weight, **options)
        if lora is None:
            return y
        without = self.spent - before
        y = self._timed("lora", self._matmul)(x, weight, lora=lora, **options)
        self.seconds["lora"] -= without
        return y


def _address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])
