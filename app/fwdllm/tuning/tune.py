"""``tune``: a model and a data set in, an adapter out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias, cast

from fwdllm.adapters import check_output, is_peft, write_adapter
from fwdllm.engine.backends import Backend, choose
from fwdllm.engine.data.jsonl import (
    Data,
    Example,
    check_labels,
    hold_out,
    labels_of,
    read_data,
    split,
)
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.estimators.plan import n_lanes
from fwdllm.engine.evaluation import Evaluation
from fwdllm.engine.files import fingerprint
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.engine.settings import EXACT_METHODS, METHODS, DirectionsConfig, LoRAConfig
from fwdllm.hub import local_path
from fwdllm.protocol.config import AUTO, TrainConfig
from fwdllm.protocol.local import Event, StepResult, n_trained
from fwdllm.resources import peak_rss_bytes
from fwdllm.tuning.recipes import recipe_for
from fwdllm.tuning.run_directory import RunDirectory, recorded_start, train_recorded

# By default a tenth of the data is held out, at most this many examples.
MOST_HELD_OUT = 200

# Examples tokenized together when the data is checked: bounds memory, costs nothing.
_CHECK_AT_ONCE = 1000
# Examples used to choose a mask of parameters; means over their tokens converge with fewer.
_MASK_EXAMPLES = 32

_Path = str | os.PathLike[str]


@dataclass(frozen=True)
class Started:
    """Everything is read and checked; training begins.

    step: updates done before, 0 unless resumed.  steps: updates in all.  step_tokens: that a step
    forwards, about; a token counts once in every lane.  damaged: checkpoints that a resumed run
    skipped.  engine: the one being tuned; its adapter may be read at every event.
    """

    step: int
    steps: int
    method: str
    n_trainable: int
    n_examples: int
    n_held_out: int
    step_tokens: int
    damaged: tuple[Path, ...]
    engine: Engine = field(repr=False)


Progress: TypeAlias = Started | Event


@dataclass(frozen=True)
class TuneResult:
    """The result of a run.

    loss_before, loss_after: held-out loss in nats.  accuracy_before, accuracy_after: None without
    labels.  steps: updates in all.  seconds, tokens_per_s: of this process, without what a resumed
    run did before; a token counts once in every lane.  adapter: the file or folder written.
    stopped_early: whether ``should_stop`` ended the run.  n_trainable: number of trained values.
    """

    loss_before: float
    loss_after: float
    steps: int
    seconds: float
    adapter: Path
    peak_rss_bytes: int
    accuracy_before: float | None
    accuracy_after: float | None
    run_dir: Path
    tokens_per_s: float
    stopped_early: bool
    n_trainable: int


def tune(
    model: _Path,
    data: _Path | Data,
    output: _Path = "adapter.gguf",
    *,
    lora: LoRAConfig | None = None,
    train: TrainConfig | None = None,
    directions: DirectionsConfig | None = None,
    eval_data: _Path | None = None,
    held_out: float | None = None,
    run_dir: _Path | None = None,
    resume: bool = False,
    exact: bool = False,
    device: str = "cpu",
    backend: str = "auto",
    memory_budget: int | None = None,
    on_event: Callable[[Progress], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TuneResult:
    """Tune a LoRA adapter, by exact gradients or with forward passes only.

    model: a GGUF file, or hf://owner/repo/file.gguf.  data: JSONL, see ``engine.data.jsonl``.
    output: NAME.gguf for a GGUF LoRA file, NAME or NAME/ for a PEFT folder.
    lora, train: shape of the adapter and settings of the run; None: what ``recipe`` gives for the
    model, the data and train's method. An eval_every of 0 evaluates before the first step and after
    the last.  directions: what perturbs the adapter; None: ``DirectionsConfig()``.
    eval_data: JSONL to evaluate on.  held_out: the share (float) or number (int) of examples of
    ``data`` to evaluate on if there is no eval_data; None: a tenth, at most 200.
    run_dir: for checkpoints, metrics and plot; None: NAME.run beside ``output``.
    resume: continue the run in run_dir; the adapter is the same as without the interruption. Model,
    data and settings must be the same.  exact: fp32 arithmetic.  device: "cpu", or "cuda" for an
    NVIDIA GPU, which rounds differently.  backend: "auto", "fwdllm" or "llama.cpp", see
    ``Engine.load``.
    memory_budget: bytes to stay within on the CPU, see ``Engine.load``; it does not change the
    adapter, so it may differ in a resumed run.
    on_event: called with ``Started`` and then every event of ``protocol.local.train``.
    should_stop: called after each event; once true, the state is saved and the adapter so far is
    written.

    Errors: any FwdllmError; OSError. A run that fails before its first step leaves no files. A run
    that fails later leaves no adapter, but can be resumed.
    """
    began = time.perf_counter()
    check_output(output)
    path, folder = local_path(model), default_run_dir(output) if run_dir is None else Path(run_dir)
    chosen = choose(GGUFFile.open(path), backend)
    given = read_data(data)
    if lora is None or train is None or train.method == AUTO:
        n_labels = len(labels_of(given.examples))
        shape = () if lora is None else ("targets", "layers")
        defaults = recipe_for(chosen, n_labels, train.method if train else AUTO, shape)
        lora, train = lora or defaults.lora, train or defaults.train
        train = dataclasses.replace(train, method=defaults.train.method)
    train = dataclasses.replace(train, eval_every=train.eval_every or train.steps)
    task = _prepare(
        path,
        chosen,
        backend,
        given,
        recorded_start(folder) if resume else datetime.now(),
        lora,
        train,
        directions or DirectionsConfig(),
        eval_data,
        held_out,
        exact,
        device,
        memory_budget,
    )
    if should_stop():  # nothing is worth saving yet
        raise KeyboardInterrupt
    with RunDirectory(folder, task.settings, resume=resume) as run:
        work = _follow(run, task, on_event, should_stop)
        # Before any further evaluation, so that a second interrupt does not lose the adapter.
        adapter = write_adapter(task.engine, output)
        after = _evaluation(run, task, work.step) or task.evaluate(task.engine)
        before = _evaluation(run, task, 0) or task.evaluate(task.new_engine())
    return TuneResult(
        loss_before=before.loss,
        loss_after=after.loss,
        steps=work.step,
        seconds=time.perf_counter() - began,
        adapter=adapter,
        peak_rss_bytes=peak_rss_bytes(),
        accuracy_before=before.accuracy,
        accuracy_after=after.accuracy,
        run_dir=folder,
        tokens_per_s=work.n_tokens / work.seconds if work.seconds else 0.0,
        stopped_early=work.step < train.steps,
        n_trainable=n_trained(task.engine),
    )


def default_run_dir(output: _Path) -> Path:
    """NAME.run beside the adapter NAME.gguf or NAME/."""
    path = Path(output)
    return path.with_name((path.name if is_peft(output) else path.stem) + ".run")


@dataclass(frozen=True)
class _Task:
    """The inputs of a run.

    n_rows: tokens of all examples.  settings: everything its numbers depend on, as JSON values.
    """

    new_engine: Callable[[], Engine]
    engine: Engine
    train: TrainConfig
    examples: Sequence[Example]
    held_out: Sequence[Example]
    n_rows: int
    settings: dict[str, Any]

    @property
    def step_tokens(self) -> int:
        """See ``Started``."""
        train = self.train
        lanes = n_lanes(train.method, train.perturbations) if train.method in METHODS else 1
        return round(lanes * train.batch_size * self.n_rows / len(self.examples))

    def evaluate(self, engine: Engine) -> Evaluation:
        return engine.evaluate(self.held_out, self.train.max_tokens)


def _prepare(
    path: Path,
    chosen: Backend,
    backend: str,
    given: Data,
    started: datetime | None,
    lora: LoRAConfig,
    train: TrainConfig,
    directions: DirectionsConfig,
    eval_data: _Path | None,
    held_out: float | None,
    exact: bool,
    device: str,
    memory_budget: int | None,
) -> _Task:
    """Check everything first, so that a bad example cannot end a run after hours.

    started: the time that a chat template is told, None for the clock's.
    """
    if eval_data is not None and held_out is not None:
        raise ConfigError("give either a file to evaluate on or a share to hold out, not both")
    everything: Sequence[Example] = given.examples
    labels, split_by = labels_of(everything), cast("float | str | None", held_out)
    if eval_data is not None:
        examples = everything
        other = read_data(eval_data)
        kept, split_by = other.examples, other.digest
    elif held_out is None:
        examples, kept = hold_out(everything, train.seed, MOST_HELD_OUT)
    else:
        examples, kept = split(everything, held_out, train.seed)
    if labels:
        check_labels(kept, labels)
    chosen.check_method(train.method)

    def new_engine() -> Engine:
        engine = Engine.load(
            path,
            lora,
            labels=labels,
            literal=train.literal,
            seed=train.seed,
            exact=exact,
            memory_budget=memory_budget,
            device=device,
            backend=backend,
        )
        engine.tokenizer.chat.now = started
        return engine

    engine = new_engine()
    engine.check_method(train.method)
    examples, kept = engine.separate(examples), engine.separate(kept)
    n_rows, _ = (
        sum(
            engine.encode(part[start : start + _CHECK_AT_ONCE], train.max_tokens).n_rows
            for start in range(0, len(part), _CHECK_AT_ONCE)
        )
        for part in (examples, kept)
    )
    if train.method == "activation":
        if directions.kind != DirectionsConfig.kind:
            raise ConfigError(
                f"activation perturbs no weights, so {directions.kind} has no meaning"
            )
        engine.use_activations(directions.scope)
    elif train.method in EXACT_METHODS and directions.kind == "rademacher":
        raise ConfigError(
            f"method {train.method} draws no directions, so rademacher has no meaning"
        )
    else:
        engine.use_directions(directions, train.seed, examples[:_MASK_EXAMPLES])
    settings = {
        "model": {
            "name": engine.file.name,
            **fingerprint(*engine.file.paths),
        },
        "data": given.digest,
        "held_out": split_by,
        "lora": dataclasses.asdict(lora),
        "train": train.recorded(),
        "directions": dataclasses.asdict(directions),
        "exact": exact,
        "device": device,
        "backend": chosen.name,
        "started": started and started.isoformat(timespec="seconds"),
    }
    return _Task(new_engine, engine, train, examples, kept, n_rows, settings)


@dataclass
class _Work:
    """Progress of a run.

    step: updates in all.  n_tokens, seconds: of the updates made in this process; a token counts
    once in every lane.
    """

    step: int
    n_tokens: int = 0
    seconds: float = 0.0


def _follow(
    run: RunDirectory,
    task: _Task,
    on_event: Callable[[Progress], None],
    should_stop: Callable[[], bool],
) -> _Work:
    """Train to the end, or until asked to stop."""
    train = task.train
    step = 0 if run.checkpoint is None else run.checkpoint.step
    started = Started(
        step,
        train.steps,
        train.method,
        n_trained(task.engine),
        len(task.examples),
        len(task.held_out),
        task.step_tokens,
        tuple(run.damaged),
        task.engine,
    )
    work = _Work(step)
    try:
        on_event(started)
        clock = time.perf_counter()
        for event in train_recorded(
            run, task.engine, train, task.examples, task.held_out, should_stop
        ):
            if isinstance(event, StepResult):
                work.step = event.step
                work.n_tokens += event.n_tokens
                work.seconds += time.perf_counter() - clock
            on_event(event)
            clock = time.perf_counter()
    except BaseException:
        if work.step == 0 and not run.damaged:  # there is nothing to resume
            with contextlib.suppress(ConfigError):
                run.check()
                shutil.rmtree(run.path, ignore_errors=True)
        raise
    return work


def _evaluation(run: RunDirectory, task: _Task, step: int) -> Evaluation | None:
    """The evaluation after ``step`` updates, if the run has recorded it."""
    for record in reversed(run.metrics()):
        if record["event"] == "eval" and record["step"] == step:
            fields = dataclasses.fields(Evaluation)
            return Evaluation(**{field.name: record[field.name] for field in fields})
    return None
