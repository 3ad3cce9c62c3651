"""Which pages of a mapped model file stay in memory: those of the first layers, as many as fit.

Each other layer is read ahead and dropped after use. A pass reads the file once, in order, so
keeping the most recent layers instead would keep those that are needed last.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from fwdllm.engine.errors import ConfigError

if TYPE_CHECKING:  # a benchmark of GPUs runs without the package gguf
    from fwdllm.engine.gguf.file import GGUFFile
    from fwdllm.engine.gguf.header import TensorInfo

_LAYER = re.compile(r"blk\.(\d+)\.")


class Residency:
    """Keeps and drops pages of the weights of ``file``; at first without a limit.

    Tensors outside of layers (embedding, output) count as layer ``n_layers``. largest: bytes of
    the largest layer, the smallest useful ``limit``.  total: bytes of all layers.
    """

    def __init__(self, file: GGUFFile, n_layers: int) -> None:
        self._mappings = file.mappings
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
        """Keep at most ``limit`` bytes from now on; None lets the system decide.

        ConfigError if this system cannot drop pages.
        """
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
        """``layer`` is next: while it is used, read ahead the one after it, or before it."""
        ahead = layer - 1 if back else layer + 1
        if self._dropped and 0 <= ahead < len(self._layers):
            self._advise(ahead, mmap.MADV_WILLNEED)

    def leave(self, layer: int) -> None:
        """Call after ``layer`` is computed: drops its pages if it is not one of those kept."""
        if layer in self._dropped:
            self._advise(layer, mmap.MADV_DONTNEED)

    def _advise(self, layer: int, advice: int) -> None:
        for mapping, start, end in self._ranges(layer):
            mapping.madvise(advice, start, end - start)

    def _ranges(self, layer: int) -> Iterator[tuple[mmap.mmap, int, int]]:
        """Pages that hold the layer's tensors; a page at the end may be shared with the next."""
        for tensor in self._layers[layer]:
            mapping = self._mappings[tensor.part]
            start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            yield mapping, start, min(tensor.offset + tensor.nbytes, len(mapping))
