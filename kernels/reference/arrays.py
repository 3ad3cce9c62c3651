"""Arrays between operations, for kernels whose arrays are NumPy's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from fwdllm.kernels.types import Lanes, Weight


def weight(weight: Weight) -> Weight:
    """A weight where the kernels keep it: here as it is, a view of the mapped file."""
    return weight


def array(x: np.ndarray) -> np.ndarray:
    """An array where the kernels keep it while a pass lasts."""
    return x


def host(x: np.ndarray) -> np.ndarray:
    """An array of the kernels as NumPy's."""
    return x


def free_bytes() -> int | None:
    """None: arrays are the host's."""
    return None


def repeated(
    key: Hashable | None,
    size: int,
    inputs: Sequence[np.ndarray],
    run: Callable[[], list[np.ndarray]],
) -> list[np.ndarray]:
    """What ``run`` returns; kernels of a GPU may record a pass of the same key and replay it."""
    return run()


def contiguous(x: np.ndarray) -> np.ndarray:
    """x in one piece, itself if it is."""
    return np.ascontiguousarray(x)


def take(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """These rows of x."""
    return np.ascontiguousarray(x[rows])


def spread(x: np.ndarray, lanes: Lanes, exact: bool = False) -> np.ndarray:
    """Rows of every lane, of plain rows x: copies of them, zero in tangents.

    exact: for the common signature; without it a GPU keeps tangents in a narrower type.
    """
    if lanes.n_tangents:
        return np.concatenate([x, np.zeros((lanes.n_tangents * len(x), x.shape[1]), np.float32)])
    return np.tile(x, (len(lanes), 1))
