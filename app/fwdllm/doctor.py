"""``fwdllm doctor``: what this machine has, and whether the parts work on it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fwdllm.engine.llamacpp import probe
from fwdllm.engine.memory.system import available_bytes, limit_bytes
from fwdllm.kernels import machine

# The processor flags for which this package or llama.cpp has kernels.
_INSTRUCTIONS = re.compile(
    r"avx2|fma|f16c|avx_vnni\w*|avx512\w+|amx_\w+|asimddp|asimdhp|i8mm|bf16|sve2?"
)
_COMPILERS = ("cc", "clang", "nvcc")
_LIBRARIES = ("numpy", "gguf", "llama-cpp-python", "torch", "triton")
_FOR_DEVELOPERS = ("test", "lint", "docs")
_SECONDS = 5.0  # a driver that hangs is a finding, too

_LLAMA_CPP = {
    probe.FULL: "works",
    probe.PLAIN: "works without extra buffer types, more slowly",
    probe.VOCABULARY: "reads vocabularies only: no text, embeddings or models of its own",
    probe.BROKEN: "does not work",
}


def examine() -> dict[str, Any]:
    """A report on this machine as JSON values; llama.cpp is tested again in a child process.

    ok: whether this package's kernels and llama.cpp work.  versions: of fwdllm, Python and the
    system.  processor: name, cpus, instructions (the processor flags that kernels exist for).
    kernels: this package's: isa (the instruction set in use), isas (those this machine could use),
    threads, compiler, and error (None if the kernels work).  memory: total_bytes and
    available_bytes (None if the system does not tell), limit_bytes (a container's limit; None
    without one).  compilers: first line of --version by command.
    llama_cpp: state (see ``engine.llamacpp.probe``), meaning, reason, library (its folder), system
    (llama.cpp's description of its build).  libraries: versions, None if not installed.  gpus: as
    NVIDIA's driver names them.  extras: for each optional part, the packages that are missing.
    """
    found, kernels = probe.examine(), _kernels()
    return {
        "ok": found.state in (probe.FULL, probe.PLAIN) and kernels["error"] is None,
        "versions": {
            "fwdllm": _version("fwdllm"),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "processor": _processor(),
        "kernels": kernels,
        "memory": _memory(),
        "compilers": {
            name: line for name in _COMPILERS if (line := _first_line([name, "--version"]))
        },
        "llama_cpp": {
            "state": found.state,
            "meaning": _LLAMA_CPP[found.state],
            "reason": found.reason,
            "library": str(probe.library_folder() or ""),
            "system": _llama_cpp_system() if found.state != probe.BROKEN else "",
        },
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "gpus": _gpus(),
        "extras": _extras(),
    }


def render(report: Mapping[str, Any]) -> RenderableType:
    """The report of ``examine`` as text for the terminal."""
    processor, kernels, memory = report["processor"], report["kernels"], report["memory"]
    llama = report["llama_cpp"]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in report["versions"].items():
        table.add_row(name, value)
    table.add_row("processor", f"{processor['name']}, {processor['cpus']} CPUs")
    table.add_row("instructions", " ".join(processor["instructions"]) or "unknown")
    if kernels["error"] is None:
        others = ", ".join(isa for isa in kernels["isas"] if isa != kernels["isa"])
        table.add_row(
            "our kernels",
            f"{kernels['isa']} on {kernels['threads']} threads, built by {kernels['compiler']} "
            f"(FWDLLM_ISA could be {others or 'nothing else'})",
        )
    else:
        table.add_row("our kernels", Text.assemble(("do not work", "red"), f": {kernels['error']}"))
    amounts = [f"{_gigabytes(memory['total_bytes'])} in all"]
    amounts += [
        f"{_gigabytes(memory[key])} {word}"
        for key, word in (("available_bytes", "available"), ("limit_bytes", "allowed here"))
        if memory[key] is not None
    ]
    table.add_row("memory", ", ".join(amounts))
    why = f" ({llama['reason']})" if llama["reason"] else ""
    color = {probe.FULL: "green", probe.PLAIN: "yellow"}.get(llama["state"], "red")
    table.add_row("llama.cpp", Text.assemble((llama["meaning"], color), why))
    if why:
        table.add_row("", probe.REBUILD)
    table.add_row("", llama["library"])
    table.add_row("", llama["system"])
    for name, line in report["compilers"].items():
        table.add_row(name, line)
    for name, version in report["libraries"].items():
        table.add_row(name, version or "not installed")
    table.add_row("GPU", "; ".join(report["gpus"]) or "none (no nvidia-smi that answers)")
    for extra, missing in report["extras"].items():
        without = f"pip install 'fwdllm[{extra}]' brings {', '.join(missing)}"
        table.add_row(f"[{extra}]", without if missing else "installed")
    return Group(table)


def _kernels() -> dict[str, Any]:
    try:
        from fwdllm.kernels import cpu
    except (ImportError, RuntimeError) as error:  # not built for this system; FWDLLM_ISA
        return dict.fromkeys(("isa", "threads", "compiler")) | {"isas": [], "error": str(error)}
    return {
        "isa": cpu.isa,
        "isas": list(cpu.isas),
        "threads": cpu.num_threads(),
        "compiler": cpu.compiler,
        "error": None,
    }


def _processor() -> dict[str, Any]:
    facts = machine.processor()
    instructions = [flag for flag in facts["flags"].split() if _INSTRUCTIONS.fullmatch(flag)]
    return {"name": facts["name"], "cpus": os.cpu_count(), "instructions": instructions}


def _memory() -> dict[str, int | None]:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # not Unix
        total = None
    return {
        "total_bytes": total,
        "available_bytes": available_bytes(),
        "limit_bytes": limit_bytes(),
    }


def _llama_cpp_system() -> str:
    from fwdllm.engine.llamacpp.native import initialize, llama_cpp

    initialize()
    text: bytes = llama_cpp.llama_print_system_info()
    return text.decode("utf-8", "replace").strip(" |\n")


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    return _output(query).splitlines()


def _extras() -> dict[str, list[str]]:
    """For each of pyproject.toml's extras for users: its packages that are not installed."""
    found: dict[str, list[str]] = {}
    for line in metadata.requires("fwdllm") or ():
        extra = re.search(r"""extra == ["'](\w+)["']""", line)
        name = re.match(r"[\w.-]+", line)
        if extra is None or name is None or extra[1] in _FOR_DEVELOPERS:
            continue
        missing = found.setdefault(extra[1], [])
        if _version(name[0]) is None:
            missing.append(name[0])
    return found


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _first_line(command: Sequence[str]) -> str:
    return next(iter(_output(command).splitlines()), "")


def _output(command: Sequence[str]) -> str:
    """What a command prints; "" if it does not exist, fails or hangs."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _gigabytes(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else f"{n_bytes / 2**30:.1f} GiB"
