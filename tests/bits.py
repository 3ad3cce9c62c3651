"""What short runs compute, to the bit: for changes that should change nothing.

Usage: python tests/bits.py OUT.json, before and after such a change, on one machine; the two files
are then equal. Every run is by the command line, whose options stay: adapters and ledgers by their
SHA-256, losses as they are printed. Bits differ between instruction sets.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

ASSETS = files("fwdllm") / "assets"
SHARED = Path(__file__).resolve().parents[2] / "shared"
MINILM = SHARED / "models" / "minilm-l6-v2.Q4_0.gguf"
TINYMIX = SHARED / "models" / "tinymix-6m.Q4_0.gguf"
SST2 = SHARED / "data" / "sst2.train.jsonl"

DECODER = "--steps 6 --batch-size 4 --rank 4 --lr 0.01 --held-out 6 --eval-every 3"
FORWARD = f"{DECODER} --method forward-ad -k 3"
ENCODER = "--steps 5 --batch-size 4 --held-out 8 --max-tokens 32"
FEDERATION = (
    "--rounds 2 --clients 8 --per-round 3 --rank 2 --alpha 4 --set batch_size=2 --set max_tokens=24"
)
# By name: which data, and the options. Differential privacy is left out: its noise is random.
TUNE = {
    "forward-ad": (DECODER, "-k 3 --method forward-ad"),
    "backprop": (DECODER, "--method backprop --max-gradient-norm 1"),
    "central": (DECODER, "-k 3 --method central"),
    "forward-difference": (DECODER, "-k 3 --method forward-difference"),
    "activation": (DECODER, "-k 3 --method activation --rank 1 --alpha 1"),
    "rademacher": (FORWARD, "--directions rademacher --optimizer yogi --eps 1e-8"),
    "lora-fa": (DECODER, "-k 3 --method forward-ad --directions lora-fa --optimizer momentum"),
    "lora-xs": (DECODER, "-k 3 --method forward-ad --directions lora-xs --schedule constant"),
    "subzero": (DECODER, "-k 3 --method forward-ad --directions subzero --dimension 3"),
    "sparse": (DECODER, "-k 3 --method forward-ad --directions sparse --keep 0.2"),
    "per-example": (DECODER, "-k 3 --method forward-ad --per-example --warmup 2"),
    "exact": (FORWARD, "--exact --layers 1-2 --targets attn_output,ffn_down"),
    "budget": (DECODER, "-k 3 --method forward-ad --memory-budget 200MiB"),
    "llama.cpp": (DECODER, "-k 3 --backend llama.cpp"),
    "encoder": (ENCODER, "-k 3 --method activation"),
    "encoder backprop": (ENCODER, "--method backprop --head-lr 0.1"),
    "encoder forward-ad": (ENCODER, "-k 3 --method forward-ad --head-lr 0.1"),
    "encoder central": (ENCODER, "-k 3 --method central"),
}
SIMULATE = {
    "fwdllm": "--set variance_threshold=0.001",
    "spry": "",
    "spry-epoch": "--set local_steps=2",
    "p-rge": "--set perturbations=2",
    "mezo": "",
    "fedkseed": "--set local_steps=3 --set pool_size=16",
    "fedkseed-pro": "--set local_steps=3 --set pool_size=16",
    "ferret": "--set local_steps=2 --set perturbations=64",
    "fedavg": "--set local_steps=2",
}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def start(arguments: Sequence[object]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fwdllm", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def run(*arguments: object) -> Any:
    process = start([*arguments, "--json"])
    out, _ = process.communicate()
    assert process.returncode == 0, arguments
    return json.loads(out)


def losses(result: dict[str, Any]) -> dict[str, Any]:
    names = ("loss_before", "loss_after", "accuracy_before", "accuracy_after")
    return {name: result[name] for name in names}


def of_ledger(path: Path) -> str:
    """All that clients and server said, and the adapter after every round."""
    told = hashlib.sha256()
    with sqlite3.connect(path) as database:
        for table in (
            "SELECT round, part, client, message FROM assignment ORDER BY 1, 2, 3",
            "SELECT round, part, client, message FROM contribution ORDER BY 1, 2, 3",
            "SELECT round, message, loss, theta FROM round ORDER BY 1",
            "SELECT * FROM evaluation ORDER BY 1",
        ):
            told.update(repr(database.execute(table).fetchall()).encode())
    return told.hexdigest()


def resumed(arguments: Sequence[object], run_dir: Path) -> None:
    """Stops the run after its first steps; what comes next goes on with it."""
    process = start(arguments)
    metrics = run_dir / "metrics.jsonl"
    while process.poll() is None:
        if metrics.exists() and metrics.read_text().count('"step"') >= 3:
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    process.wait()


def main(out: str) -> None:
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, as_file(ASSETS) as assets:
        folder = Path(name)
        bundled, pirate = assets / "fwdllm-tiny.gguf", assets / "pirate.train.jsonl"
        sst2 = folder / "sst2.jsonl"
        sst2.write_text("".join(SST2.read_text().splitlines(keepends=True)[:60]))
        for name, (base, options) in TUNE.items():
            model, data = (MINILM, sst2) if base is ENCODER else (bundled, pirate)
            adapter = folder / f"{name}.gguf"
            result = run("tune", model, data, "-o", adapter, *f"{base} {options}".split())
            found[f"tune {name}"] = {"adapter": digest(adapter), **losses(result)}
            found[f"eval {name}"] = run("eval", model, sst2 if model is MINILM else pirate,
                                        "--adapter", adapter, "--max-tokens", 24)  # fmt: skip
        adapter, run_dir = folder / "resumed.gguf", folder / "resumed"
        arguments = ["tune", bundled, pirate, "-o", adapter, *FORWARD.split(), "--run-dir", run_dir]
        arguments += ["--steps", 40]
        resumed(arguments, run_dir)
        result = run(*arguments, "--resume")
        found["tune resumed"] = {"adapter": digest(adapter), **losses(result)}
        adapter = folder / "peft"
        run("tune", TINYMIX, pirate, "-o", f"{adapter}/", *FORWARD.split())
        weights = adapter / "adapter_model.safetensors"
        found["tune tinymix to PEFT"] = {"adapter": digest(weights)}
        for name, options in SIMULATE.items():
            run_dir = folder / f"simulate-{name}"
            few = ["--eval", assets / "pirate.valid.jsonl"]
            result = run("simulate", bundled, pirate, "--run-dir", run_dir, "--preset", name,
                         *few, *f"{FEDERATION} {options}".split())  # fmt: skip
            adapter = run_dir / "adapter.gguf"
            ledger = of_ledger(run_dir / "ledger.sqlite")
            found[f"simulate {name}"] = {"adapter": digest(adapter), "ledger": ledger}
            found[f"simulate {name}"] |= losses(result)
        text = run("generate", bundled, "A cow", "--max-tokens", 20)
        found["generate"] = text["text"]
    Path(out).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("FWDLLM_NUM_THREADS", "2")
    main(*sys.argv[1:])
