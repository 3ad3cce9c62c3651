"""What is in a model file, which layers can be tuned, and how much memory that takes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from fwdllm.engine.adapters.adapter import by_layer, layout
from fwdllm.engine.backends import choose
from fwdllm.engine.engine import Engine
from fwdllm.engine.estimators.plan import n_lanes
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.llamacpp.native import open_model
from fwdllm.engine.memory.plan import VALUE_BYTES, estimate_gradient, estimate_step
from fwdllm.hub import local_path
from fwdllm.kernels.types import SUPPORTED_TYPES, QuantType
from fwdllm.tuning.recipes import recipe_for

# The step whose memory is shown: the defaults of ``fwdllm tune`` on examples of this many tokens.
TOKENS = 64

_FLOAT_TYPES = (QuantType.F32, QuantType.F16, QuantType.BF16)


def inspect_model(model: str | os.PathLike[str]) -> dict[str, Any]:
    """A report on a GGUF file as JSON values. A file that tuning would refuse is refused.

    Of the file only the header, the vocabulary and small vectors are read.

    architecture, name, file, file_bytes, n_parameters: of the model.  backend: what runs the model,
    "fwdllm" or "llama.cpp".  reason: why the backend is llama.cpp, else None.  shapes: layers,
    width, heads, kv_heads, head_dim, hidden, vocab, context.  tensor_types: for each type its name,
    count, bytes, and whether this package has kernels for it.  targets: for each tunable linear
    layer its name, shape (n_out, n_in) and the number of blocks that have it.  n_trainable:
    parameters of a default adapter (an encoder's for two labels), without a head.  step_memory:
    bytes of a step that goes forward only by purpose, see ``estimate_step``, and gradient_memory
    of one that comes back, see ``estimate_gradient``; None where llama.cpp decides.  step: what
    that step is.

    Errors: ModelError for a damaged file.
    """
    file = GGUFFile.open(local_path(model))
    backend = choose(file)
    if backend.own:
        Engine(file)
    else:
        open_model(file.path, vocab_only=False, header_only=True)
    args, linear = backend.args, backend.linear
    types = _tensor_types(file)
    lora, train = recipe_for(backend, n_labels=2)
    n_trainable = sum(target.size(lora.rank) for target in layout(linear, lora))
    # What goes forward only, beside what comes back.
    forward = recipe_for(backend, 2, backend.method).train
    lanes = n_lanes(forward.method, forward.perturbations)
    sizes: dict[str, Any] = {
        "weight_bytes": sum(entry["bytes"] for entry in types),
        "n_trainable": n_trainable,
        "n_rows": train.batch_size * TOKENS,
        "longest": TOKENS,
        "encoder": backend.encoder,
    }
    return {
        "architecture": backend.architecture,
        "backend": backend.name,
        "reason": backend.reason,
        "name": file.name,
        "file": str(file.path),
        "file_bytes": file.nbytes,
        "n_parameters": sum(_size(tensor.shape) for tensor in file.tensors.values()),
        "shapes": {
            "layers": args.n_layers,
            "width": args.width,
            "heads": args.n_heads,
            "kv_heads": args.n_kv_heads,
            "head_dim": args.head_dim,
            "hidden": args.hidden,
            "vocab": args.n_vocab,
            "context": args.context,
        },
        "tensor_types": types,
        "targets": _targets(linear),
        "n_trainable": n_trainable,
        "step": {"batch_size": train.batch_size, "tokens": TOKENS, "lanes": lanes},
        "step_memory": estimate_step(
            args,
            **sizes,
            n_lanes=lanes,
            int8=any(file.tensors[f"{name}.weight"].type not in _FLOAT_TYPES for name in linear),
        )
        if backend.own
        else None,
        "gradient_memory": estimate_gradient(args, **sizes) if backend.own else None,
    }


def _tensor_types(file: GGUFFile) -> list[dict[str, Any]]:
    types: dict[int, dict[str, Any]] = {}
    for tensor in file.tensors.values():
        supported = tensor.type in SUPPORTED_TYPES
        new = {"type": tensor.type.name, "count": 0, "bytes": 0, "supported": supported}
        entry = types.setdefault(tensor.type, new)
        entry["count"] += 1
        entry["bytes"] += tensor.nbytes
    return sorted(types.values(), key=lambda entry: -int(entry["bytes"]))


def _targets(linear: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    targets: dict[tuple[str, tuple[int, int]], int] = {}
    for block in by_layer(linear).values():
        for key in block.items():
            targets[key] = targets.get(key, 0) + 1
    return [
        {"name": name, "n_out": shape[0], "n_in": shape[1], "layers": count}
        for (name, shape), count in targets.items()
    ]


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def render(report: Mapping[str, Any]) -> RenderableType:
    """The report of ``inspect_model`` as text for the terminal."""
    shapes, step = report["shapes"], report["step"]
    facts = _table()
    facts.add_row("architecture", report["architecture"])
    why = f": {report['reason']}" if report["reason"] else ""
    facts.add_row("computed by", f"{report['backend']}{why}")
    facts.add_row("name", report["name"] or "")
    facts.add_row("file", f"{report['file']} ({megabytes(report['file_bytes'])})")
    facts.add_row("parameters", f"{report['n_parameters']:,}")
    facts.add_row("shapes", ", ".join(f"{key} {value:,}" for key, value in shapes.items()))
    facts.add_row("default adapter", f"{report['n_trainable']:,} parameters")
    types = _table("tensor type", "tensors", "size", "")
    for entry in report["tensor_types"]:
        note = "" if entry["supported"] else "no kernels here"
        types.add_row(entry["type"], str(entry["count"]), megabytes(entry["bytes"]), note)
    targets = _table("tunable", "out x in", "layers")
    for target in report["targets"]:
        shape = f"{target['n_out']} x {target['n_in']}"
        targets.add_row(target["name"], shape, str(target["layers"]))
    if report["step_memory"] is None:
        return Group(facts, "", types, "", targets)
    size = f"a step of {step['batch_size']} x {step['tokens']} tokens"
    titles = {
        "gradient_memory": f"{size}, forward and back (up to {megabytes(VALUE_BYTES)} more "
        "without a budget, for speed)",
        "step_memory": f"{size}, {step['lanes']} lanes forward",
    }
    shown: list[RenderableType] = [facts, "", types, "", targets]
    for key, title in titles.items():
        memory = _table(title, "memory")
        for purpose, n_bytes in report[key].items():
            memory.add_row(purpose.replace("_", " "), megabytes(n_bytes))
        shown += ["", memory]
    return Group(*shown)


def megabytes(n_bytes: int) -> str:
    """Bytes as text in units of 10^6."""
    return f"{n_bytes / 1e6:,.1f} MB"


def _table(*columns: str) -> Table:
    table = Table(box=None, show_header=bool(columns), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table
