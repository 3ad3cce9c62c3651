"""The server's data: uploaded files, jobs, their events, and adapters, in one SQLite file.

When a method returns, its writes are on disk, so a crash loses nothing that the server has
accepted. The worker of a job writes here too, from its own process.

Ids are random and only used in look-ups, never in paths. Rows also have numbers, for folder names.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fwdllm.engine.errors import ConfigError, FwdllmError
from fwdllm.http.database import Database, StoreError

__all__ = ["AdapterRow", "Event", "File", "Job", "Store", "StoreError", "open_folder"]

NAME = "server.sqlite"

QUEUED, RUNNING, PAUSED = "queued", "running", "paused"
SUCCEEDED, FAILED, CANCELLED = "succeeded", "failed", "cancelled"
UNFINISHED = (QUEUED, RUNNING, PAUSED)

_ID_BYTES = 12


class GoneError(FwdllmError):
    """A row that was deleted after it had been looked up."""


@dataclass(frozen=True)
class File:
    """An uploaded data set. kind: the kind of its examples, see ``engine.data.jsonl``."""

    number: int
    id: str
    created: float
    filename: str
    purpose: str
    kind: str
    n_examples: int
    n_bytes: int


@dataclass(frozen=True)
class Job:
    """A tuning job. request: its settings.  training, validation: numbers of files.

    adapter: the number of the resulting adapter.  error: a sentence, if the job failed.
    """

    number: int
    id: str
    created: float
    started: float | None
    finished: float | None
    status: str
    request: dict[str, Any]
    training: int
    validation: int | None
    adapter: int | None
    trained_tokens: int | None
    error: str | None


@dataclass(frozen=True)
class Event:
    """An event of a job. data: figures if it reports metrics, else None."""

    number: int
    created: float
    level: str
    message: str
    data: dict[str, Any] | None


@dataclass(frozen=True)
class AdapterRow:
    """An adapter without its content. model: its name in requests.

    job: number of the job that made it, None if no job did.  step: of a checkpoint, None for other
    adapters.  version: number of updates applied to it.
    """

    number: int
    id: str
    created: float
    model: str
    job: int | None
    step: int | None
    version: int
    n_parameters: int
    n_bytes: int


class Store:
    """An open store. Threads may share it. Errors of all methods: StoreError."""

    def __init__(self, folder: Path) -> None:
        """Open the store in a folder, or create it."""
        self._db = Database(folder / NAME)

    def close(self) -> None:
        """Release the file."""
        self._db.close()

    def claim(self, name: str, model: dict[str, Any]) -> None:
        """Tie the store to a model. model: see ``files.fingerprint``.

        ConfigError if the store belongs to another model.
        """
        mine = json.dumps({"name": name, **model}, sort_keys=True)
        with self._db.transaction() as db:
            db.execute("INSERT OR IGNORE INTO meta VALUES (0, ?)", (mine,))
        [(found,)] = self._db.all("SELECT model FROM meta")
        if found != mine:
            raise ConfigError(
                f"{self._db.path.parent} belongs to the model {json.loads(found)['name']}; choose "
                "another folder with --state"
            )

    # Files

    def add_file(
        self, filename: str, purpose: str, kind: str, n_examples: int, content: bytes, room: int
    ) -> File | None:
        """Keep an uploaded file; None if all files together would exceed ``room`` bytes."""
        values = (_new_id("file"), time.time(), filename, purpose, kind, n_examples, content)
        with self._db.transaction() as db:
            [(used,)] = db.execute("SELECT coalesce(sum(length(content)), 0) FROM file").fetchall()
            if used + len(content) > room:
                return None
            db.execute(f"INSERT INTO file VALUES (NULL{', ?' * len(values)})", values)
        return self.file(values[0])

    def file(self, id: str) -> File | None:
        """The file of this id."""
        return next(iter(self._files("WHERE id = ?", id)), None)

    def files(self) -> list[File]:
        """All files, newest first."""
        return self._files("ORDER BY number DESC")

    def file_content(self, number: int) -> bytes:
        """The bytes of a file. GoneError if there is none."""
        return self._content("file", number)

    def delete_file(self, number: int) -> bool:
        """Delete a file; False if a job still needs it."""
        with self._db.transaction() as db:
            n = db.execute(
                "DELETE FROM file WHERE number = ?1 AND NOT EXISTS (SELECT 1 FROM job WHERE"
                f" (training = ?1 OR validation = ?1) AND status IN {UNFINISHED})",
                (number,),
            ).rowcount
        return bool(n)

    # Jobs

    def add_job(
        self, request: dict[str, Any], training: File, validation: File | None, max_unfinished: int
    ) -> Job | None:
        """Queue a job; None if there are ``max_unfinished`` already."""
        id = _new_id("ftjob")
        with self._db.transaction() as db:
            [(n,)] = db.execute(f"SELECT count(*) FROM job WHERE status IN {UNFINISHED}").fetchall()
            if n >= max_unfinished:
                return None
            db.execute(
                "INSERT INTO job (id, created, status, request, training, validation)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                (
                    id,
                    time.time(),
                    QUEUED,
                    json.dumps(request),
                    training.number,
                    validation and validation.number,
                ),
            )
        found = self.job(id)
        assert found is not None
        self.add_event(found.number, "The job is queued", key="created")
        return found

    def job(self, id: str) -> Job | None:
        """The job of this id."""
        return next(iter(self._jobs("WHERE id = ?", id)), None)

    def job_of_number(self, number: int) -> Job:
        """The job of this number, which must exist."""
        return self._jobs("WHERE number = ?", number)[0]

    def jobs(self, status: str | None = None) -> list[Job]:
        """All jobs, or those of a status, newest first."""
        if status is None:
            return self._jobs("ORDER BY number DESC")
        return self._jobs("WHERE status = ? ORDER BY number DESC", status)

    def change_status(self, number: int, before: tuple[str, ...], after: str) -> bool:
        """Change a job's status if it is one of ``before``; returns whether it was."""
        started = ", started = coalesce(started, ?)" if after == RUNNING else ""
        finished = ", finished = ?" if after not in UNFINISHED else ""
        now = [time.time()] * bool(started or finished)
        marks = ", ".join("?" * len(before))
        with self._db.transaction() as db:
            n = db.execute(
                f"UPDATE job SET status = ?{started}{finished}"
                f" WHERE number = ? AND status IN ({marks})",
                (after, *now, number, *before),
            ).rowcount
        return bool(n)

    def fail_job(self, number: int, error: str) -> None:
        """End a running job with an error."""
        with self._db.transaction() as db:
            if self.change_status(number, (RUNNING,), FAILED):
                db.execute("UPDATE job SET error = ? WHERE number = ?", (error, number))
                self.add_event(number, f"The job failed: {error}", level="error")

    def pause_full(self, number: int) -> None:
        """Pause a running job that could not be written to disk."""
        with self._db.transaction():
            if self.change_status(number, (RUNNING,), PAUSED):
                text = "The disk is full: the job is paused, and resumes from its last checkpoint"
                self.add_event(number, text, level="warn")

    def finish_job(self, number: int, adapter: AdapterRow) -> bool:
        """End a running job with its result; False if the job is no longer running."""
        events = self._events("WHERE job = ?", number)
        n_tokens = sum((event.data or {}).get("n_tokens", 0) for event in events)
        with self._db.transaction() as db:
            if not self.change_status(number, (RUNNING,), SUCCEEDED):
                return False
            db.execute(
                "UPDATE job SET adapter = ?, trained_tokens = ? WHERE number = ?",
                (adapter.number, n_tokens, number),
            )
            self.add_event(number, f"New fine-tuned model: {adapter.model}", key="succeeded")
            self.add_event(number, "The job has successfully completed", key="completed")
        return True

    def delete_job(self, number: int) -> bool:
        """Delete a job that has ended, its events and checkpoints; its result stays."""
        with self._db.transaction() as db:
            n = db.execute(
                f"DELETE FROM job WHERE number = ? AND status NOT IN {UNFINISHED}", (number,)
            ).rowcount
            if n:
                db.execute("DELETE FROM event WHERE job = ?", (number,))
                db.execute("DELETE FROM adapter WHERE job = ? AND step IS NOT NULL", (number,))
                db.execute("UPDATE adapter SET job = NULL WHERE job = ?", (number,))
        return bool(n)

    # Events

    def add_event(
        self,
        job: int,
        message: str,
        *,
        key: str | None = None,
        level: str = "info",
        data: dict[str, Any] | None = None,
    ) -> None:
        """Record an event, unless the job has one with the same key.

        A resumed job repeats steps, with the same figures.
        """
        text = None if data is None else json.dumps(data)
        with self._db.transaction() as db:
            db.execute(
                "INSERT OR IGNORE INTO event VALUES (NULL, ?, ?, ?, ?, ?, ?)",
                (job, time.time(), key, level, message, text),
            )

    def events(self, job: int, limit: int, before: int | None = None) -> list[Event]:
        """Events of a job, newest first. before: only events with a smaller number."""
        newest = 2**62 if before is None else before
        which = "WHERE job = ? AND number < ? ORDER BY number DESC LIMIT ?"
        return self._events(which, job, newest, limit)

    def event_of_key(self, job: int, key: str) -> Event | None:
        """The event that was recorded with this key."""
        return next(iter(self._events("WHERE job = ? AND key = ?", job, key)), None)

    # Adapters

    def add_adapter(
        self,
        model: str,
        content: bytes,
        n_parameters: int,
        *,
        job: int | None = None,
        step: int | None = None,
    ) -> AdapterRow:
        """Keep an adapter, a GGUF LoRA file. If the name exists already, that adapter is kept."""
        values = (_new_id("adapter"), time.time(), model, job, step, 0, n_parameters, content)
        with self._db.transaction() as db:
            db.execute(f"INSERT OR IGNORE INTO adapter VALUES (NULL{', ?' * len(values)})", values)
        found = self.adapter_of_model(model)
        assert found is not None
        return found

    def adapter(self, id: str) -> AdapterRow | None:
        """The adapter of this id."""
        return next(iter(self._adapters("WHERE id = ?", id)), None)

    def adapter_of_model(self, model: str) -> AdapterRow | None:
        """The adapter with this model name."""
        return next(iter(self._adapters("WHERE model = ?", model)), None)

    def adapter_of_number(self, number: int) -> AdapterRow | None:
        """The adapter of this number."""
        return next(iter(self._adapters("WHERE number = ?", number)), None)

    def adapters(self) -> list[AdapterRow]:
        """All adapters, newest first."""
        return self._adapters("ORDER BY number DESC")

    def checkpoints(self, job: int) -> list[AdapterRow]:
        """The adapters of a job's checkpoints, newest first."""
        return self._adapters("WHERE job = ? AND step IS NOT NULL ORDER BY step DESC", job)

    def adapter_content(self, number: int) -> bytes:
        """The bytes of an adapter's GGUF file. GoneError if there is none."""
        return self._content("adapter", number)

    def adapters_bytes(self) -> int:
        """Total bytes of all adapters."""
        return sum(adapter.n_bytes for adapter in self.adapters())

    def update_adapter(self, adapter: AdapterRow, content: bytes) -> AdapterRow | None:
        """Replace the content of an adapter; None if its version is no longer ``adapter``'s."""
        with self._db.transaction() as db:
            n = db.execute(
                "UPDATE adapter SET content = ?, version = version + 1"
                " WHERE number = ? AND version = ?",
                (content, adapter.number, adapter.version),
            ).rowcount
        return self.adapter_of_number(adapter.number) if n else None

    def delete_adapter(self, number: int) -> None:
        """Delete an adapter."""
        with self._db.transaction() as db:
            db.execute("UPDATE job SET adapter = NULL WHERE adapter = ?", (number,))
            db.execute("DELETE FROM adapter WHERE number = ?", (number,))

    def _content(self, table: str, number: int) -> bytes:
        rows = self._db.all(f"SELECT content FROM {table} WHERE number = ?", number)
        if not rows:
            raise GoneError(f"the {table} has been deleted")
        return bytes(rows[0][0])

    def _files(self, which: str, *values: Any) -> list[File]:
        columns = "number, id, created, filename, purpose, kind, n_examples, length(content)"
        return [File(*row) for row in self._db.all(f"SELECT {columns} FROM file {which}", *values)]

    def _jobs(self, which: str, *values: Any) -> list[Job]:
        columns = (
            "number, id, created, started, finished, status, request, training, validation,"
            " adapter, trained_tokens, error"
        )
        rows = self._db.all(f"SELECT {columns} FROM job {which}", *values)
        return [Job(*(*row[:6], json.loads(row[6]), *row[7:])) for row in rows]

    def _events(self, which: str, *values: Any) -> list[Event]:
        columns = "number, created, level, message, data"
        rows = self._db.all(f"SELECT {columns} FROM event {which}", *values)
        return [Event(*(*row[:4], row[4] and json.loads(row[4]))) for row in rows]

    def _adapters(self, which: str, *values: Any) -> list[AdapterRow]:
        columns = "number, id, created, model, job, step, version, n_parameters, length(content)"
        rows = self._db.all(f"SELECT {columns} FROM adapter {which}", *values)
        return [AdapterRow(*row) for row in rows]


def open_folder(folder: Path) -> Path:
    """The server's folder, created if missing; ConfigError if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise ConfigError(f"cannot use {folder}: {error.strerror or error}") from error
    return folder


def _new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(_ID_BYTES)}"
