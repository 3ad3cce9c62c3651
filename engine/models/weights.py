"""A model file's tensors for the graphs, by GGUF name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fwdllm.engine.errors import ModelError
from fwdllm.engine.gguf.dimensions import fitted
from fwdllm.kernels.api import Kernels, Matrix

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile

Shapes = Mapping[str, tuple[int, ...]]


class Weights:
    """Tensors of one file. Matrices are views of the mapping; vectors are small and copied.

    required, optional: tensor name -> shape in NumPy order.  ops: the kernels, which may keep
    matrices elsewhere. ModelError if a required tensor is missing, or any has another shape.
    """

    def __init__(self, file: GGUFFile, required: Shapes, optional: Shapes, ops: Kernels) -> None:
        wanted = {**required, **optional}
        for name, shape in wanted.items():
            if name not in file.tensors:
                if name in required:
                    raise ModelError(f"{file.path} has no tensor {name!r}; it is not complete")
                continue
            found = file.tensors[name].shape
            if fitted(found, len(shape)) != shape:
                raise ModelError(f"{file.path}: tensor {name!r} has shape {found}, not {shape}")
        names = [name for name in wanted if name in file.tensors]
        self._matrices = {n: ops.weight(file.weight(n)) for n in names if len(wanted[n]) == 2}
        self._vectors = {n: file.vector(n) for n in names if len(wanted[n]) == 1}

    def matrix(self, name: str) -> Matrix:
        """The matrix ``name``.weight as the kernels keep it."""
        return self._matrices[f"{name}.weight"]

    def has(self, name: str) -> bool:
        """Whether the matrix ``name``.weight exists."""
        return f"{name}.weight" in self._matrices

    def vector(self, name: str) -> np.ndarray:
        """The vector ``name`` (with its ".weight" or ".bias"), float32."""
        return self._vectors[name]

    def vector_or_none(self, name: str) -> np.ndarray | None:
        """The vector ``name``, or None if the file has none."""
        return self._vectors.get(name)
