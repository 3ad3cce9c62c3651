"""What people do with a model and an adapter: each command as a function for a child."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

from fwdllm.cli.commands import main
from fwdllm.cli.console import explain

SECONDS = 20.0
MEMORY = 2 << 30  # beyond the model's size

Work = Callable[[], int]


def warm() -> None:
    """Import all that commands use, and compute nothing."""
    import fastapi.testclient  # noqa: F401
    import matplotlib.pyplot  # noqa: F401

    import fwdllm.http.application
    import fwdllm.inspect
    import fwdllm.merging
    import fwdllm.tuning.recipes
    import fwdllm.tuning.tune

    # Draws what no model's file has a part in, for longer than all else takes.
    fwdllm.tuning.run_directory.RunDirectory.plot = lambda self: self.path / "plot.png"  # type: ignore[method-assign]


def of_model(folder: Path) -> dict[str, Work]:
    """The commands for a folder's model.gguf, each into ``folder / "out"``."""
    model, data, out = folder / "model.gguf", folder / "data.jsonl", folder / "out"
    adapter = folder / "adapter.gguf"
    labelled = b'"label"' in data.read_bytes()  # then the adapter has the head
    return {
        "inspect": _command("inspect", model),
        "eval": _command(
            "eval", model, data, "--max-tokens", 24, *(("--adapter", adapter) * labelled)
        ),
        "tune": _command("tune", model, data, "-o", out / "tuned.gguf", *_ONE_STEP),
        "generate": _command("generate", model, "Once upon a time", "--max-tokens", 4),
        "export": _command("export", adapter, out / "merged.gguf", "--model", model, "--merge"),
        "serve": lambda: serve(model, out / "state"),
    }


def of_adapter(folder: Path) -> dict[str, Work]:
    """The commands for a folder's adapter.gguf, or folder peft, with its sound model.gguf."""
    model, data, out = folder / "model.gguf", folder / "data.jsonl", folder / "out"
    peft = (folder / "peft").is_dir()
    adapter = folder / ("peft" if peft else "adapter.gguf")
    with_it = ("--adapter", adapter)
    other = out / ("other.gguf" if peft else "other/")
    return {
        "eval": _command("eval", model, data, "--max-tokens", 24, *with_it),
        "generate": _command("generate", model, "Once upon a time", "--max-tokens", 4, *with_it),
        "export": _command("export", adapter, other, "--model", model),
        "merge": _command("export", adapter, out / "merged.gguf", "--model", model, "--merge"),
        "serve": lambda: serve(model, out / "state", adapter),
    }


_ONE_STEP = ("--steps", 1, "--batch-size", 2, "--held-out", 1, "--rank", 2, "--max-tokens", 24)


def _command(*arguments: object) -> Work:
    def work() -> int:
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as ended:
            return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        return 0

    return work


def serve(model: Path, state: Path, adapter: Path | None = None) -> int:
    """Load a model as the server does and ask it once for each thing.

    Returns what the command would: 2 if it cannot be served. An answer of 500 counts so too, if it
    is a sentence about the model; one of a bug has its traceback printed.
    """
    from fastapi.testclient import TestClient

    from fwdllm.http.application import ServerConfig, application

    given = () if adapter is None else ((None, adapter),)
    config = ServerConfig(model, state, memory_budget=1 << 30, context=64, adapters=given)
    try:
        with application(config) as app, TestClient(app, base_url="http://127.0.0.1") as client:
            return max(_ask(client, *request) for request in REQUESTS)
    except Exception as error:
        if (sentence := explain(error)) is None:
            traceback.print_exc()
            return 1
        print(f"fwdllm: {sentence}")
        return 2


REQUESTS: Sequence[tuple[str, object]] = [
    ("/v1/completions", {"prompt": "Once upon", "max_tokens": 4, "temperature": 0}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}),
    ("/v1/embeddings", {"input": "Once upon a time"}),
]


def _ask(client: object, path: str, body: object) -> int:
    answer = client.post(path, json=body)  # type: ignore[attr-defined]
    print(path, answer.status_code, json.dumps(answer.json())[:200])
    return 0 if answer.status_code < 500 else 2
