"""ggml's tensors as llama.cpp's callback gets them: their layout, read from ggml's own header.

llama-cpp-python installs the header of the ggml it was built with. Before any tensor is read, some
made by ggml are compared, field by field, with what ggml's functions say of them.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fwdllm.engine.errors import ConfigError, ModelError
from fwdllm.engine.llamacpp.native import llama_cpp

_PACKAGE = Path(llama_cpp.__file__).parent
HEADER = _PACKAGE.parent / "include" / "ggml.h"

_SIZES = {"int8_t": 1, "int32_t": 4, "int64_t": 8}
_TYPES: dict[str, Any] = {
    "char": ctypes.c_char,
    "int32_t": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "size_t": ctypes.c_size_t,
}
_FIELD = re.compile(
    r"(?P<type>(?:enum |struct )?\w+) (?P<pointer>\*? ?)(?P<name>\w+)(?:\[(?P<count>[^]]+)\])?"
)
# What the callback reads; the struct may have more.
_READ = ("type", "ne", "nb", "op", "op_params", "src", "view_src", "data", "name")
# Operations that are known by name, see ``readout``.
_KNOWN = (
    *("ADD", "CONT", "CPY", "DUP", "GET_ROWS", "MUL", "MUL_MAT", "NORM"),
    *("RESHAPE", "RMS_NORM", "SCALE", "UNARY", "VIEW"),
)
F32 = 0  # enum ggml_type, as in files
_F16, _I32 = 1, 26


class Tensor(ctypes.Structure):
    """The fields that we read of a struct ggml_tensor; ``Layout.tensor`` has all, by the header.

    type: enum ggml_type.  ne, nb: sizes and strides in bytes, the fastest first.  op: enum ggml_op.
    op_params: words of 32 bits.  src, view_src, data: addresses.
    """

    type: int
    ne: Sequence[int]
    nb: Sequence[int]
    op: int
    op_params: Sequence[int]
    src: Sequence[int]
    view_src: int | None
    data: int
    name: bytes


@dataclass(frozen=True)
class Layout:
    """tensor: the struct.  mul_mat, get_rows: numbers of these operations.  operations: the names
    of known operations, by number.  tanh: the number of this function of UNARY.
    """

    tensor: type[Tensor]
    mul_mat: int
    get_rows: int
    operations: Mapping[int, str]
    tanh: int


@functools.cache
def layout() -> Layout:
    """The layout of the installed ggml.

    Errors: ConfigError if its header is missing, not understood, or does not match the library.
    """
    return read_layout(HEADER)


def read_layout(header: Path) -> Layout:
    """The layout that a header describes; errors as ``layout``."""
    try:
        text = header.read_text(encoding="utf-8")
        number = {name: _number(text, "ggml_op", f"GGML_OP_{name}") for name in _KNOWN}
        found = Layout(
            _struct(text),
            number["MUL_MAT"],
            number["GET_ROWS"],
            {n: name for name, n in number.items()},
            _number(text, "ggml_unary_op", "GGML_UNARY_OP_TANH"),
        )
        _check(found)
        return found
    except (OSError, ValueError, ArithmeticError, AttributeError) as error:
        raise ConfigError(
            f"llama-cpp-python {llama_cpp.__version__} is not one whose tensors can be read "
            f"({error}): models without a graph of our own need another version of it"
        ) from error


def _struct(header: str) -> type[Tensor]:
    """struct ggml_tensor for ctypes, from the text of ggml.h. ValueError if not understood."""
    found = re.search(r"struct ggml_tensor \{(.*?)\n *\};", header, re.DOTALL)
    if not found:
        raise ValueError("its header has no struct ggml_tensor")
    constants = dict(re.findall(r"# *define +(GGML_MAX_\w+) +(\d+)", header))
    body = re.sub(r"//[^\n]*|/\*.*?\*/", "", found[1], flags=re.DOTALL)
    fields = [_field(" ".join(text.split()), constants) for text in body.split(";") if text.strip()]
    missing = set(_READ) - {name for name, _ in fields}
    if missing:
        raise ValueError(f"its tensors have no {min(missing)}")
    return type("Tensor", (Tensor,), {"_fields_": fields})


def _number(header: str, enum: str, name: str) -> int:
    """The number of a name in an enum in the text of ggml.h. ValueError if there is none."""
    found = re.search(rf"enum {enum} \{{(.*?)\}}", header, re.DOTALL)
    return re.findall(r"GGML_\w+", found[1] if found else "").index(name)


def _field(text: str, constants: dict[str, str]) -> tuple[str, Any]:
    found = _FIELD.fullmatch(text)
    if not found:
        raise ValueError(f"a field of its tensors is {text!r}")
    kind: Any
    if found["pointer"].strip():
        kind = ctypes.c_void_p
    elif found["type"].startswith("enum "):
        kind = ctypes.c_int
    elif found["type"] in _TYPES:
        kind = _TYPES[found["type"]]
    else:
        raise ValueError(f"a field of its tensors is {text!r}")
    return found["name"], kind * _count(found["count"], constants) if found["count"] else kind


def _count(text: str, constants: dict[str, str]) -> int:
    """An array's length: a number or a constant, maybe divided by the size of a type."""
    number, _, divisor = text.partition("/")
    length = int(constants.get(number.strip(), number))
    if divisor:
        length //= _SIZES.get(divisor.strip().removeprefix("sizeof(").removesuffix(")"), 0)
    return length


class _InitParams(ctypes.Structure):
    _fields_ = (
        ("mem_size", ctypes.c_size_t),
        ("mem_buffer", ctypes.c_void_p),
        ("no_alloc", ctypes.c_bool),
    )


def _check(layout: Layout) -> None:
    """Compare what tensors of the installed ggml hold with what its functions say; ValueError."""
    library = llama_cpp._ctypes_extensions.load_shared_library("ggml-base", _PACKAGE / "lib")
    pointer, number = ctypes.c_void_p, ctypes.c_int64

    def call(name: str, result: Any, *arguments: Any) -> Any:
        kinds = [kind for kind, _ in arguments]
        function = ctypes.CFUNCTYPE(result, *kinds)((f"ggml_{name}", library))
        return function(*(value for _, value in arguments))

    if ctypes.sizeof(layout.tensor) > call("tensor_overhead", ctypes.c_size_t):
        raise ValueError("its tensors are smaller than its header says")
    context = pointer, call("init", pointer, (_InitParams, _InitParams(1 << 17, None, False)))

    def new(type: int, *shape: int) -> tuple[Any, int]:
        sizes = [(number, size) for size in shape]
        name = f"new_tensor_{len(shape)}d"
        return pointer, call(name, pointer, context, (ctypes.c_int, type), *sizes)

    try:
        weight, x, ids = new(_F16, 64, 5), new(F32, 64, 7), new(_I32, 3)
        y = pointer, call("mul_mat", pointer, context, weight, x)
        rows = pointer, call("get_rows", pointer, context, weight, ids)
        flat = pointer, call("reshape_1d", pointer, context, x, (number, 64 * 7))
        if layout.tensor.from_address(flat[1]).view_src != x[1]:
            raise ValueError("its tensors have no view_src where its header says")
        call("set_name", pointer, weight, (ctypes.c_char_p, b"blk.3.attn_q.weight"))
        for t, type, op, shape, src in (
            (weight, _F16, 0, (64, 5, 1, 1), ()),
            (x, F32, 0, (64, 7, 1, 1), ()),
            (ids, _I32, 0, (3, 1, 1, 1), ()),
            (y, F32, layout.mul_mat, (5, 7, 1, 1), (weight[1], x[1])),
            (rows, F32, layout.get_rows, (64, 3, 1, 1), (weight[1], ids[1])),
        ):
            found = layout.tensor.from_address(t[1])
            row = call("row_size", ctypes.c_size_t, (ctypes.c_int, type), (number, shape[0]))
            want = {
                "type": type,
                "op": op,
                "ne": shape,
                "nb": (row // shape[0], row, row * shape[1], row * shape[1]),
                "view_src": None,
                "src": (*src, None, None)[:2],
                "data": call("get_data", pointer, t),
                "name": call("get_name", ctypes.c_char_p, t),
            }
            for name, value in want.items():
                has = getattr(found, name)
                if value != (tuple(has)[: len(value)] if isinstance(value, tuple) else has):
                    raise ValueError(f"its tensors have no {name} where its header says")
        half, twice = (ctypes.c_float, 0.5), (ctypes.c_float, 2.0)
        for operation, name, arguments, words in (
            ("ADD", "add", (x, x), ()),
            ("CONT", "cont", (x,), ()),
            ("CPY", "cpy", (x, x), ()),
            ("DUP", "dup", (x,), ()),
            ("MUL", "mul", (x, x), ()),
            ("NORM", "norm", (x, half), (0.5,)),
            ("RESHAPE", "reshape_1d", (x, (number, 64 * 7)), ()),
            ("RMS_NORM", "rms_norm", (x, half), (0.5,)),
            ("SCALE", "scale_bias", (x, half, twice), (0.5, 2.0)),
            ("UNARY", "tanh", (x,), ()),
            ("VIEW", "view_1d", (x, (number, 64), (ctypes.c_size_t, 0)), ()),
        ):
            found = layout.tensor.from_address(call(name, pointer, context, *arguments))
            if layout.operations.get(found.op) != operation:
                raise ValueError(f"its operations have no {operation} where its header says")
            if numbers(found)[: len(words)] != words:
                raise ValueError("its tensors have no op_params where its header says")
            if operation == "UNARY" and found.op_params[0] != layout.tanh:
                raise ValueError("its functions have no tanh where its header says")
    finally:
        call("free", None, context)


def source_of(layout: Layout, node: Tensor, i: int) -> Tensor:
    """The i-th input of an operation."""
    return layout.tensor.from_address(node.src[i])


def weight_name(tensor: Tensor) -> str:
    """A tensor's name, without ".weight" at its end."""
    name: str = tensor.name.decode("utf-8", "replace")
    return name.removesuffix(".weight")


def numbers(tensor: Tensor) -> tuple[float, ...]:
    """The parameters of an operation that has float32 ones."""
    words = np.array(tensor.op_params[:], np.int32)
    return tuple(words.view(np.float32).tolist())


def is_rows(tensor: Tensor) -> bool:
    """Whether a tensor is contiguous float32."""
    shape, size = list(tensor.ne), 4
    strides = [size := 4] + [size := size * n for n in shape[:3]]
    return tensor.type == F32 and list(tensor.nb) == strides


def as_rows(tensor: Tensor) -> np.ndarray:
    """A tensor as rows: float32 [n_rows, ne[0]]. ModelError if it is not contiguous float32."""
    if not is_rows(tensor):
        raise ModelError(f"llama.cpp's {tensor.name.decode()} is not rows of float32")
    width, *shape = tensor.ne
    n_rows = shape[0] * shape[1] * shape[2]
    return as_array(tensor.data, ctypes.c_float, n_rows * width).reshape(n_rows, width)


def as_array(address: int, kind: Any, n: int) -> np.ndarray:
    """n numbers of a kind of ctypes at an address, not copied."""
    return np.ctypeslib.as_array((kind * n).from_address(address))
