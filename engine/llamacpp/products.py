"""Where in a llama.cpp graph the inputs of products must be made relative.

A product here is a matmul with a quantized weight. It rounds every row of its input separately, and
a perturbation is often smaller than that rounding. So before the product, the rows of a perturbed
lane are replaced by scaled differences to those of a reference lane (``kernels.cpu.to_relative``).
After it, the output rows are converted back (``from_relative``): what the lanes have in common is
then rounded only once. The replacement is made after the operation just before the product, when
the input is computed and the product has not begun.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """An operation of a graph.

    address: of its result.  sources: addresses of its inputs.  view_of: address of the tensor that
    the result is a view of, or None.  weight: name of the weight if the operation is a product that
    rounds its input, else None.
    """

    address: int
    sources: tuple[int, ...]
    view_of: int | None
    weight: str | None


@dataclass(frozen=True)
class Relative:
    """A product that rounds. source: number of the operation that computes its input.

    opens: make the input relative before this product; otherwise it is so already.  closes: no
    later product uses the relative input.  restores: put the original input back after this
    product, because operations that are not such products read it.
    """

    weight: str
    source: int
    opens: bool
    closes: bool
    restores: bool


def relative_products(graph: Sequence[Operation]) -> dict[int, Relative]:
    """What to do at every product that rounds, by the number of its operation."""
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
