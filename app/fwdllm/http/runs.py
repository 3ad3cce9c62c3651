"""Runs to show: this server's jobs, and run directories of ``fwdllm tune`` and ``simulate``.

A run directory is read while another process may write it; see ``fwdllm.tuning.run_directory`` and
``protocol.ledger``.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fwdllm.http.store import RUNNING, Job, Store
from fwdllm.http.worker import run_folder
from fwdllm.protocol.figures import traffic
from fwdllm.protocol.ledger import NAME as LEDGER
from fwdllm.protocol.ledger import Ledger, LedgerError

# A run whose files have not changed for longer has ended or was interrupted.
_LIVE_SECONDS = 30.0
# Pages ask about twice a second (``stream``).
_REFRESH_SECONDS = 0.4
# How many runs have their points in memory; the least recently used are dropped.
_MAX_SOURCES = 16
# Steps from which the time left is estimated.
_RECENT_STEPS = 20


@dataclass
class Metrics:
    """The points of a run directory, read as they are written.

    generation: raised when the points are read again from the start, because a resumed run has
    rewritten the file.  steps: of the whole run, None if unknown.
    """

    path: Path
    points: list[dict[str, Any]] = field(default_factory=list)
    generation: int = 0
    steps: int | None = None
    _offset: int = 0
    _inode: int | None = None
    _last_time: float | None = None

    def refresh(self) -> None:
        """Read what has been written since the last call."""
        if self.steps is None:
            with contextlib.suppress(OSError, ValueError, KeyError):
                config = json.loads((self.path / "config.json").read_text(encoding="utf-8"))
                self.steps = config["train"]["steps"]
        with contextlib.suppress(OSError), open(self.path / "metrics.jsonl", "rb") as file:
            self._read(file)

    def _read(self, file: Any) -> None:
        status = os.fstat(file.fileno())
        if (status.st_ino != self._inode and self._inode is not None) or (
            status.st_size < self._offset
        ):
            self.points, self._offset, self._last_time = [], 0, None
            self.generation += 1
        self._inode = status.st_ino
        file.seek(self._offset)
        data = file.read()
        whole = data[: data.rfind(b"\n") + 1]  # the last line may be half written
        self._offset += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                self.points.append(self._point(json.loads(line)))

    def _point(self, record: dict[str, Any]) -> dict[str, Any]:
        before, self._last_time = self._last_time, record["time"]
        point = {"step": record["step"], "time": record["time"], "loss": record["loss"]}
        if record["event"] == "eval":
            return {"kind": "eval", **point, "accuracy": record["accuracy"]}
        seconds = 0.0 if before is None else record["time"] - before
        derivatives = record["derivatives"]
        return {
            "kind": "step",
            **point,
            "perturbations": len(derivatives) or None,
            "gradient_variance": gradient_variance(derivatives),
            "gradient_norm": record["gradient_norm"],
            "tokens_per_s": record["n_tokens"] / seconds if seconds > 0 else None,
            "resident_bytes": record.get("resident_bytes"),
            "lr": record["lr"],
            "bytes_up": None,
            "bytes_down": None,
        }


@dataclass
class Rounds:
    """The points of a federation's ledger; the fields are as in ``Metrics``."""

    path: Path
    points: list[dict[str, Any]] = field(default_factory=list)
    generation: int = 0
    steps: int | None = None
    _n_rounds: int = 0
    _n_evaluations: int = 0

    def refresh(self) -> None:
        """Read the rounds and evaluations since the last call."""
        with contextlib.suppress(LedgerError, OSError), Ledger(self.path / LEDGER) as ledger:
            self.steps = ledger.meta.config.rounds
            rounds = ledger.rounds(self._n_rounds)
            sent = {row[0]: row for row in traffic(ledger, self._n_rounds)}
            written = (self.path / LEDGER).stat().st_mtime
            for r in rounds:
                _, _, down, up = sent.get(r.round, (0, 0, None, None))
                self.points.append(
                    {
                        "kind": "step",
                        "step": r.round + 1,
                        "time": written,
                        "loss": r.loss,
                        "perturbations": r.n_perturbations,
                        "gradient_variance": r.variance,
                        "gradient_norm": None,
                        "tokens_per_s": None,
                        "resident_bytes": None,
                        "lr": None,
                        "bytes_up": up,
                        "bytes_down": down,
                    }
                )
            self._n_rounds += len(rounds)
            evaluations = ledger.evaluations()
            for round, loss, accuracy, _ in evaluations[self._n_evaluations :]:
                self.points.append(
                    {"kind": "eval", "step": round, "time": written, "loss": loss}
                    | {"accuracy": accuracy}
                )
            self._n_evaluations = len(evaluations)


class Runs:
    """All runs that are shown: jobs of a store, and runs in a folder. Threads may share it.

    However many ask for summaries, files are read at most once every ``_REFRESH_SECONDS``, and
    those of an ended run only once. ``points`` reads new points at every call.
    """

    def __init__(self, store: Store, folder: Path, watched: Path | None) -> None:
        """folder: the server's.  watched: a run directory, a folder of run directories, or None."""
        self._store, self._folder, self._watched = store, folder, watched
        self._lock = threading.Lock()
        self._listed: list[dict[str, Any]] = []
        self._listed_at = -math.inf
        self._makers: dict[str, Callable[[], Metrics | Rounds]] = {}
        self._sources: dict[str, Metrics | Rounds] = {}  # the most recently used last
        self._progress: dict[str, tuple[Any, dict[str, Any]]] = {}

    def summaries(self) -> list[dict[str, Any]]:
        """A summary of every run, newest first."""
        with self._lock:
            if time.monotonic() - self._listed_at > _REFRESH_SECONDS:
                jobs = [self._job(job) for job in self._store.jobs()]
                folders = [self._run(path) for path in _run_folders(self._watched)]
                found = [run for run in (*jobs, *folders) if run is not None]
                self._listed = sorted(found, key=lambda run: -run["created_at"])
                self._listed_at = time.monotonic()
            return self._listed

    def points(self, id: str, generation: int, start: int) -> tuple[int, list[dict[str, Any]]]:
        """The generation and points of a run; generation -1 for a run that has not been listed.

        start: index of the first point wanted; ignored if the run's generation is not
        ``generation``: then all points are returned.
        """
        with self._lock:
            if id not in self._makers:
                return -1, []
            source = self._source(id)
            source.refresh()
            first = start if source.generation == generation else 0
            return source.generation, source.points[first:]

    def _job(self, job: Job) -> dict[str, Any]:
        path = run_folder(self._folder, job.number)
        self._makers[job.id] = lambda: Metrics(path)
        adapter = job.adapter and self._store.adapter_of_number(job.adapter)
        steps = job.request["train"]["steps"]
        progress = self._progress_of(job.id, job.status, steps, job.status == RUNNING)
        return {
            "id": job.id,
            "kind": "tune",
            "name": job.request["suffix"] or job.id,
            "status": job.status,
            "created_at": int(job.created),
            "error": job.error,
            "fine_tuned_model": adapter.model if adapter else None,
            "adapter": adapter.id if adapter else None,
            **progress,
        }

    def _run(self, path: Path) -> dict[str, Any] | None:
        """The summary of a run directory; None if it has been deleted."""
        try:
            written = [p.stat().st_mtime for p in path.iterdir() if p.is_file()]
            is_federation = (path / LEDGER).exists()
        except OSError:
            return None
        id = "run-" + hashlib.sha256(bytes(path)).hexdigest()[:16]
        self._makers[id] = lambda: (Rounds if is_federation else Metrics)(path)
        last = max(written, default=0.0)
        is_live = time.time() - last < _LIVE_SECONDS
        progress = self._progress_of(id, last, None, is_live)
        is_over = progress["step"] == progress["steps"]
        return {
            "id": id,
            "kind": "federation" if is_federation else "tune",
            "name": path.name,
            "status": "running" if is_live and not is_over else "recorded",
            "created_at": int(min(written, default=0.0)),
            "error": None,
            "fine_tuned_model": None,
            "adapter": None,
            **progress,
        }

    def _progress_of(
        self, id: str, version: Any, steps: int | None, is_live: bool
    ) -> dict[str, Any]:
        """The progress of a run. version: if it has changed, files are read again."""
        known = self._progress.get(id)
        if known is None or is_live or known[0] != version:
            source = self._source(id)
            source.refresh()
            known = (version, _progress(source, steps or source.steps, is_live))
            self._progress[id] = known
        return known[1]

    def _source(self, id: str) -> Metrics | Rounds:
        source = self._sources.pop(id, None) or self._makers[id]()
        self._sources[id] = source
        if len(self._sources) > _MAX_SOURCES:
            del self._sources[next(iter(self._sources))]
        return source


def gradient_variance(derivatives: list[float]) -> float | None:
    """The expected variance of a forward gradient from half of a step's perturbations.

    A mean over coordinates, as ``protocol.pacing.variance`` measures it for federations. With K
    directional derivatives d along standard normal directions and many parameters, it is
    2 mean(d^2) / K.
    """
    n = len(derivatives)
    return 2 * sum(d * d for d in derivatives) / n**2 if n else None


def _progress(source: Metrics | Rounds, steps: int | None, is_live: bool) -> dict[str, Any]:
    done = [p for p in source.points if p["kind"] == "step"]
    evaluations = [p for p in source.points if p["kind"] == "eval"]
    last = done[-1] if done else {}
    step = last.get("step", 0)
    recent = done[-_RECENT_STEPS:]
    left = None
    if is_live and steps and len(recent) > 1 and recent[-1]["step"] > recent[0]["step"]:
        pace = (recent[-1]["time"] - recent[0]["time"]) / (recent[-1]["step"] - recent[0]["step"])
        left = round((steps - step) * pace, 1) or None
    return {
        "step": step,
        "steps": steps,
        "loss": last.get("loss"),
        "held_out_before": evaluations[0]["loss"] if evaluations else None,
        "held_out": evaluations[-1]["loss"] if evaluations else None,
        "accuracy": evaluations[-1]["accuracy"] if evaluations else None,
        "seconds_left": left,
        "resident_bytes": last.get("resident_bytes") if is_live else None,
    }


def _run_folders(folder: Path | None) -> Iterable[Path]:
    """The run directories among a folder and its subfolders."""
    if folder is None:
        return []
    with contextlib.suppress(OSError):
        candidates = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
        return [p for p in candidates if (p / "config.json").is_file() or (p / LEDGER).is_file()]
    return []
