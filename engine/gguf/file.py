"""A GGUF file, or the files of a split model, as read-only mapped memory: metadata and tensors."""

from __future__ import annotations

import math
import mmap
import os
import stat
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.errors import ModelError, UnsupportedError
from fwdllm.engine.gguf import split
from fwdllm.engine.gguf.dimensions import fitted
from fwdllm.engine.gguf.header import Metadata, TensorInfo, read_header
from fwdllm.kernels.types import SUPPORTED_TYPES, QuantType, Weight

VECTOR_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)
MAX_INTEGER = 2**31 - 1


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """An open GGUF file, or all files of a split model; see ``open``.

    paths: the file, or all of them.  version: 2 or 3.
    metadata: str -> int, float, bool, str, tuple[str, ...] or read-only ndarray.
    tensors: by name, in file order, whatever their type.
    mappings: the whole files, read-only. They stay mapped while this object or an array made
    by ``weight`` lives. A file must not be shortened meanwhile: the system then ends the
    process at the next access.
    """

    paths: tuple[Path, ...]
    version: int
    metadata: Metadata
    tensors: dict[str, TensorInfo]
    mappings: tuple[mmap.mmap, ...]

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> GGUFFile:
        """Map the file and check its header; tensor data is not read.

        path: of a split model the first file; the others are looked for beside it.
        A file that has not changed since it was last opened is not read again.
        Raises ModelError if the file is missing, not a GGUF file of version 2 or 3 in
        little-endian order, truncated, or inconsistent.
        """
        path = Path(path)
        versions = []
        try:
            for name in split.names_beside(path.name):
                found = path.with_name(name).stat()
                versions += [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]
        except (OSError, ValueError):
            pass  # the error that says what is wrong is raised when it is opened
        return _open(path, tuple(versions))

    @property
    def path(self) -> Path:
        """The file, of a split model the first: what llama.cpp opens."""
        return self.paths[0]

    @property
    def nbytes(self) -> int:
        """Bytes of the file, or of all of them."""
        return sum(map(len, self.mappings))

    @property
    def name(self) -> str | None:
        """What the model is called, if the file says so."""
        name = self.metadata.get("general.name")
        return name if isinstance(name, str) and name else None

    def weight(self, name: str) -> Weight:
        """The matrix ``name`` [n_out, n_in] in its block format, a view of the mapping.

        Raises ModelError if it is missing or not a matrix, UnsupportedError for its type.
        """
        tensor = self._tensor(name, 2)
        self.check_type(name)
        n_out, n_in = tensor.shape
        data = self._bytes(tensor).reshape(n_out, -1)
        return Weight(data, QuantType(tensor.type), n_out, n_in)

    def vector(self, name: str) -> np.ndarray:
        """The one-dimensional tensor ``name`` as float32 [n], a copy.

        Raises ModelError if it is missing, not one-dimensional or has a value that is not
        finite, UnsupportedError for a type other than F32, F16 and BF16.
        """
        tensor = self._tensor(name, 1)
        self.check_type(name)
        raw = self._bytes(tensor)
        if tensor.type == QuantType.F32:
            values = raw.view("<f4").astype(np.float32)
        elif tensor.type == QuantType.F16:
            values = raw.view("<f2").astype(np.float32)
        else:
            values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
        if not np.isfinite(values).all():
            raise ModelError(f"{self.path} is damaged: tensor {name!r} has non-finite values")
        return values

    def check_type(self, name: str) -> None:
        """UnsupportedError if there are no kernels for the type of a tensor of the file."""
        tensor = self.tensors[name]
        types = VECTOR_TYPES if len(tensor.shape) == 1 else SUPPORTED_TYPES
        if tensor.type not in types:
            names = ", ".join(type.name for type in types)
            raise UnsupportedError(
                self.path,
                f"tensor {name!r} has the unsupported type {tensor.type.name}; use a file with "
                f"one of {names}",
            )

    def integer(self, key: str, default: int | None = None, maximum: int = MAX_INTEGER) -> int:
        """Metadata ``key``, an integer from 0 to ``maximum``; no default means required.

        This and the other getters raise ModelError, naming the key, if it is missing and
        there is no default, or if it is of the wrong type or out of range.
        """
        value: int = self._value(key, default, (int,), "an integer")
        if not 0 <= value <= maximum:
            raise ModelError(f"{self.path}: metadata {key!r} is {value}, not 0 to {maximum}")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        """Metadata ``key``, an integer of at least 1."""
        value = self.integer(key, default)
        if value == 0:
            raise ModelError(f"{self.path}: metadata {key!r} is 0")
        return value

    def positive_of_layers(self, key: str, default: int | None = None) -> int:
        """Metadata ``key``, an integer of at least 1, or an array of the same for every layer.

        ModelError if layers have different ones.
        """
        values = self.metadata.get(key)
        if not isinstance(values, np.ndarray):
            return self.positive(key, default)
        if not values.size or values.dtype.kind not in "iu" or (values <= 0).any():
            raise ModelError(f"{self.path}: metadata {key!r} is not a positive integer a layer")
        if (values != values[0]).any():
            arch = self.metadata.get("general.architecture")
            raise ModelError(f"{self.path}: {key!r} differs between layers, which {arch} has not")
        return int(values[0])

    def matrix_rows(self, name: str) -> int:
        """The first dimension of the matrix ``name``; ModelError if it is missing or no matrix."""
        return self._tensor(name, 2).shape[0]

    def number(self, key: str, default: float | None = None) -> float:
        """Metadata ``key``, a finite float or an integer."""
        value = float(self._value(key, default, (int, float), "a number"))
        if not math.isfinite(value):
            raise ModelError(f"{self.path}: metadata {key!r} is {value}, not finite")
        return value

    def boolean(self, key: str, default: bool | None = None) -> bool:
        """Metadata ``key``, a bool."""
        value: bool = self._value(key, default, (bool,), "a bool")
        return value

    def string(self, key: str, default: str | None = None) -> str:
        """Metadata ``key``, a string."""
        value: str = self._value(key, default, (str,), "a string")
        return value

    def strings(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """Metadata ``key``, an array of strings."""
        value: tuple[str, ...] = self._value(key, default, (tuple,), "an array of strings")
        return value

    def numbers(self, key: str, default: np.ndarray | None = None) -> np.ndarray:
        """Metadata ``key``, an array of numbers or bools [n] of the stored type."""
        value: np.ndarray = self._value(key, default, (np.ndarray,), "an array of numbers")
        return value

    def _value(self, key: str, default: Any, types: tuple[type, ...], wanted: str) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise ModelError(f"{self.path} has no metadata {key!r}; it is not a complete model")
        is_bool = isinstance(value, bool)  # a bool is an int to Python
        if not isinstance(value, types) or (is_bool and bool not in types):
            found = type(value).__name__
            raise ModelError(f"{self.path}: metadata {key!r} is of type {found}, not {wanted}")
        return value

    def _tensor(self, name: str, n_dims: int) -> TensorInfo:
        tensor = self.tensors.get(name)
        if tensor is None:
            raise ModelError(f"{self.path} has no tensor {name!r}; it is not a complete model")
        tensor = replace(tensor, shape=fitted(tensor.shape, n_dims))
        if len(tensor.shape) != n_dims:
            raise ModelError(
                f"{self.path}: tensor {name!r} has shape {tensor.shape}, "
                f"but {n_dims} dimensions are expected"
            )
        return tensor

    def _bytes(self, tensor: TensorInfo) -> np.ndarray:
        return np.frombuffer(self.mappings[tensor.part], np.uint8, tensor.nbytes, tensor.offset)


@lru_cache(maxsize=2)  # a command opens its model several times, and so does a server
def _open(path: Path, versions_of_files: tuple[int, ...]) -> GGUFFile:
    mappings = [_map(path)]
    version, metadata, tensors = read_header(path, mappings[0])
    paths = split.paths_of(path, metadata)
    for part, other in enumerate(paths[1:], 1):
        mappings.append(_map(other))
        _, of_part, more = read_header(other, mappings[part])
        split.check_belongs(other, part, of_part, path, metadata)
        for name, tensor in more.items():
            if name in tensors:
                first = paths[tensors[name].part]
                raise ModelError(f"{other} and {first} both have the tensor {name!r}")
            tensors[name] = replace(tensor, part=part)
    split.check_whole(paths, metadata, tensors)
    return GGUFFile(paths, version, metadata, tensors, tuple(mappings))


def _map(path: Path) -> mmap.mmap:
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ModelError(f"{path} is a folder; name the GGUF file in it")
        if not stat.S_ISREG(mode):
            raise ModelError(f"{path} is not a regular file, so it cannot be mapped")
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise ModelError(f"{path} is empty; download or copy it again")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, OverflowError) as error:  # a NUL in the path; a 32-bit address space
        raise ModelError(f"cannot read {str(path)!r}: {error}") from error
