"""Dimensions of tensors, which files may write in more than one way."""

from __future__ import annotations


def padded(shape: tuple[int, ...], n_dims: int) -> tuple[int, ...]:
    """A shape with the first dimensions of 1 that files may leave out: llama.cpp's tools do."""
    return (1,) * (n_dims - len(shape)) + shape
