"""The layers: app, protocol, engine, kernels. A layer imports only itself and those after it.

Held by reading every import in the sources.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest
from places import ROOT

# A folder may import itself and the folders after it.
LAYERS = ("app", "protocol", "engine", "kernels")
FOLDERS = (*LAYERS, "bench")

# The packages and where their sources are.
PACKAGES = {"fwdllm": "app/fwdllm", **{f"fwdllm.{folder}": folder for folder in FOLDERS[1:]}}

# The one way up: the command line mounts the commands of bench.
MOUNTED = {"app/fwdllm/cli/commands.py": {"fwdllm.bench.cli.app"}}

# Optional or large: imported inside the functions that need them, if at all.
HEAVY = {"torch", "triton", "fastapi", "uvicorn", "starlette", "pydantic", "flwr"}

# Files, clocks, threads, sockets and hidden randomness, which protocol leaves to its caller.
IMPURE = {
    "asyncio", "datetime", "fcntl", "io", "logging", "multiprocessing", "os", "pathlib", "random",
    "secrets", "shutil", "signal", "socket", "sqlite3", "subprocess", "sys", "tempfile",
    "threading", "time", "urllib", "uuid",
}  # fmt: skip
IMPURE_CALLS = {"open", "print", "input"}

# What opens a model or a context in llama.cpp, and where that may be.
OPENING = {"Llama", "llama_model_load_from_file", "llama_load_model_from_file",
           "llama_init_from_model", "llama_new_context_with_model"}  # fmt: skip
DOOR = tuple(f"engine/llamacpp/{name}.py" for name in ("native", "probe", "trial"))
# Types without the library's functions; fwdllm.http imports the door first.
LLAMA_CPP_TYPES = {
    f"llama_cpp.server.types.Create{kind}Request" for kind in ("Completion", "ChatCompletion")
}

# The parts that are there to touch the world: a ledger's files, Flower's apps, the HTTP server and
# the kernels of GPUs.
WORLDLY = ("protocol/ledger.py", "protocol/keys.py", "protocol/flower/", "app/fwdllm/http/",
           "kernels/triton/")  # fmt: skip


def sources(folder: str) -> list[Path]:
    """The Python files of a folder, without what `make clients` installs there."""
    files = sorted((ROOT / folder).rglob("*.py"))
    return [path for path in files if not {".venv", "node_modules"}.intersection(path.parts)]


def imported(tree: ast.AST) -> Iterator[str]:
    """Every imported name, in full: "from a import b" gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def at_module_level(node: ast.AST) -> ast.Module:
    """The statements that run on import, in one flat module."""
    found: list[ast.stmt] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) or _for_type_checkers(child):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            found.append(child)
        found.extend(at_module_level(child).body)
    return ast.Module(body=found, type_ignores=[])


def _for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def folder_of(name: str) -> str | None:
    """The repository folder a dotted import name belongs to; None outside the project."""
    parts = name.split(".")
    if parts[0] != "fwdllm":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in FOLDERS else "app"


def faults(
    folder: str,
    source: str,
    test_modules: set[str],
    mounted: Collection[str] = (),
    worldly: bool = False,
) -> list[str]:
    """What the source, of a file in the folder, imports or calls against the rules."""
    tree = ast.parse(source)
    found = []
    for name in imported(tree):
        target, top = folder_of(name), name.split(".")[0]
        if top == "":
            found.append(f"relative import {name}")
        elif top in test_modules:
            found.append(f"imports the tests: {name}")
        elif name in mounted:
            continue
        elif target and folder != "bench" and target not in LAYERS[LAYERS.index(folder) :]:
            found.append(f"imports upward: {name}")
    if folder != "bench" and not worldly:
        tops = {name.split(".")[0] for name in imported(at_module_level(tree))}
        found += [f"imports {name} at module level" for name in sorted(tops & HEAVY)]
    if folder == "protocol" and not worldly:
        found += impurities(tree)
    return found


def opened_beside_the_door(tree: ast.AST) -> list[str]:
    """Uses of llama.cpp that pass by ``engine.llamacpp.native``, which knows what works here."""
    found = [
        f"imports {name}"
        for name in imported(tree)
        if name.split(".")[0] == "llama_cpp" and name not in LLAMA_CPP_TYPES
    ]
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        if name.startswith("llama_cpp.") and name.split(".")[-1] in OPENING:
            found.append(f"uses {name}")
    return found


def impurities(tree: ast.AST) -> list[str]:
    found = [f"imports {name}" for name in imported(tree) if name.split(".")[0] in IMPURE]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in IMPURE_CALLS:
            found.append(f"calls {ast.unparse(node.func)}")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("np.random", "numpy.random"):
            found.append("uses NumPy's random numbers")
    return found


def modules() -> dict[str, str]:
    """The source of every module of the package, by the name it is imported with."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sources(folder):
            inside = path.relative_to(ROOT / folder).with_suffix("").parts
            if inside[0] != "studies":  # scripts that are not installed
                name = ".".join((package, *inside)).removesuffix(".__init__")
                found[name] = path.read_text(encoding="utf-8")
    return found


def import_graph(sources: Mapping[str, str]) -> dict[str, set[str]]:
    """Which of the modules each one imports, wherever in its source and if only for its types."""
    graph = {}
    for module, source in sources.items():
        names = set(imported(ast.parse(source)))
        owners = {name.rpartition(".")[0] for name in names - sources.keys()}
        # Where it imports a native module of its own, its name is the owner.
        graph[module] = (names | owners) & (sources.keys() - {module})
    return graph


def circle(graph: Mapping[str, Collection[str]]) -> list[str]:
    """Modules of which each imports the next, and the last is the first; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return []


def test_modules() -> set[str]:
    return {"tests"} | {path.stem for path in sources("tests")}


test_modules.__test__ = False  # a helper in spite of its name


@pytest.mark.parametrize("folder", FOLDERS)
def test_sources_keep_to_their_layer(folder: str) -> None:
    files = sources(folder)
    assert files
    found = {}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        source = path.read_text(encoding="utf-8")
        worldly = name.startswith(WORLDLY)
        found[name] = faults(folder, source, TESTS, MOUNTED.get(name, ()), worldly)
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize("folder", [*FOLDERS, "tests"])
def test_llama_cpp_has_one_door(folder: str) -> None:
    found = {
        path.name: opened_beside_the_door(ast.parse(path.read_text(encoding="utf-8")))
        for path in sources(folder)
        if path.relative_to(ROOT).as_posix() not in DOOR
    }
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import llama_cpp",
        "from llama_cpp import Llama",
        "def f():\n    import llama_cpp.llama_chat_format",
        "from fwdllm.engine.llamacpp.native import llama_cpp\nllama_cpp.Llama('x')",
        "call(llama_cpp.llama_init_from_model, model, params)",
        "llama_cpp.llama_cpp.llama_model_load_from_file",
    ],
)
def test_another_door_is_seen(source: str) -> None:
    assert len(opened_beside_the_door(ast.parse(source))) == 1


TESTS = test_modules()


@pytest.mark.parametrize(
    ("folder", "source", "fault"),
    [
        ("engine", "from fwdllm.protocol.seeds import derive_seeds", "upward"),
        ("kernels", "import fwdllm.engine.errors", "upward"),
        ("kernels", "from fwdllm import engine", "upward"),
        ("protocol", "import fwdllm.tuning.run_directory", "upward"),
        ("protocol", "from fwdllm import RunDirectory", "upward"),
        ("app", "from fwdllm.bench import models", "upward"),
        ("app", "def f():\n    import fwdllm.bench", "upward"),
        ("app", "from fwdllm.bench.cli import app", "upward"),
        ("bench", "from toy_engine import ToyEngine", "the tests"),
        ("engine", "from tests import toy_engine", "the tests"),
        ("engine", "from .errors import ModelError", "relative"),
        ("engine", "import torch.nn", "module level"),
        ("app", "try:\n    import fastapi\nexcept ImportError:\n    pass", "module level"),
        ("kernels", "class A:\n    from triton import jit", "module level"),
        ("protocol", "import time", "imports time"),
        ("protocol", "def f():\n    from os import path", "imports os"),
        ("protocol", "def f():\n    open('x')", "calls open"),
        ("protocol", "x = np.random.default_rng()", "random"),
    ],
)
def test_each_rule_is_seen_to_be_broken(folder: str, source: str, fault: str) -> None:
    found = faults(folder, source, {"tests", "toy_engine"})
    assert len(found) == 1
    assert fault in found[0]


@pytest.mark.parametrize(
    ("folder", "source"),
    [
        (
            "app",
            "from fwdllm.protocol.local import train\nfrom fwdllm.tuning.tune import tune",
        ),
        ("protocol", "from fwdllm.engine.errors import ConfigError\nfrom fwdllm import kernels"),
        ("engine", "def f():\n    import torch"),
        ("engine", "if TYPE_CHECKING:\n    import torch"),
        ("engine", "import time, os"),
        ("bench", "import torch\nfrom fwdllm.tuning.run_directory import RunDirectory"),
    ],
)
def test_what_is_allowed_passes(folder: str, source: str) -> None:
    assert faults(folder, source, {"tests", "toy_engine"}) == []


def test_only_what_is_mounted_may_be_imported_upward() -> None:
    source = "from fwdllm.bench.cli import app, kernels"
    found = faults("app", source, set(), {"fwdllm.bench.cli.app"})
    assert found == ["imports upward: fwdllm.bench.cli.kernels"]


def test_no_modules_import_one_another_in_a_circle() -> None:
    graph = import_graph(modules())
    assert "fwdllm.engine.errors" in graph["fwdllm.protocol.wire"]
    assert circle(graph) == []


@pytest.mark.parametrize(
    "back",
    [
        "import fwdllm.a",
        "from fwdllm import a",
        "from fwdllm.a import f, g",
        "def f():\n    from fwdllm.a import g",
        "if TYPE_CHECKING:\n    from fwdllm.a import f",
    ],
)
def test_an_import_circle_is_seen(back: str) -> None:
    sources = {
        "fwdllm": "",
        "fwdllm.a": "from fwdllm.b import f",
        "fwdllm.b": "import os, fwdllm.c",
        "fwdllm.c": "import fwdllm",
    }
    assert circle(import_graph(sources)) == []
    sources["fwdllm.c"] = back
    graph = import_graph(sources)
    found = circle(graph)
    assert set(found) == {"fwdllm.a", "fwdllm.b", "fwdllm.c"}
    assert found[0] == found[-1]
    assert all(b in graph[a] for a, b in pairwise(found))
