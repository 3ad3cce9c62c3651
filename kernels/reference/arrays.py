"""Moving arrays and selecting rows, for kernels whose arrays are NumPy's."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np

from fwdllm.kernels.types import Lanes, Weight


def weight(weight: Weight) -> Weight:
    """A weight as the kernels keep it: here as it is, a view of the mapped file."""
    return weight


def array(x: np.ndarray) -> np.ndarray:
    """An array in the kernels' memory, for use during a pass: here as it is."""
    return x


def host(x: np.ndarray) -> np.ndarray:
    """An array of the kernels as a NumPy array: here as it is."""
    return x


def zeros(*shape: int) -> np.ndarray:
    """Zeros, float32 [*shape]."""
    return np.zeros(shape, np.float32)


def free_bytes() -> int | None:
    """None: arrays are in host memory."""
    return None


def repeated(
    key: Hashable | None,
    size: int,
    inputs: Sequence[np.ndarray],
    run: Callable[[], list[np.ndarray]],
) -> list[np.ndarray]:
    """What ``run`` returns; GPU kernels may instead replay a recorded pass with the same key."""
    return run()


def contiguous(x: np.ndarray) -> np.ndarray:
    """x as a contiguous array; x itself if it is one."""
    return np.ascontiguousarray(x)


def take(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows of x with these numbers."""
    return np.ascontiguousarray(x[rows])


def spread(x: np.ndarray, lanes: Lanes, exact: bool = False) -> np.ndarray:
    """The rows of all lanes, from the plain rows x: copies of x, or zeros for tangents.

    exact: for the common signature; without it a GPU keeps tangents in a narrower type.
    """
    if lanes.n_tangents:
        return np.concatenate([x, np.zeros((lanes.n_tangents * len(x), x.shape[1]), np.float32)])
    return np.tile(x, (len(lanes), 1))
