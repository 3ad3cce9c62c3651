"""The layout of ggml's tensors: read from its header, and refused where that is not the truth."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.llamacpp import ggml

Change = Callable[[str], str]


def swap(first: str, second: str) -> Change:
    """Exchange two pieces of the struct."""
    return in_struct(lambda s: s.replace(first, "@").replace(second, first).replace("@", second))


def change(old: str, new: str) -> Change:
    """Replace a piece of the struct."""
    return in_struct(lambda s: s.replace(old, new, 1))


def anywhere(old: str, new: str) -> Change:
    return lambda header: header.replace(old, new)


def in_struct(edit: Change) -> Change:
    def edited(header: str) -> str:
        start = header.index("struct ggml_tensor {")
        end = header.index("};", start)
        return header[:start] + edit(header[start:end]) + header[end:]

    return edited


NE = "int64_t ne[GGML_MAX_DIMS];"
NB = "size_t  nb[GGML_MAX_DIMS];"
OP = "enum ggml_op op;"
PARAMETERS = "int32_t op_params[GGML_MAX_OP_PARAMS / sizeof(int32_t)];"
PADDING = "char padding[8];"

HARMLESS = {
    "another padding": change(PADDING, "char padding[16];"),
    "no padding": change(PADDING, ""),
    "a new field at the end": change(PADDING, "void * more;\n int32_t flag;"),
    "a field renamed that is not read": change("view_offs", "view_start"),
    "comments": change(OP, "/* enum ggml_op\n op; */ enum ggml_op op; // int64_t ne[3];"),
    "spaces": change(OP, "enum   ggml_op\n   op ;"),
    "a number in place of a constant": change("GGML_MAX_SRC", "10"),
    "operations added at the end": anywhere("GGML_OP_COUNT,", "GGML_OP_NEW,\n GGML_OP_COUNT,"),
}

WRONG = {
    "fields swapped": swap(NE, NB),
    "names swapped": swap("view_src", "data"),
    "data behind the name": swap("void * data;", "char name[GGML_MAX_NAME];"),
    "parameters elsewhere": swap(PARAMETERS, "int32_t flags;"),
    "a field inserted": change(NE, f"int64_t more;\n {NE}"),
    "a small field inserted": change(OP, f"int32_t more;\n {OP}"),
    "a field removed": change("struct ggml_backend_buffer * buffer;", ""),
    "fewer dimensions": anywhere("GGML_MAX_DIMS           4", "GGML_MAX_DIMS           3"),
    "more sources": change("GGML_MAX_SRC", "12"),
    "a short name": change("GGML_MAX_NAME", "8"),
    "dimensions of 32 bits": change("int64_t ne", "int32_t ne"),
    "one dimension": change(NE, "int64_t ne;"),
    "a field that is missing": change("void * data;", "void * contents;"),
    "a type that is unknown": change("int32_t flags;", "ggml_flags flags;"),
    "bits": change("int32_t flags;", "int32_t flags : 3;"),
    "a length that is unknown": change("GGML_MAX_SRC", "GGML_MOST_SRC"),
    "a length that is negative": change("padding[8]", "padding[-8]"),
    "a size that is unknown": change("sizeof(int32_t)", "sizeof(ggml_half)"),
    "a division by zero": change("sizeof(int32_t)", "0"),
    "a length that does not fit": change("padding[8]", f"padding[1{'0' * 30}]"),
    "no struct": anywhere("struct ggml_tensor {", "struct ggml_array {"),
    "an operation inserted": anywhere("GGML_OP_DUP,", "GGML_OP_FIRST,\n GGML_OP_DUP,"),
    "operations swapped": lambda h: (
        h.replace("GGML_OP_MUL_MAT,", "@")
        .replace("GGML_OP_MUL_MAT_ID,", "GGML_OP_MUL_MAT,")
        .replace("@", "GGML_OP_MUL_MAT_ID,")
    ),
    "known operations swapped": lambda h: (
        h.replace("GGML_OP_ADD,", "@")
        .replace("GGML_OP_MUL,", "GGML_OP_ADD,")
        .replace("@", "GGML_OP_MUL,")
    ),
    "functions swapped": lambda h: (
        h.replace("GGML_UNARY_OP_TANH,", "@")
        .replace("GGML_UNARY_OP_ELU,", "GGML_UNARY_OP_TANH,")
        .replace("@", "GGML_UNARY_OP_ELU,")
    ),
    "an operation that is missing": anywhere("GGML_OP_GET_ROWS,", "GGML_OP_TAKE,"),
    "no operations": anywhere("enum ggml_op {", "enum ggml_operation {"),
    "nothing": lambda _: "",
    "half of it": lambda h: h[: h.index("int32_t flags;")],
}


def altered(folder: Path, edit: Change) -> Path:
    text = ggml.HEADER.read_text(encoding="utf-8")
    path = folder / "ggml.h"
    path.write_text(edit(text), encoding="utf-8")
    assert path.read_text(encoding="utf-8") != text
    return path


def refused(path: Path) -> str:
    """The one sentence with which a header is refused."""
    with pytest.raises(ConfigError) as raised:
        ggml.read_layout(path)
    message = str(raised.value)
    assert message.startswith("llama-cpp-python ") and "\n" not in message
    assert "another version" in message
    return message


def test_the_installed_header() -> None:
    layout = ggml.layout()
    names = [field[0] for field in layout.tensor._fields_]
    assert names[0] == "type" and {"ne", "nb", "op", "src", "data", "name"} <= set(names)
    assert layout.mul_mat != layout.get_rows
    assert ggml.layout() is layout


@pytest.mark.parametrize("edit", HARMLESS.values(), ids=HARMLESS)
def test_harmless_changes(tmp_path: Path, edit: Change) -> None:
    """What the callback reads is where it was: accepted, and read from the same places."""
    found, installed = ggml.read_layout(altered(tmp_path, edit)), ggml.layout()
    for name in ("type", "ne", "nb", "op", "op_params", "src", "data", "name"):
        assert getattr(found.tensor, name).offset == getattr(installed.tensor, name).offset
    assert (found.mul_mat, found.get_rows) == (installed.mul_mat, installed.get_rows)


@pytest.mark.parametrize("edit", WRONG.values(), ids=WRONG)
def test_a_header_that_does_not_match(tmp_path: Path, edit: Change) -> None:
    refused(altered(tmp_path, edit))


def test_a_header_that_cannot_be_read(tmp_path: Path) -> None:
    refused(tmp_path / "missing.h")
    refused(tmp_path)
    binary = tmp_path / "binary.h"
    binary.write_bytes(b"\xff\xfe\x00" * 100)
    refused(binary)


def test_the_reason_is_in_the_sentence(tmp_path: Path) -> None:
    assert "no struct ggml_tensor" in refused(altered(tmp_path, WRONG["no struct"]))
    assert "no data" in refused(altered(tmp_path, WRONG["a field that is missing"]))
    assert "int32_t flags : 3" in refused(altered(tmp_path, WRONG["bits"]))


def test_a_library_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ggml, "_PACKAGE", tmp_path)
    refused(ggml.HEADER)


def test_a_struct_that_is_too_large(tmp_path: Path) -> None:
    """Its fields are not looked for in memory that is not there (in a process of its own)."""
    path = altered(tmp_path, change(NE, f"char gap[2000000000];\n {NE}"))
    code = (
        "import sys; from pathlib import Path\n"
        "from fwdllm.engine.llamacpp import ggml\n"
        "from fwdllm.engine.errors import ConfigError\n"
        "try: ggml.read_layout(Path(sys.argv[1]))\n"
        "except ConfigError: sys.exit(42)"
    )
    outcome = subprocess.run([sys.executable, "-c", code, path], timeout=60, capture_output=True)
    assert outcome.returncode == 42, outcome.stderr.decode()


def test_a_broken_header_stops_the_engine(bundled: Path, tmp_path: Path) -> None:
    """Before llama.cpp computes anything; models with a graph of ours are not concerned."""
    path = altered(tmp_path, WRONG["a field inserted"])
    code = (
        "import sys; from pathlib import Path\n"
        "from fwdllm.engine import Engine\nfrom fwdllm.engine.llamacpp import ggml\n"
        "from fwdllm.engine.errors import ConfigError\n"
        "ggml.HEADER = Path(sys.argv[2])\n"
        "Engine.load(sys.argv[1])\n"
        "try: Engine.load(sys.argv[1], backend='llama.cpp')\n"
        "except ConfigError as error: print(error, end=''); sys.exit(42)"
    )
    command = [sys.executable, "-c", code, bundled, path]
    outcome = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert outcome.returncode == 42, outcome.stderr
    assert outcome.stdout.startswith("llama-cpp-python ") and "\n" not in outcome.stdout
