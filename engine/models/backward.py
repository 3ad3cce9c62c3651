"""The way back through a layer: from the gradient of a loss by what it gives to that by what it
reads, and by the adapter's factors.

Graphs are written once, in the operations of a ``Pass``. In a ``Backward`` one they are given
``Node``s in place of arrays, and what they compute is written down instead: each operation's value
is computed when something on the way back first asks for it, so that what nothing needs, the last
product of a layer above all, is not computed again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any, TypeAlias

from fwdllm.engine.models.forward import Pass
from fwdllm.engine.models.rotary import Rotary
from fwdllm.kernels.api import Array, BackwardKernels

_Vjp: TypeAlias = Callable[[Array], None]


def _released() -> Array:
    raise AssertionError("a node's value was asked for after the way back")


class Node:
    """A value between the operations of a layer, float32 [rows, width].

    wanted: whether its cotangent, the gradient of the loss by it, is of use to anyone.  reads: what
    ``vjp`` reads the values of.  cheap: whether to compute it again from ``reads`` costs little.
    """

    def __init__(
        self,
        tape: list[Node],
        shape: Sequence[int],
        compute: Callable[[], Array],
        vjp: _Vjp | None,
        wanted: bool,
        reads: Sequence[Node] = (),
        cheap: bool = False,
    ) -> None:
        self.shape = tuple(shape)
        self.wanted = wanted
        self.reads = reads
        self.cheap = cheap
        self.cotangent: Array | None = None
        self._tape = tape
        self._compute = compute
        self._vjp = vjp
        self._value: Array | None = None
        tape.append(self)

    @property
    def value(self) -> Array:
        """The array itself."""
        if self._value is None:
            self._value = self._compute()
        return self._value

    def take(self) -> Array:
        """The array, for the one that reads it alone: see ``forget``."""
        value = self.value
        self.forget()
        return value

    def forget(self) -> None:
        """Keep the array no longer; it is computed again if asked for once more."""
        self._value = None

    def add(self, cotangent: Array) -> None:
        """One more share of the cotangent. Never in place: an array may be the share of several."""
        self.cotangent = cotangent if self.cotangent is None else self.cotangent + cotangent

    def pull_back(self) -> None:
        """Hand the cotangent on to what this was computed from, and forget both its arrays."""
        if self._vjp is None:
            return
        if self.cotangent is not None and self.wanted:
            self._vjp(self.cotangent)
        self._value = self.cotangent = None

    def release(self) -> None:
        """Forget all but the cotangent."""
        self._compute, self._vjp, self._value, self.reads = _released, None, None, ()

    def __len__(self) -> int:
        return int(self.shape[0])

    def __add__(self, other: Node) -> Node:
        def vjp(cotangent: Array) -> None:
            self.add(cotangent)
            other.add(cotangent)

        def compute() -> Array:
            return self.value + other.take()

        return Node(self._tape, self.shape, compute, vjp, self.wanted or other.wanted)

    def __mul__(self, factor: float) -> Node:
        return Node(
            self._tape,
            self.shape,
            lambda: self.take() * factor,
            lambda cotangent: self.add(cotangent * factor),
            self.wanted,
        )

    def reshape(self, *shape: Any) -> Node:
        """The same elements in another shape, as of arrays."""
        wanted = shape[0] if isinstance(shape[0], tuple) else shape
        known = math.prod(n for n in wanted if n >= 0)
        new = tuple(n if n >= 0 else math.prod(self.shape) // known for n in wanted)
        return Node(
            self._tape,
            new,
            lambda: self.value.reshape(new),
            lambda cotangent: self.add(cotangent.reshape(self.shape)),
            self.wanted,
        )


class Recorded:
    """Operations from a leaf to an output, written down on ``tape``."""

    def __init__(self, tape: list[Node], leaf: Node, output: Node) -> None:
        self._tape, self._leaf, self._output = tape, leaf, output

    def value(self) -> Array:
        """The output. What the way back reads and is not cheap to compute again is kept."""
        value = self._output.value
        read = {node for reader in self._tape if reader.wanted for node in reader.reads}
        for node in self._tape:
            if node.cheap or node not in read:
                node.forget()
        return value

    def pull_back(self, cotangent: Array) -> Array | None:
        """Bring the output's cotangent back: that of the leaf, if it is wanted. Can be done once.

        Afterwards nothing is kept. Nodes and their functions know each other: without being
        released their arrays would stay until Python looks for such circles.
        """
        self._output.add(cotangent)
        for node in reversed(self._tape):
            node.pull_back()
        for node in self._tape:
            node.release()
        self._tape.clear()
        return self._leaf.cotangent


class Backward(Pass):
    """A pass on nodes, of one plain lane. A new one is made from what makes a ``Pass``.

    gradient: float32, of the shape of the adapter's theta and an array of the kernels; its factors'
    gradients are added there.
    """

    gradient: Array
    _vjps: BackwardKernels
    _tape: list[Node]

    @classmethod
    def of(cls, p: Pass, ops: BackwardKernels, gradient: Array) -> Backward:
        """The way back of a pass that went forward. ops: the kernels of that pass."""
        back = cls(ops, p.weights, p.batch, p.adapter, exact=p.exact, block_rows=p.block_rows)
        back.theta, back.gradient, back._vjps, back._tape = p.theta, gradient, ops, []
        return back

    def record(self, f: Callable[[Any], Any], x: Array, wanted: bool = True) -> Recorded:
        """The operations that f applies to x, none of which is computed yet.

        wanted: whether the cotangent of x is.
        """
        outer, self._tape = self._tape, []
        leaf = Node(self._tape, x.shape, lambda: x, None, wanted)
        found = Recorded(self._tape, leaf, f(leaf))
        self._tape = outer
        return found

    def linear(self, x: Node, name: str) -> Node:  # type: ignore[override]
        """See ``Pass.linear``. The cotangents of the adapter's factors go to ``gradient``."""
        matrix = self.weights.matrix(name)
        target = self.adapter.target(name) if self.adapter else None
        lora, shares = None, None
        if target is not None and self.adapter is not None:
            lora = self.adapter.factors(target, self.theta)
            shares = self.adapter.factors(target, self.gradient)

        def compute() -> Array:
            bias = self.weights.vector_or_none(f"{name}.bias")
            return self.ops.matmul(x.value, matrix, bias=bias, lora=lora, exact=self.exact)

        def vjp(dy: Array) -> None:
            if lora is not None and shares is not None:
                self._vjps.lora_vjp(x.value, dy, lora, shares.a, shares.b)
            if x.wanted:
                x.add(self._vjps.matmul_vjp(dy, matrix, lora=lora, exact=self.exact))

        adapted = lora is not None
        reads = (x,) if adapted else ()
        return Node(self._tape, (len(x), matrix.n_out), compute, vjp, x.wanted or adapted, reads)

    def split(self, x: Node, *widths: int) -> list[Node]:  # type: ignore[override]
        """See ``Pass.split``. Back, the parts fill the cotangent of a node that only they read."""
        whole = x.reshape(x.shape)

        def part(width: int, end: int) -> Node:
            columns = slice(end - width, end)

            def vjp(dy: Array) -> None:
                if whole.cotangent is None:
                    whole.cotangent = self._vjps.zeros(*whole.shape)
                whole.cotangent[:, columns] = dy

            def compute() -> Array:
                return self.ops.contiguous(whole.value[:, columns])

            return Node(self._tape, (len(x), width), compute, vjp, x.wanted)

        return [part(*sizes) for sizes in zip(widths, accumulate(widths), strict=True)]

    def rms_norm(self, x: Node, name: str, eps: float) -> Node:  # type: ignore[override]
        """See ``Pass.rms_norm``."""
        weight = self.weights.vector(f"{name}.weight")
        return self._unary(
            x,
            lambda x: self.ops.rms_norm(x, weight, eps),
            lambda x, dy: self._vjps.rms_norm_vjp(x, weight, eps, dy),
        )

    def layer_norm(self, x: Node, name: str, eps: float) -> Node:  # type: ignore[override]
        """See ``Pass.layer_norm``."""
        weight, bias = self._gain_and_bias(name)
        return self._unary(
            x,
            lambda x: self.ops.layer_norm(x, weight, bias, eps),
            lambda x, dy: self._vjps.layer_norm_vjp(x, weight, eps, dy),
        )

    def rope(  # type: ignore[override]
        self, x: Node, rotary: Rotary, head_dim: int, interleaved: bool
    ) -> Node:
        """See ``Pass.rope``; back is the other way round."""
        n_positions = int(self.positions.max()) + 1

        def turned(x: Array, back: bool) -> Array:
            cos, sin = rotary.tables(n_positions, back)
            return self.ops.rope(x, self.positions, cos, sin, head_dim, interleaved)

        return Node(
            self._tape,
            x.shape,
            lambda: turned(x.take(), back=False),
            lambda dy: x.add(turned(dy, back=True)),
            x.wanted,
        )

    def gelu(self, x: Node) -> Node:  # type: ignore[override]
        """See ``Pass.gelu``."""
        return self._unary(x, self.ops.gelu, self._vjps.gelu_vjp)

    def swiglu(self, gate: Node, up: Node) -> Node:  # type: ignore[override]
        """See ``Pass.swiglu``."""
        return self._gated(gate, up, self.ops.swiglu, self._vjps.swiglu_vjp)

    def geglu(self, gate: Node, up: Node) -> Node:  # type: ignore[override]
        """See ``Pass.geglu``."""
        return self._gated(gate, up, self.ops.geglu, self._vjps.geglu_vjp)

    def _gated(
        self,
        gate: Node,
        up: Node,
        f: Callable[[Array, Array], Array],
        vjp_of: Callable[[Array, Array, Array], tuple[Array, Array]],
    ) -> Node:
        def vjp(dy: Array) -> None:
            for x, cotangent in zip((gate, up), vjp_of(gate.value, up.value, dy), strict=True):
                x.add(cotangent)

        def compute() -> Array:
            return f(gate.value, up.value)

        wanted = gate.wanted or up.wanted
        return Node(self._tape, gate.shape, compute, vjp, wanted, (gate, up), cheap=True)

    def attention(  # type: ignore[override]
        self,
        q: Node,
        k: Node,
        v: Node,
        head_dim: int,
        causal: bool,
        scale: float | None = None,
        window: int = 0,
        softcap: float = 0.0,
    ) -> Node:
        """See ``Pass.attention``."""
        options: dict[str, Any] = {
            "head_dim": head_dim,
            "scale": head_dim**-0.5 if scale is None else scale,
            "causal": causal,
            "window": window,
            "softcap": softcap,
        }

        def compute() -> Array:
            return self.ops.attention(q.value, k.value, v.value, self.starts, **options)

        def vjp(dy: Array) -> None:
            found = self._vjps.attention_vjp(q.value, k.value, v.value, self.starts, dy, **options)
            for x, cotangent in zip((q, k, v), found, strict=True):
                x.add(cotangent)

        reads = (q, k, v)
        return Node(self._tape, q.shape, compute, vjp, any(x.wanted for x in reads), reads)

    def in_blocks(  # type: ignore[override]
        self, x: Node, f: Callable[[Node], Node]
    ) -> Node:
        """See ``Pass.in_blocks``. On the way back each block that was not computed on the way
        forward is, and goes all the way back before the next one.
        """
        blocks = [slice(i, i + self.block_rows) for i in range(0, len(x), self.block_rows)]
        computed: list[Recorded] = []

        def compute() -> Array:
            computed[:] = [self.record(f, x.value[rows], x.wanted) for rows in blocks]
            if len(computed) == 1:
                return computed[0].value()
            y = self._vjps.zeros(*x.shape)
            for rows, block in zip(blocks, computed, strict=True):
                y[rows] = block.value()
            return y

        def vjp(dy: Array) -> None:
            dx = self._vjps.zeros(*dy.shape) if x.wanted else None
            for rows in blocks:
                block = computed.pop(0) if computed else self.record(f, x.value[rows], x.wanted)
                of_input = block.pull_back(dy[rows])
                if dx is not None:
                    dx[rows] = of_input
            if dx is not None:
                x.add(dx)

        return Node(self._tape, x.shape, compute, vjp, True, (x,))

    def _unary(
        self, x: Node, f: Callable[[Array], Array], vjp: Callable[[Array, Array], Array]
    ) -> Node:
        return Node(
            self._tape,
            x.shape,
            lambda: f(x.value),
            lambda dy: x.add(vjp(x.value, dy)),
            x.wanted,
            (x,),
            cheap=True,
        )
