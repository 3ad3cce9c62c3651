"""``make bench-gpu``: all there is to measure on a GPU, in one run of a few minutes.

Runs from the sources on a machine with torch, triton and NumPy; nothing is installed or built. If
transformers and PEFT are installed, their steps are measured too, as peers. Writes bench-gpu.json,
and the same as tables to bench-gpu.md, after each part; a part that fails is recorded as failed.

Under TRITON_INTERPRET=1, use --small: it shows on a CPU that all parts work.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
import types
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "fwdllm": "app/fwdllm",
    "fwdllm.kernels": "kernels",
    "fwdllm.engine": "engine",
    "fwdllm.bench": "bench",
}
PARTS = ("checks", "kernels", "recording", "step", "peers")


def use_sources() -> None:
    """Make fwdllm importable from the repository, without running its packages' __init__.py."""
    # This folder is on sys.path, and transformers would import kernels.py as the package "kernels".
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "bench"]
    for name, folder in PACKAGES.items():
        module = types.ModuleType(name)
        module.__path__ = [str(ROOT / folder)]
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)


def measure(
    small: bool,
    rounds: int,
    only: Sequence[str],
    files: Sequence[Path],
    keep: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Run the parts ``only`` in turn. files: models whose recording is measured besides.

    keep: called with the result so far after each part.
    """
    from fwdllm.bench import gpu_checks, gpu_kernels, gpu_peers, gpu_step
    from fwdllm.bench.shapes import SHAPES, Shape
    from fwdllm.engine.settings import LoRAConfig
    from fwdllm.kernels.triton.runtime import DEVICE
    from fwdllm.kernels.types import QuantType

    result: dict[str, Any] = {"machine": gpu_kernels.machine(), "seconds": {}}
    shape = Shape(1, 64, 2, 1, 32, 64, 128) if small else SHAPES["llama-7b"]
    kinds: Sequence[QuantType] = gpu_kernels.DEFAULT_TYPES
    rows: Sequence[int] = gpu_kernels.DEFAULT_ROWS
    sizes = gpu_kernels.Sizes()
    examples, tokens, perturbations = 8, 256, 16
    if small:
        kinds, rows = (QuantType.Q4_0,), (4,)
        sizes = gpu_kernels.Sizes(64, 64, 64, 2, 32, 4, 2, 1, 2, 4, 128, 4096, 2, 64, 4096, 2)
        examples, tokens, perturbations = 1, 5, 2
    lora = LoRAConfig(rank=sizes.rank)

    @cache
    def large() -> gpu_step.StepModel:
        return gpu_step.StepModel.make(shape, QuantType.Q4_0, lora)

    def step() -> dict[str, Any]:
        _, batch = gpu_step.random_batch(shape.n_vocab, examples, tokens)
        return gpu_step.measure_gpu_step(large(), batch, perturbations, rounds, _say)

    def recording() -> dict[str, Any]:
        names = {"random": shape} if small else {n: SHAPES[n] for n in ("tiny", "tinyllama-1.1b")}
        models = {
            n: partial(gpu_step.StepModel.make, s, QuantType.Q4_0, lora) for n, s in names.items()
        }
        models |= {path.name: partial(gpu_step.StepModel.open, path, lora) for path in files}
        found: dict[str, Any] = {}
        for name, make in models.items():
            model = make()
            _, batch = gpu_step.random_batch(
                model.args.n_vocab, 1 if small else 8, tokens if small else 32
            )
            sides = gpu_step.measure_recording(model, batch, 2 if small else 8, rounds)
            found |= {f"{name}, {side}": value for side, value in sides.items()}
        return found

    def peers() -> dict[str, Any]:
        import torch

        ids, _ = gpu_step.random_batch(shape.n_vocab, examples, tokens)
        peer = gpu_step.peer_model(large())
        there = torch.from_numpy(ids).to(DEVICE)
        return gpu_peers.measure_peers(peer, there, perturbations, rounds, DEVICE.type)

    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "checks": lambda: gpu_checks.check(small),
        "kernels": lambda: gpu_kernels.measure_gpu_kernels(
            kinds, rows, 2 * rounds + 1, _say, sizes
        ),
        "recording": recording,
        "step": step,
        "peers": peers,
    }
    for name in only:
        part = parts[name]
        start = time.perf_counter()
        try:
            result[name] = part()
        except Exception as error:
            traceback.print_exc()
            result[name] = {"failed": f"{type(error).__name__}: {error}"[:300]}
        result["seconds"][name] = time.perf_counter() - start
        _say(f"{name}: {result['seconds'][name]:.0f} s")
        keep(result)
    return result


def _say(line: str) -> None:
    print(line, flush=True)


def tables(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    machine = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    lines = ["# GPU benchmark", "", machine, ""]
    for name in PARTS:
        found = result.get(name)
        if found is None:
            continue
        lines += [f"## {name} ({result['seconds'][name]:.0f} s)", ""]
        if "failed" in found:
            lines += [f"Failed: {found['failed']}", ""]
        elif name == "kernels":
            lines += _kernel_table(found)
        elif name == "checks":
            lines += ["| check | found | wanted | |", "| --- | ---: | ---: | --- |"]
            for check, entry in found.items():
                verdict = "holds" if entry["holds"] else "DOES NOT HOLD"
                lines.append(f"| {check} | {entry['found']:.3g} | {entry['wanted']} | {verdict} |")
            lines.append("")
        else:
            lines += _step_table(found)
    return "\n".join(lines)


def _kernel_table(found: dict[str, Any]) -> list[str]:
    [(device, kernels)] = found["kernels"].items()
    peaks = ", ".join(f"{name} {rate:,.0f}" for name, rate in found["peaks"][device].items())
    lines = [f"Limits of the card, measured in this run, in 10^9/s: {peaks}", ""]
    lines += [
        "| kernel | rate | | of | fraction | overhead |",
        "| --- | ---: | --- | --- | ---: | ---: |",
    ]
    for name, entry in kernels.items():
        fraction = f"{entry['fraction']:.1%}" if "fraction" in entry else ""
        overhead = f"{entry['overhead']:+.1%}" if "overhead" in entry else ""
        lines.append(
            f"| {name} | {entry['rate']:,.1f} | {entry['unit']} | {entry.get('of', '')} | "
            f"{fraction} | {overhead} |"
        )
    return [*lines, ""]


def _step_table(found: dict[str, Any]) -> list[str]:
    lines = ["| side | seconds | range | peak GiB | loss |", "| --- | ---: | --- | ---: | ---: |"]
    for side, entry in found.items():
        if not isinstance(entry, dict):
            continue
        if "seconds" in entry:
            low, high = entry["seconds_range"]
            peak = entry.get("peak_bytes")
            shown = f"{peak / 2**30:.2f}" if peak else ""
            loss = f"{entry['loss']:.4f}" if "loss" in entry else ""
            lines.append(
                f"| {side} | {entry['seconds']:.3f} | {low:.3f} to {high:.3f} | {shown} | {loss} |"
            )
        elif "skipped" in entry:
            lines.append(f"| {side} | {entry['skipped']} | | | |")
    return [*lines, ""]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the two files")
    parser.add_argument("--rounds", type=int, default=5, help="times a step is measured")
    parser.add_argument(
        "--parts", type=lambda text: text.split(","), default=PARTS, help="those to run, in order"
    )
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        default=[],
        help="a GGUF file whose recorded passes are measured too; takes the gguf package",
    )
    parser.add_argument("--small", action="store_true", help="tiny inputs, to try the benchmark")
    parser.add_argument(
        "--draw",
        type=Path,
        nargs=2,
        metavar=("JSON", "PNG"),
        help="measure nothing: draw the steps and peers of a bench-gpu.json; takes matplotlib",
    )
    options = parser.parse_args(arguments)
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; these are: {', '.join(PARTS)}")
    use_sources()
    if options.draw:
        from fwdllm.bench.pictures import gpu_steps

        measured, picture = options.draw
        gpu_steps(json.loads(measured.read_text(encoding="utf-8")), picture)
        return 0
    from fwdllm.kernels.triton.runtime import usable

    if not usable():
        print("bench-gpu needs an NVIDIA GPU that PyTorch can use: there is none", file=sys.stderr)
        return 2

    def keep(result: dict[str, Any]) -> None:
        for name, text in (("json", json.dumps(result, indent=1)), ("md", tables(result))):
            path = options.out / f"bench-gpu.{name}"
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text + "\n", encoding="utf-8")
            temporary.replace(path)

    result = measure(options.small, options.rounds, options.parts, options.model, keep)
    print(tables(result))
    failed = any("failed" in result[name] for name in options.parts)
    return int(failed or not all(check["holds"] for check in result.get("checks", {}).values()))


if __name__ == "__main__":
    sys.exit(main())
