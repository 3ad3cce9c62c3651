"""Clients as people have them, each really run against the server, in its own language.

``make clients`` installs them at the versions that docs/server.md tells of.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_runs import TRAIN
from serving import NAME, Server

CLIENTS = Path(__file__).parent / "clients"
DOCUMENT = Path(__file__).parents[2] / "docs/server.md"
PYTHON = CLIENTS / ".venv/bin/python"
MODULES = CLIENTS / "node_modules"

# The scripts and how their clients are called in the document.
SCRIPTS = {
    "client_openai.mjs": "openai (npm)",
    "client_ai.mjs": "ai (npm)",
    "client_langchain.py": "langchain-openai",
    "client_litellm.py": "litellm",
    "client_llama_index.py": "llama-index-llms-openai-like",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("clients") / "state") as running:
        yield running


def told() -> dict[str, tuple[str, str]]:
    """Versions and what was tried, by client, of the document's table."""
    table = DOCUMENT.read_text().split("### Clients")[1].split("###")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \|$", table, re.MULTILINE)
    return {name: (number, tried) for name, number, tried in rows[2:]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_client_does_what_the_document_says(server: Server, script: str) -> None:
    if script.endswith(".py"):
        program, found = str(PYTHON), PYTHON.exists()
    else:
        program, found = shutil.which("node") or "", MODULES.exists()
    if not (program and found):
        pytest.skip("the clients are not installed; `make clients` does it")
    command = [program, script, f"{server.url}/v1", NAME]
    if "DATA" in (CLIENTS / script).read_text().splitlines()[0]:
        command.append(str(TRAIN))
    direct = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "LITELLM_LOCAL_MODEL_COST_MAP": "1"}
    run = subprocess.run(
        command,
        cwd=CLIENTS,
        env={**os.environ, **direct},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # litellm's threads may write more behind it.
    [line] = [line for line in run.stdout.splitlines() if line.startswith('{"version"')]
    said = json.loads(line)
    assert told()[SCRIPTS[script]] == (said["version"], ", ".join(said["tried"]))


def test_the_document_tells_of_every_client_and_of_the_pinned_versions() -> None:
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (CLIENTS / "requirements.txt").read_text(), re.M))
    packages = json.loads((CLIENTS / "package.json").read_text())["dependencies"]
    pins |= {f"{name} (npm)": number for name, number in packages.items()}
    found = {name: number for name, (number, _) in told().items()}
    assert set(found) == {*SCRIPTS.values(), "openai"}
    assert {name: pins[name] for name in SCRIPTS.values()} == {
        name: found[name] for name in SCRIPTS.values()
    }
