"""Where in a graph of llama.cpp the inputs of products are to be made relative.

A product with a quantized weight rounds every row of its input by itself, and a perturbation is
often smaller than that rounding. So rows of a perturbed lane go into it as scaled differences to
those of a reference lane (``kernels.cpu.to_relative``), and come out of it as what they would have
been without rounding the two apart. That has to be done when the input is there and before the
product begins: after the operation just before it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """One of a graph. address, sources, view_of: of tensors.

    weight: for a product of rows with a matrix in a type that makes it round them.
    """

    address: int
    sources: tuple[int, ...]
    view_of: int | None
    weight: str | None


@dataclass(frozen=True)
class Relative:
    """A product that rounds. source: number of the operation that makes its input.

    opens: the input is to be made relative before it.  closes: and no product after it needs that.
    restores: but something else needs the input.
    """

    weight: str
    source: int
    opens: bool
    closes: bool
    restores: bool


def relative_products(graph: Sequence[Operation]) -> dict[int, Relative]:
    """By the number of the operation, what to do for every product that rounds."""
    number = {operation.address: i for i, operation in enumerate(graph)}
    readers: defaultdict[int, list[int]] = defaultdict(list)
    for i, operation in enumerate(graph):
        for source in dict.fromkeys(operation.sources):
            readers[source].append(i)
    found = {}
    for i, operation in enumerate(graph):
        if operation.weight is None or i == 0 or operation.sources[1] not in number:
            continue
        source = operation.sources[1]
        made = graph[number[source]]
        mine = readers[source]
        # Whether only such products read this memory.
        private = made.view_of is None and all(graph[j].weight is not None for j in mine)
        first, last = mine[0] == i or not private, mine[-1] == i or not private
        found[i] = Relative(operation.weight, number[source], first, last, not private)
    return found
