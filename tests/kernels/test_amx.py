"""The machine code of the kernels on AMX's tiles, wherever they are built.

`tests/amx.sh` runs them under emulation; where there is AMX test_every_isa does.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys

import pytest

from fwdllm.kernels import cpu
from fwdllm.kernels.cpu import _native

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not shutil.which("objdump"),
    reason="reads x86 machine code by objdump on Linux",
)

# Of two tiles of sums along 32 bf16: 3 loads for 2 products.
STEP = ["load 3", "load 2", "sums 0", "load 2", "sums 1"]
# Of operands in two parts, high and low: 7 loads for 6 products.
PARTS = "load 2,load 3,sums 0,load 3,sums 1,load 3,sums 0,load 3,sums 1,load 2,sums 1,load 3,sums 0"


def functions() -> list[list[str]]:
    """The tile instructions of each function that has some."""
    command = ["objdump", "-d", "--no-show-raw-insn", "--no-addresses", _native.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    names = {
        "ldtilecfg": "begin",
        "tilerelease": "end",
        "tileloadd": "load",
        "tileloaddt1": "load",
        "tdpbf16ps": "sums",
    }
    found = []
    for function in text.split("\n\n"):
        lines = re.findall(rf"^\s+({'|'.join(names)})\b(.*)", function, re.M)
        if lines:
            found.append([f"{names[a]} {re.findall('tmm([0-9])', b)[-1:]}" for a, b in lines])
    return [[re.sub(r"[\[\]']", "", line).strip() for line in lines] for lines in found]


def test_products_on_tiles_load_no_more_than_they_need() -> None:
    version = re.match(r"(GCC|Clang) (\d+)", cpu.compiler)
    assert version is not None
    if int(version[2]) < 11:
        pytest.skip(f"{cpu.compiler} does not know AMX")
    found = functions()
    assert found
    for lines in found:
        assert {"begin", "end"} <= set(lines)  # no function leaves tiles in use
    text = "\n".join("\n".join(lines) for lines in found)
    for step in (STEP, PARTS.split(",")):
        assert "\n".join(step) in text
