"""The exact gradient by an adapter of the last layer's ffn_down, with no way back through layers.

From what this product adds to the residual stream, llama.cpp's graph goes to the logits by a few
operations, each row for itself: norms, the output matrix, scales. They are found by following what
depends on the product while a call is computed, whatever the architecture, and all that has another
form is refused. The gradient of the loss by the logits is then brought back through them, to meet
the product's input.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fwdllm.engine.adapters.adapter import Adapter, Target
from fwdllm.engine.errors import ConfigError, UnsupportedError
from fwdllm.engine.gguf.file import VECTOR_TYPES, GGUFFile
from fwdllm.engine.llamacpp.context import Call
from fwdllm.engine.llamacpp.ggml import (
    Layout,
    Tensor,
    as_array,
    as_rows,
    is_rows,
    numbers,
    source_of,
    weight_name,
)
from fwdllm.engine.llamacpp.losses import negative_log_likelihood
from fwdllm.kernels.api import BackwardKernels, Matrix

# The name of the logits (src/models/*.cpp).
_LOGITS = b"result_output"
_NORMS = ("NORM", "RMS_NORM")
# Operations that give the rows that they read: of GET_ROWS see ``Follower.computed``.
_SAME_ROWS = ("CONT", "CPY", "DUP", "GET_ROWS", "RESHAPE", "VIEW")

# The check against differences of losses: the change of the mean loss that a step aims at, in nats,
# far above its rounding; the longest step, relative to theta; how often the step is made four times
# shorter; the least change, below which differences say nothing.
_CHANGE, _LONGEST, _TRIES, _LEAST = 0.01, 0.1, 4, 1e-4
# How far a slope may be from the gradient's length, relative to it. An error of the gradient of
# relative size r makes it differ by r^2 at least where it is across, by r where it is along.
# Rounding does so by up to 0.01 where weights are quantized.
_BOUND = 0.05


@dataclass(frozen=True)
class Step:
    """An operation on the way from the product to the logits.

    name: of the operation.  source: address of its input on the way.  numbers: its parameters.
    weight: name of the tensor that it multiplies by, if it does.  x: input of a norm, float32
    [n, width].
    """

    name: str
    source: int
    numbers: tuple[float, ...] = ()
    weight: str | None = None
    x: np.ndarray | None = None


@dataclass(frozen=True)
class Way:
    """The way from the product to the logits in one micro-batch.

    rows: int64 [n], its rows of the call that are outputs.  m: their inputs of the product, float32
    [n, n_in].  steps: from the logits back.
    """

    rows: np.ndarray
    m: np.ndarray
    steps: Sequence[Step]


class Follower:
    """The hook that follows what depends on a product; see ``context.NodeTap``.

    ways: of the last call, one of each micro-batch with outputs.  file: the model.  target: the
    product's weight.  Errors: ConfigError, from the call, for a way that is not of known
    operations.
    """

    def __init__(self, file: GGUFFile, target: Target, layout: Layout) -> None:
        self._file, self._target, self._layout = file, target, layout
        self.ways: list[Way] = []
        self._outputs = self._rows = np.empty(0, np.int64)
        self._start: int | None = None
        self._m: np.ndarray | None = None
        # Addresses of tensors that depend on the product, or whose memory does.
        self._reached: set[int | None] = set()
        # Of these: what they are or what is wrong with them, and their rows of outputs.
        self._steps: dict[int, Step | str] = {}
        self._values: dict[int | None, np.ndarray] = {}

    def begin(self, work: Call) -> None:
        """See ``NodeTap``."""
        self._outputs = work.outputs
        self.ways = []
        self._forget()

    def asked(self, node: Tensor) -> bool:
        """See ``NodeTap``."""
        if not self._outputs.any():
            return False
        address = ctypes.addressof(node)
        if self._is_product(node):
            if self._start is not None:
                raise self._refused("uses this matrix twice")
            self._start = address
            self._reached.add(address)
            return True
        on_way = [i for i, source in enumerate(node.src) if source and self._depends(source)]
        if not on_way:
            return False
        self._reached |= {address, node.view_src} - {None}
        self._steps[address] = self._step(node, on_way)
        if node.name == _LOGITS:
            self.ways.append(self._way(address))
            self._forget()
            return False
        return is_rows(node) and node.ne[0] == self._target.n_out

    def computed(self, node: Tensor, rows: np.ndarray) -> None:
        """See ``NodeTap``. Of a value on the way, the rows of outputs are kept."""
        address = ctypes.addressof(node)
        if address not in self._reached:
            return
        self._rows = rows[self._outputs[rows]]
        value = self._of_outputs(as_rows(node), rows)
        if address == self._start:
            self._m = self._of_outputs(as_rows(source_of(self._layout, node, 1)), rows)
        elif self._layout.operations.get(node.op) == "GET_ROWS":
            ids = source_of(self._layout, node, 1)
            found = as_array(ids.data, ctypes.c_int32, ids.ne[0])
            if not np.array_equal(found, np.flatnonzero(self._outputs[rows])):
                value = None
        if value is None:
            self._steps[address] = "has rows of unknown meaning behind it"
        else:
            self._values[address] = value

    def _is_product(self, node: Tensor) -> bool:
        if node.op != self._layout.mul_mat:
            return False
        return weight_name(source_of(self._layout, node, 0)) == self._target.name

    def _forget(self) -> None:
        self._start, self._m = None, None
        self._reached, self._steps, self._values = set(), {}, {}

    def _depends(self, source: int) -> bool:
        tensor = self._layout.tensor.from_address(source)
        return source in self._reached or tensor.view_src in self._reached

    def _step(self, node: Tensor, on_way: Sequence[int]) -> Step | str:
        """What an operation on the way is, or what is wrong with it; it may lead elsewhere.

        on_way: which of its sources are.
        """
        name = self._layout.operations.get(node.op, f"number {node.op}")
        unknown = f"has the operation {name} behind it, in a form that has no known way back"
        if len(on_way) != 1:
            return "has two ways from it to the logits"
        x = source_of(self._layout, node, on_way[0])
        if not is_rows(node) or not is_rows(x) or (node.ne[0] != x.ne[0] and name != "MUL_MAT"):
            return unknown
        step = Step(name, node.src[on_way[0]], numbers(node))
        same, first = list(node.ne) == list(x.ne), on_way[0] == 0
        if name == "GET_ROWS":
            return step if first and x.ne[0] == self._target.n_out else unknown
        if name in _SAME_ROWS:
            n, n_x = node.ne[1] * node.ne[2] * node.ne[3], x.ne[1] * x.ne[2] * x.ne[3]
            moved = name in ("RESHAPE", "VIEW") and node.data != x.data
            return step if first and n == n_x and not moved else unknown
        if name == "ADD":
            return step if same else unknown
        if name == "SCALE" or name in _NORMS:
            return step if same else unknown
        if name == "UNARY":
            return step if same and node.op_params[0] == self._layout.tanh else unknown
        if name not in ("MUL", "MUL_MAT"):
            return unknown
        other = source_of(self._layout, node, 1 - on_way[0])
        tensor = other.name.decode("utf-8", "replace")
        known = self._file.tensors.get(tensor)
        if other.op != 0 or other.view_src is not None or known is None:
            return unknown
        if name == "MUL" and same and known.shape in ((1,), (x.ne[0],)):
            return replace(step, weight=tensor)
        if name == "MUL_MAT" and not first and known.shape == (node.ne[0], x.ne[0]):
            return replace(step, weight=tensor)
        return unknown

    def _way(self, logits: int) -> Way:
        steps: list[Step] = []
        at, matrices = logits, 0
        while at != self._start:
            step = self._steps.get(at, "reaches the logits by a way that cannot be followed")
            if isinstance(step, str):
                raise self._refused(step)
            if step.name in _NORMS:
                # Without a value: of logits, or of what is not rows of the product's width.
                if step.source not in self._values:
                    raise self._refused("has a norm behind it whose input cannot be read")
                step = replace(step, x=self._values[step.source])
            if step.name == "UNARY" and matrices:
                raise self._refused("has a tanh before the output matrix")
            matrices += step.name == "MUL_MAT"
            steps.append(step)
            at = step.source
        if matrices != 1:
            raise self._refused(f"reaches the logits by {matrices} matrices, not by one")
        if self._m is None or self._start not in self._values:
            raise self._refused("has rows of unknown meaning in it")
        return Way(self._rows, self._m, steps)

    def _of_outputs(self, x: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """A copy of the rows of outputs of a value, which has all of a micro-batch's or only these;
        None if it has neither. x: [n or n_outputs, width].
        """
        outputs = self._outputs[rows]
        if len(x) == len(rows):
            return x[outputs]
        return x.copy() if len(x) == outputs.sum() else None

    def _refused(self, why: str) -> ConfigError:
        return refused(self._target.name, f"llama.cpp's graph of this model {why}")


def refused(name: str, why: str) -> ConfigError:
    """The error for an adapter of a matrix whose gradient is not known in closed form."""
    return ConfigError(
        f"there is no gradient by an adapter of {name} here, so choose --method central: {why}"
    )


def target_of(file: GGUFFile, adapter: Adapter | None) -> Target:
    """The only target of an adapter, if it is the last layer's ffn_down; ConfigError if not."""
    if adapter is None:
        raise ConfigError("a gradient needs an adapter to be of")
    architecture = file.string("general.architecture")
    name = f"blk.{file.positive(f'{architecture}.block_count') - 1}.ffn_down"
    others = [target.name for target in adapter.targets if target.name != name]
    if f"{name}.weight" not in file.tensors:
        raise ConfigError(
            "llama.cpp's graphs have a way back from the logits to the last layer's ffn_down only, "
            f"and this model of {architecture} has no {name}"
        )
    if others or len(adapter.targets) != 1:
        raise ConfigError(
            f"llama.cpp's graphs have a way back from the logits to {name} only, so the adapter "
            f"must be of this matrix alone, without {others[0]}"
        )
    return adapter.targets[0]


class Readout:
    """The gradient of the losses' sum by theta, call by call.

    gradient: float32, of theta's shape.
    """

    def __init__(
        self, file: GGUFFile, adapter: Adapter | None, layout: Layout, ops: BackwardKernels
    ) -> None:
        self.target = target_of(file, adapter)
        assert adapter is not None
        self.follower = Follower(file, self.target, layout)
        self.gradient = np.zeros_like(adapter.theta)
        self._file, self._adapter, self._ops = file, adapter, ops

    def add(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Add what the call just computed gives; returns the losses, float64 [n].

        logits: of the call's outputs, float32 [n, n_vocab], overwritten.  labels: int32 [n].
        """
        ways = self.follower.ways
        rows = np.concatenate([way.rows for way in ways]) if ways else np.empty(0, np.int64)
        if len(rows) != len(labels):
            raise refused(
                self.target.name, "in llama.cpp's graph of this model it does not lead to logits"
            )
        found, first = np.empty(len(labels)), 0
        place = np.empty(len(labels), np.int64)
        place[np.argsort(rows)] = np.arange(len(rows))  # of each row among the call's outputs
        for way in ways:
            here = place[first : first + len(way.rows)]
            first += len(way.rows)
            whole = np.array_equal(here, np.arange(len(labels)))
            own = logits if whole else logits[here]  # no copy if one micro-batch is all
            found[here], dy = self._pull_back(way.steps, own, labels[here])
            a_b = self._adapter.factors(self.target, self.gradient)
            lora = self._adapter.factors(self.target)
            self._ops.lora_vjp(way.m, dy, lora, a_b.a, a_b.b)
        return found

    def _pull_back(
        self, steps: Sequence[Step], logits: np.ndarray, labels: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The losses, float64 [n], and their gradient by the product's output, [n, width]."""
        before = [step.name for step in steps].index("MUL_MAT")
        slope = self._slope(steps[:before], logits)
        losses = negative_log_likelihood(logits, labels)
        logits /= logits.sum(axis=1, keepdims=True)
        at = np.arange(len(labels)), labels
        logits[at] -= 1
        if slope is not None:
            logits *= slope
        # The label's share is the largest by far: it is not rounded with the others.
        of_label, logits[at] = logits[at], 0
        dy = self._through_matrix(steps[before].weight, logits)
        dy += of_label[:, None] * self._ops.embedding(self._matrix(steps[before].weight), labels)
        for step in steps[before + 1 :]:
            dy = self._through(step, dy)
        return losses, dy

    def _slope(self, steps: Sequence[Step], logits: np.ndarray) -> np.ndarray | float | None:
        """The derivative of each logit by what the output matrix gives, None if it is 1."""
        slope: np.ndarray | float | None = None
        value: np.ndarray | None = logits  # of the step's output, if it is known
        capped = any(step.name == "UNARY" for step in steps)
        for step in steps:
            factor: np.ndarray | float | None = None
            if step.name == "SCALE":
                factor, offset = step.numbers[:2]
                if capped and value is not None:
                    value = (value - np.float32(offset)) / np.float32(factor)
            elif step.name == "UNARY":
                if value is None:
                    raise refused(self.target.name, "the logits' soft cap has an unknown form")
                factor, value = 1 - np.square(value), None
            elif step.name == "MUL":
                factor, value = self._vector(step.weight), None
            elif step.name == "ADD":
                value = None
            if factor is not None:
                slope = factor if slope is None else factor * slope
        return slope

    def _through(self, step: Step, dy: np.ndarray) -> np.ndarray:
        """The gradient by what an operation before the output matrix reads: [n, width]."""
        if step.name == "SCALE":
            return dy * np.float32(step.numbers[0])
        if step.name == "MUL":
            return dy * self._vector(step.weight)
        if step.name in _NORMS:
            assert step.x is not None
            vjp = self._ops.rms_norm_vjp if step.name == "RMS_NORM" else self._ops.layer_norm_vjp
            return vjp(step.x, np.ones(step.x.shape[1], np.float32), step.numbers[0], dy)
        return dy

    def _through_matrix(self, name: str | None, dy: np.ndarray) -> np.ndarray:
        # Rounded to int8 where llama.cpp rounds, too.
        matrix = self._matrix(name)
        return self._ops.matmul_vjp(dy, matrix, exact=matrix.type in VECTOR_TYPES)

    def _matrix(self, name: str | None) -> Matrix:
        assert name is not None
        try:
            return self._ops.weight(self._file.weight(name))
        except UnsupportedError as error:
            raise refused(self.target.name, error.reason) from error

    def _vector(self, name: str | None) -> np.ndarray:
        assert name is not None
        try:
            return self._file.vector(name)
        except UnsupportedError as error:
            raise refused(self.target.name, error.reason) from error


def agrees(
    gradient: np.ndarray,
    theta: np.ndarray,
    losses: Callable[[Sequence[np.ndarray]], np.ndarray],
) -> bool | None:
    """Whether the loss changes along its gradient as that says; None if it changes too little.

    losses: of two thetas, the mean loss at each.  A step may be so long that the loss is curved
    along it, or so short that it is rounded: one that agrees, of several lengths, is enough, as a
    wrong gradient disagrees at all of them.
    """
    length = float(np.linalg.norm(gradient))
    if not np.isfinite(length) or length == 0:
        return None
    unit = gradient / np.float32(length)
    step = min(_CHANGE / length, _LONGEST * float(np.linalg.norm(theta)))
    if step * length < _LEAST:
        return None
    for _ in range(_TRIES):
        move = np.float32(step) * unit
        up, down = losses([theta + move, theta - move])
        if abs((up - down) / (2 * step * length) - 1) <= _BOUND:
            return True
        step /= 4
    return False
