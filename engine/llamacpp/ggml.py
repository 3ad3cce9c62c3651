"""ggml's tensors as llama.cpp's callback gets them: their layout, read from ggml's own header.

llama-cpp-python installs the header of the ggml it was built with. Before any tensor is read, some
made by ggml are compared, field by field, with what ggml's functions say of them.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwdllm.engine.errors import ConfigError
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
_READ = ("type", "ne", "nb", "op", "src", "view_src", "data", "name")
F32 = 0  # enum ggml_type, as in files
_F16, _I32 = 1, 26


class Tensor(ctypes.Structure):
    """The fields that we read of a struct ggml_tensor; ``Layout.tensor`` has all, by the header.

    type: enum ggml_type.  ne, nb: sizes and strides in bytes, the fastest first.  op: enum ggml_op.
    src, view_src, data: addresses.
    """

    type: int
    ne: Sequence[int]
    nb: Sequence[int]
    op: int
    src: Sequence[int]
    view_src: int | None
    data: int
    name: bytes


@dataclass(frozen=True)
class Layout:
    """tensor: the struct.  mul_mat, get_rows: numbers of these operations."""

    tensor: type[Tensor]
    mul_mat: int
    get_rows: int


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
        found = Layout(_struct(text), _operation(text, "MUL_MAT"), _operation(text, "GET_ROWS"))
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


def _operation(header: str, name: str) -> int:
    """The number of an operation in the text of ggml.h. ValueError if there is none."""
    found = re.search(r"enum ggml_op \{(.*?)\}", header, re.DOTALL)
    return re.findall(r"GGML_OP_(\w+)", found[1] if found else "").index(name)


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
    context = pointer, call("init", pointer, (_InitParams, _InitParams(1 << 16, None, False)))

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
    finally:
        call("free", None, context)
