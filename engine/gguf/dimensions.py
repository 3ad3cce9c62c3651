"""Dimensions of tensors, which files may write in more than one way."""

from __future__ import annotations


def fitted(shape: tuple[int, ...], n_dims: int) -> tuple[int, ...]:
    """A shape with n_dims dimensions, if only first ones of 1 are too few or too many for that.

    Files may have them or not: llama.cpp's tools leave them out, and it reads both.
    """
    while len(shape) > n_dims and shape[0] == 1:
        shape = shape[1:]
    return (1,) * (n_dims - len(shape)) + shape
