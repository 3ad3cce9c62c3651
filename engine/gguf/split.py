"""Models in several files, as llama.cpp's llama-gguf-split writes them.

The first file has the metadata; each has some of the tensors, and what it is of what in "split.*".
llama.cpp finds the others by their names, beside the first; so do we. Files come from anywhere:
one that is missing, or does not belong to the others, is a ModelError that names it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.errors import ModelError
from fwdllm.engine.gguf.header import TensorInfo

KEY_NUMBER, KEY_COUNT, KEY_TENSORS = "split.no", "split.count", "split.tensors.count"

_NAME = re.compile(r"(.*)-([0-9]{5})-of-([0-9]{5})\.gguf", re.DOTALL)
# Of a file, not of the model. Writers give the architecture to each file, or to the first alone.
_OF_A_FILE = (KEY_NUMBER, "general.alignment")


def names_beside(name: str) -> tuple[str, ...]:
    """Names of all files of the model, in order, if ``name`` is one of a split model's; else it."""
    match = _NAME.fullmatch(name)
    if match is None or not int(match[3]):
        return (name,)
    count = int(match[3])
    return tuple(_name(match[1], number, count) for number in range(count))


def paths_of(path: Path, metadata: Mapping[str, Any]) -> tuple[Path, ...]:
    """The files of the model whose first is ``path``, which has this metadata.

    ModelError if it is not the first, if its name is not as llama.cpp expects it, or if another
    file is missing.
    """
    count, number = _whole(path, metadata, KEY_COUNT), _whole(path, metadata, KEY_NUMBER)
    if count < 2:
        return (path,)
    is_file = f"{path} is file {number + 1} of the {count} of a split model"
    match = _NAME.fullmatch(path.name)
    if match is None or path.name != _name(match[1], number, count):
        end = _name("", number, count)
        raise ModelError(f"{is_file}, so its name must end in {end} for the others to be found")
    if number:
        raise ModelError(f"{is_file}: name the first, {path.with_name(_name(match[1], 0, count))}")
    paths = tuple(path.with_name(_name(match[1], i, count)) for i in range(count))
    for other in paths:
        if not other.exists():
            raise ModelError(f"{is_file}, but {other.name} is not beside it: put it there")
    return paths


def check_belongs(
    path: Path,
    number: int,
    metadata: Mapping[str, Any],
    first_path: Path,
    first: Mapping[str, Any],
) -> None:
    """ModelError if the file ``path`` is not file ``number`` (from 0) of the model in ``first``."""
    count = _whole(first_path, first, KEY_COUNT)
    found = _whole(path, metadata, KEY_NUMBER), _whole(path, metadata, KEY_COUNT)
    if found != (number, count):
        raise ModelError(
            f"{path} is not file {number + 1} of the {count} of {first_path}: its metadata calls "
            f"it file {found[0] + 1} of {found[1]}"
        )
    for key in metadata:
        if key not in _OF_A_FILE and key in first and not _same(metadata[key], first[key]):
            raise ModelError(f"{path} is of another model than {first_path}: its {key} differs")


def check_whole(
    paths: tuple[Path, ...], metadata: Mapping[str, Any], tensors: Mapping[str, TensorInfo]
) -> None:
    """ModelError if the files have another number of tensors than the model is said to have."""
    wanted = _whole(paths[0], metadata, KEY_TENSORS) if KEY_TENSORS in metadata else len(tensors)
    if len(tensors) != wanted:
        raise ModelError(
            f"{paths[0]} and the {len(paths) - 1} files that belong to it have {len(tensors)} "
            f"tensors together, but the model has {wanted}: one of them is of another model"
        )


def _name(prefix: str, number: int, count: int) -> str:
    return f"{prefix}-{number + 1:05}-of-{count:05}.gguf"


def _whole(path: Path, metadata: Mapping[str, Any], key: str) -> int:
    value = metadata.get(key, 0)
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise ModelError(f"{path} is damaged: its metadata {key!r} is not a count")
    return value


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return type(a) is type(b) and np.array_equal(a, b)
    return bool(a == b)
