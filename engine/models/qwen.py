"""Qwen2 (arXiv 2407.10671) and Qwen3 (arXiv 2505.09388): the Llama graph with three changes.

Both rotate halves of a head instead of neighbouring pairs. Qwen2 adds biases to the query, key
and value projections (the graph adds any bias the file has); Qwen3 has none, and normalizes
every query and key head instead.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from fwdllm.engine.models import llama

if TYPE_CHECKING:
    from fwdllm.engine.gguf.file import GGUFFile


def read_qwen2(file: GGUFFile) -> llama.Args:
    """Args of a Qwen2 file; errors as ``llama.read_args``."""
    return llama.read_args(file, "qwen2", interleaved=False)


def read_qwen3(file: GGUFFile) -> llama.Args:
    """Args of a Qwen3 file; errors as ``llama.read_args``."""
    return llama.read_args(file, "qwen3", interleaved=False, qk_norm=True)
