"""Which pages of a mapped model file stay in memory: those of the layers that fit, and of the
layer in work. The others are read ahead and dropped behind it; the file is read in order, once a
pass, so keeping recent layers instead would keep those that are needed last.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fwdllm.engine.errors import ConfigError

if TYPE_CHECKING:  # a benchmark of GPUs runs without the package gguf
    from fwdllm.engine.gguf.file import GGUFFile
    from fwdllm.engine.gguf.header import TensorInfo

# Measured after ``Engine.load``: pages of Python, NumPy and llama.cpp, without and with their data.
_LIBRARY_BYTES, _PROCESS_BYTES = 60 * 2**20, 150 * 2**20
_LAYER = re.compile(r"blk\.(\d+)\.")


def resident_bytes() -> int:
    """What this process has resident besides pages of files, plus what its libraries map.

    Where the system does not tell: a Python process with NumPy and llama.cpp loaded.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return _PROCESS_BYTES
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 + _LIBRARY_BYTES


class Residency:
    """Pages of the weights of ``file``; ``limit`` bounds them, None lets the system decide.

    Tensors outside of layers (embedding, output) count as layer ``n_layers``. largest: bytes of
    the largest layer, the least ``limit``.  total: bytes of all.
    """

    def __init__(self, file: GGUFFile, n_layers: int) -> None:
        self._mapping = file.mapping
        self._layers: list[list[TensorInfo]] = [[] for _ in range(n_layers + 1)]
        for name, tensor in file.tensors.items():
            match = _LAYER.match(name)
            layer = int(match[1]) if match else n_layers
            self._layers[min(layer, n_layers)].append(tensor)
        sizes = [sum(t.nbytes for t in layer) for layer in self._layers]
        self.largest, self.total = max(sizes), sum(sizes)
        self._sizes = sizes
        self._dropped = range(0)

    def limit(self, limit: int | None) -> None:
        """Keep at most ``limit`` bytes from now on; ConfigError if this system has no way to."""
        n = len(self._sizes)
        if limit is None or limit >= self.total:
            self._dropped = range(0)
            return
        if not hasattr(mmap, "MADV_DONTNEED"):
            raise ConfigError(
                "this system cannot drop pages of a file: leave out the memory budget"
            )
        kept, first = 0, 0
        while first < n and kept + self._sizes[first] + self.largest <= limit:
            kept += self._sizes[first]
            first += 1
        self._dropped = range(first, n)

    def enter(self, layer: int, back: bool = False) -> None:
        """``layer`` is next: read ahead the one after it, or back before it, while it is in work."""
        ahead = layer - 1 if back else layer + 1
        if self._dropped and 0 <= ahead < len(self._layers):
            self._advise(ahead, mmap.MADV_WILLNEED)

    def leave(self, layer: int) -> None:
        """``layer`` is done: drop its pages, if they do not fit."""
        if layer in self._dropped:
            self._advise(layer, mmap.MADV_DONTNEED)

    def _advise(self, layer: int, advice: int) -> None:
        for start, end in self._ranges(layer):
            self._mapping.madvise(advice, start, end - start)

    def _ranges(self, layer: int) -> Iterator[tuple[int, int]]:
        """Whole pages that hold the layer's tensors; neighbours share those at the ends."""
        for tensor in self._layers[layer]:
            start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            yield start, min(tensor.offset + tensor.nbytes, len(self._mapping))
