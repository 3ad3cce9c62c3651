"""Checkpoint files: step-N.npz holds theta, the arrays of the run's state and the step.

Files are written atomically. The npz container has a CRC-32 of every array, so a file that is
damaged later is recognised when it is read.
"""

from __future__ import annotations

import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.files import atomic_write

# Two checkpoints: if the disk damages one, the other is left to resume from.
KEEP = 2

_NAME = re.compile(r"step-(\d+)\.npz")
_STATE = "optimizer."  # that was all there was of it at first


class _Damaged(Exception):
    """A checkpoint file whose bytes are not those that were written."""


@dataclass(frozen=True)
class Checkpoint:
    """theta: float32 [n].  state: ``TrainState.to_arrays`` of the same step."""

    step: int
    theta: np.ndarray
    state: dict[str, np.ndarray]


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint durably, then delete all but the newest ``KEEP``."""
    path = folder / f"step-{checkpoint.step}.npz"
    arrays: dict[str, Any] = {"step": np.int64(checkpoint.step), "theta": checkpoint.theta}
    arrays |= {_STATE + name: array for name, array in checkpoint.state.items()}
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)
    for old in _by_step(folder)[:-KEEP]:
        old.unlink()
    return path


def newest_intact(folder: Path) -> tuple[Checkpoint | None, list[Path]]:
    """The intact checkpoint of the highest step, if any, and the damaged ones after it.

    An OSError, such as for missing permission, is raised: the file is not damaged.
    """
    damaged: list[Path] = []
    for path in reversed(_by_step(folder)):
        try:
            return _parse(path.read_bytes(), _step_of(path)), damaged
        except _Damaged:
            damaged.append(path)
    return None, damaged


def set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint so that it no longer counts as one; returns the new path."""
    return path.replace(path.with_name(path.name + ".damaged"))


def _parse(data: bytes, step: int) -> Checkpoint:
    try:
        arrays = _read_npz(data)
        state = {
            name.removeprefix(_STATE): array
            for name, array in arrays.items()
            if name.startswith(_STATE)
        }
        checkpoint = Checkpoint(int(arrays["step"]), arrays["theta"], state)
    except MemoryError:
        raise
    except Exception as error:  # the zip and npy readers fail in a dozen ways on damaged bytes
        raise _Damaged(str(error)) from error
    if checkpoint.step != step:
        raise _Damaged(f"step {checkpoint.step} in the file of step {step}")
    return checkpoint


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        # Before NumPy reads: a damaged shape would make it allocate any amount of memory.
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"{broken} has a wrong CRC-32")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _by_step(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if _NAME.fullmatch(p.name)), key=_step_of)


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])
