"""``fwdllm demo``: teach the bundled model to answer like a pirate, in minutes on a laptop."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fwdllm.engine.settings import LoRAConfig
from fwdllm.inference import generate
from fwdllm.protocol.config import TrainConfig
from fwdllm.tuning.tune import Progress, TuneResult, tune

FOLDER = "demo-run"
ANSWER_TOKENS = 24


@dataclass(frozen=True)
class Demo:
    """The settings of the demo. question: asked before and after tuning."""

    lora: LoRAConfig
    train: TrainConfig
    question: str


DEMO = Demo(
    lora=LoRAConfig(rank=2, alpha=4.0),
    train=TrainConfig(
        steps=1000,
        batch_size=8,
        perturbations=16,
        optimizer="momentum",
        learning_rate=2e-3,
        warmup=20,
        eval_every=100,
    ),
    question="What does a cow say?",
)


@dataclass(frozen=True)
class DemoResult:
    """base, tuned: the answers to ``question`` before and after.  plot: the loss curve."""

    tuning: TuneResult
    question: str
    base: str
    tuned: str
    plot: Path


def asset(name: str) -> Path:
    """A file of the package: fwdllm-tiny.gguf, pirate.train.jsonl or pirate.valid.jsonl."""
    return Path(str(resources.files("fwdllm") / "assets" / name))


def run_demo(
    folder: Path | None = None,
    settings: Demo | None = None,
    on_event: Callable[[Progress], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DemoResult:
    """Tune the bundled model on the bundled data and ask it a question before and after.

    folder: where the run and adapter.gguf are written; None: demo-run, or demo-run-2, ... if that
    exists.  settings: None: ``DEMO``.  on_event, should_stop, errors: as ``tune``.
    """
    settings = settings or DEMO
    folder = folder or _new_folder()
    folder.mkdir(parents=True, exist_ok=True)
    model = asset("fwdllm-tiny.gguf")
    result = tune(
        model,
        asset("pirate.train.jsonl"),
        folder / "adapter.gguf",
        lora=settings.lora,
        train=settings.train,
        eval_data=asset("pirate.valid.jsonl"),
        run_dir=folder,
        on_event=on_event,
        should_stop=should_stop,
    )
    base, tuned = (
        "".join(
            generate(model, settings.question, adapter=adapter, chat=True, max_tokens=ANSWER_TOKENS)
        ).strip()
        for adapter in (None, result.adapter)
    )
    return DemoResult(result, settings.question, base, tuned, folder / "plot.png")


def _new_folder() -> Path:
    names = itertools.chain([FOLDER], (f"{FOLDER}-{n}" for n in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())
