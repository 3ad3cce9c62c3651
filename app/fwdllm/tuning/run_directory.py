"""A run on disk: its configuration, metrics, checkpoints and plot, safe against kill -9.

- config.json: everything that the run's numbers depend on
- metrics.jsonl: one line per update and per evaluation
- checkpoints/step-N.npz: the last two states
- plot.png: loss and held-out loss over steps
- lock: held while a process uses the directory
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import atomic_write, check_still_there, identity, is_unused, lock
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import (
    CheckpointDue,
    Event,
    StepResult,
    TrainingEngine,
    TrainState,
    train,
)
from fwdllm.protocol.records import difference
from fwdllm.resources import rss_bytes
from fwdllm.tuning import checkpoints

# Settings that earlier versions did not record, with the only value they supported.
_UNRECORDED = {"device": "cpu", "backend": "fwdllm", "started": None}
_UNRECORDED_OF: dict[str, dict[str, Any]] = {
    "train": {"max_gradient_norm": None, "literal": True},
    "directions": {"reselect": 40},
}


def recorded_start(path: Path) -> datetime | None:
    """When the run in a directory began, None if it does not say; other faults are for ``open``."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        return datetime.fromisoformat(config["started"])
    return None


class RunDirectory:
    """An open run directory, held exclusively until ``close``. Use as a context manager.

    path: the directory.  checkpoint: the state to resume from, or None to start afresh.
    damaged: damaged checkpoint files that were skipped, renamed to *.damaged.
    """

    def __init__(self, path: str | os.PathLike[str], config: dict[str, Any], *, resume: bool):
        """Start a run in a new or empty directory, or resume the run in it.

        config: everything the run's numbers depend on, as JSON values; a run is resumed only with
        an equal config. Resuming drops the metrics of steps after the checkpoint.

        Raises ConfigError if there is a run and ``resume`` is false, if there is no run and
        ``resume`` is true, if config differs, or if another process uses the directory.
        """
        self.path = Path(path)
        self.checkpoint: checkpoints.Checkpoint | None = None
        self.damaged: list[Path] = []
        self._check_presence(resume)
        with contextlib.ExitStack() as stack:
            self.path.mkdir(parents=True, exist_ok=True)
            stack.callback(lock(self._lock).close)
            self._held = identity(self._lock)
            self._check_presence(resume)  # again, as another process may just have started a run
            self._delete_leftovers()
            self._checkpoints.mkdir(exist_ok=True)
            if resume:
                self._check_config(config)
                self._load()
            else:
                _write_text(self._config, json.dumps(config, indent=2) + "\n")
            self._metrics_file = stack.enter_context(open(self._metrics, "a", encoding="utf-8"))
            self._resources = stack.pop_all()

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the directory; nothing can be written after."""
        self._resources.close()

    def restore(self, engine: TrainingEngine, config: TrainConfig) -> TrainState:
        """Load the checkpoint, if any, into the adapter; gives the state to train from.

        ConfigError if the checkpoint has another shape or belongs to another optimizer.
        """
        theta = engine.adapter.theta
        if self.checkpoint is None:
            return TrainState.initial(config, engine)
        saved = self.checkpoint
        if saved.theta.shape != theta.shape or saved.theta.dtype != theta.dtype:
            raise ConfigError(
                f"the checkpoint in {self.path} has {saved.theta.size} adapter weights, the "
                f"adapter {theta.size}; resume with the model and adapter of the run"
            )
        try:
            state = TrainState.from_arrays(config, engine, saved.step, saved.state)
        except ValueError as error:
            raise ConfigError(f"the checkpoint in {self.path} does not fit: {error}") from error
        theta[:] = saved.theta
        return state

    def check(self) -> None:
        """ConfigError if the directory was deleted; there may be one of another run now."""
        check_still_there(self._lock, self._held)

    def log(self, event: Event) -> None:
        """Append an update or an evaluation to the metrics, with the time in Unix seconds.

        This, ``save`` and ``plot`` raise what ``check`` does.
        """
        self.check()
        self._metrics_file.write(json.dumps(_record(event, time.time()), allow_nan=False) + "\n")
        self._metrics_file.flush()

    def save(self, theta: np.ndarray, state: TrainState) -> Path:
        """Write a checkpoint of the state durably; the metrics so far reach the disk before it."""
        self.check()
        os.fsync(self._metrics_file.fileno())
        checkpoint = checkpoints.Checkpoint(state.step, theta, state.to_arrays())
        return checkpoints.save(self._checkpoints, checkpoint)

    def metrics(self) -> list[dict[str, Any]]:
        """The metrics so far, oldest first; an incomplete line is left out."""
        return [record for _, record in _read_metrics(self._metrics)]

    def plot(self) -> Path:
        """Draw the metrics so far into plot.png."""
        from fwdllm.tuning.plot import draw  # matplotlib takes longer to import than all the rest

        self.check()
        path = self.path / "plot.png"
        with atomic_write(path) as temporary:
            draw(self.metrics(), temporary)
        return path

    @property
    def _lock(self) -> Path:
        return self.path / "lock"

    @property
    def _config(self) -> Path:
        return self.path / "config.json"

    @property
    def _metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def _checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _check_presence(self, resume: bool) -> None:
        if resume and not self._config.is_file():
            raise ConfigError(f"there is no run in {self.path} to resume")
        if resume or not self.path.exists():
            return
        if not self.path.is_dir():
            raise ConfigError(f"{self.path} is a file; name a new directory for the run")
        if self._config.exists():
            raise ConfigError(f"{self.path} already holds a run; resume it or name another one")
        if not is_unused(self.path, "lock", ".config.json.tmp"):
            raise ConfigError(f"{self.path} is not empty; name a new directory for the run")

    def _check_config(self, config: dict[str, Any]) -> None:
        try:
            saved = json.loads(self._config.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{self._config} is damaged: {error}") from error
        unrecorded = {name: _UNRECORDED[name] for name in _UNRECORDED.keys() & config.keys()}
        saved = {**unrecorded, **saved}
        for group, values in _UNRECORDED_OF.items():
            given = config.get(group)
            if isinstance(given, dict) and isinstance(saved.get(group), dict):
                unrecorded = {name: values[name] for name in values.keys() & given.keys()}
                saved[group] = {**unrecorded, **saved[group]}
        changed = difference(saved, json.loads(json.dumps(config)))
        if changed is not None:
            raise ConfigError(
                f"{changed} in the run in {self.path}; resume with the same value or start "
                "a new run"
            )

    def _load(self) -> None:
        self.checkpoint, damaged = checkpoints.newest_intact(self._checkpoints)
        # Not renamed, a damaged file would count as one of the last two checkpoints.
        self.damaged = [checkpoints.set_aside(path) for path in damaged]
        step = 0 if self.checkpoint is None else self.checkpoint.step
        kept = [line for line, record in _read_metrics(self._metrics) if _precedes(record, step)]
        _write_text(self._metrics, "".join(line + "\n" for line in kept))

    def _delete_leftovers(self) -> None:
        for folder in (self.path, self._checkpoints):
            for path in folder.glob(".*.tmp*"):
                path.unlink()


def train_recorded(
    run: RunDirectory,
    engine: TrainingEngine,
    config: TrainConfig,
    examples: Sequence[Any],
    held_out: Sequence[Any],
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[Event]:
    """Train from the run's last checkpoint to its end, recording each event before yielding it.

    Once ``should_stop()`` is true, training ends after the current event and the state is saved,
    to be resumed later. Draws the plot at the end. Errors: as ``restore`` and ``train``; after an
    error the run can be resumed from its last checkpoint.
    """
    state = run.restore(engine, config)
    saved = state.step
    for event in train(engine, config, examples, held_out, state):
        if isinstance(event, CheckpointDue):
            run.save(engine.adapter.theta, state)
            saved = state.step
        else:
            run.log(event)
        yield event
        if should_stop():
            break
    if state.step != saved and config.checkpoint_every:
        run.save(engine.adapter.theta, state)
    run.plot()


@contextlib.contextmanager
def stop_on_interrupt() -> Iterator[Callable[[], bool]]:
    """A context in which the first Ctrl-C only makes the yielded function return True.

    A second Ctrl-C interrupts. Main thread only, because Python delivers signals there.
    """
    requested = False

    def request(number: int, frame: FrameType | None) -> None:
        nonlocal requested
        requested = True
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, request)
    try:
        yield lambda: requested
    finally:
        signal.signal(signal.SIGINT, before)


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _record(event: Event, now: float) -> dict[str, Any]:
    """A metrics line. Rejections keep only seed and reason; a loss that is not finite is null."""
    kind = "step" if isinstance(event, StepResult) else "eval"
    record = {"event": kind, **dataclasses.asdict(event), "time": round(now, 3)}
    if isinstance(event, StepResult):
        record["resident_bytes"] = rss_bytes()
        record["rejected"] = [
            {"seed": r.contribution.seed, "reason": r.reason} for r in event.rejected
        ]
    if not math.isfinite(record["loss"]):
        record["loss"] = None
    return record


def _read_metrics(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The complete lines of a metrics file with their records; incomplete ones do not parse."""
    found: list[tuple[str, dict[str, Any]]] = []
    if not path.exists():
        return found
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                found.append((line, record))
    return found


def _precedes(record: dict[str, Any], step: int) -> bool:
    """Whether to keep a record on resuming at ``step``; the evaluation at it will be repeated."""
    return record["step"] < step or (record["step"] == step and record["event"] == "step")
