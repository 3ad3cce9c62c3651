"""/v1/fine_tuning/jobs: OpenAI's jobs, with fwdllm's settings in the field "fwdllm"."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import ConfigDict, Field, StringConstraints, create_model

from fwdllm.engine.backends import Backend
from fwdllm.engine.data.jsonl import labels_of
from fwdllm.engine.settings import DirectionsConfig, LoRAConfig, settings_of, types_of
from fwdllm.http import limits
from fwdllm.http.api_error import ApiError
from fwdllm.http.bodies import Route
from fwdllm.http.context import Context, Served
from fwdllm.http.files import examples_of, find, page
from fwdllm.http.limits import MAX_RANK
from fwdllm.http.schemas import Metadata, NullIsDefault, Refused, at_most
from fwdllm.http.store import AdapterRow, Event, Job
from fwdllm.http.worker import directions_of, work_folder
from fwdllm.protocol.config import AUTO, TrainConfig
from fwdllm.tuning.recipes import check_given, recipe_for

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"], route_class=Route)

Auto = Literal["auto"]
# Of layers or targets: more than any model has.
_MAX_ITEMS = 512


class Hyperparameters(NullIsDefault):
    """OpenAI's hyperparameters. learning_rate_multiplier: multiplies fwdllm's default rate."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=10_000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=1024)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1e6)] = "auto"


class Supervised(NullIsDefault):
    hyperparameters: Hyperparameters = Hyperparameters()


class Method(NullIsDefault):
    type: Literal["supervised"] = "supervised"
    supervised: Supervised = Supervised()


class _Settings(NullIsDefault):
    model_config = ConfigDict(strict=True)

    def of(self, config: type) -> dict[str, Any]:
        """The settings that were given and that belong to ``config``."""
        values = {name: getattr(self, as_, None) for name, as_ in _names(config).items()}
        given = {name: value for name, value in values.items() if value is not None}
        return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _names(config: type) -> dict[str, str]:
    """A configuration's settings and their names in requests: "kind" becomes "directions"."""
    return {name: "directions" if name == "kind" else name for name in settings_of(config)}


def _fields() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for config in (TrainConfig, LoRAConfig, DirectionsConfig):
        for name, as_ in _names(config).items():
            kind: Any = types_of(config)[name][0]
            if kind is tuple:
                items: Any = list[int] if name == "layers" else list[str]
                kind = Annotated[items, at_most(_MAX_ITEMS)]
            known = settings_of(config)[name]
            found[as_] = (kind | None, Field(default=None, description=known.help))
    del found["seed"]  # OpenAI's requests have one
    found["rank"] = (Annotated[int, Field(ge=1, le=MAX_RANK)] | None, None)
    return found


class Settings(create_model("_Fields", __base__=_Settings, **_fields())):  # type: ignore[misc]
    """The settings of ``fwdllm tune``, under the same names. None: its default."""


# OpenAI says no more than the length; text that is no name is refused.
JobSuffix = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f/\\]*$", max_length=64)]


class JobRequest(NullIsDefault):
    """A request for a tuning job. suffix: becomes part of the model's name, see ``model_name``."""

    model: str
    training_file: str
    validation_file: str | None = None
    suffix: JobSuffix | None = None
    metadata: Metadata | None = None
    integrations: Refused = None
    seed: Annotated[int, Field(ge=0, le=2**31 - 1)] = 0
    hyperparameters: Hyperparameters | None = None
    method: Method | None = None
    fwdllm: Settings = Settings()


@router.post("")
def create(body: JobRequest, served: Served) -> dict[str, Any]:
    """Queue a job."""
    if served.models.adapter_of(body.model) is not None:
        raise ApiError(400, "only the base model can be tuned", "model", "model_not_available")
    served.check_room()
    training = find(served, body.training_file, "training_file", 400)
    validation = body.validation_file
    held_out = validation and find(served, validation, "validation_file", 400)
    labels = labels_of(examples_of(served, training))
    if served.models.backend.encoder and len(labels) < 2:
        text = "an encoder learns from texts with two or more labels"
        raise ApiError(400, text, "training_file")
    request = {
        **body.model_dump(exclude={"fwdllm"}, exclude_none=True),
        "suffix": body.suffix or "",
        **_resolved(body, served.models.backend, len(labels), training.n_examples),
    }
    job = served.store.add_job(request, training, held_out or None, limits.MAX_UNFINISHED_JOBS)
    if job is None:
        text = f"{limits.MAX_UNFINISHED_JOBS} jobs have not finished; wait for one, or cancel it"
        raise ApiError(429, text, code="rate_limit_exceeded", headers={"Retry-After": "60"})
    served.jobs.notice()
    return job_object(served, job)


@router.get("")
def list_jobs(
    served: Served,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """All jobs, newest first."""
    return page([job_object(served, job) for job in served.store.jobs()], after, limit)


@router.get("/{job_id}")
def get(job_id: str, served: Served) -> dict[str, Any]:
    """One job."""
    return job_object(served, _find(served, job_id))


@router.delete("/{job_id}")
def delete(job_id: str, served: Served) -> dict[str, Any]:
    """Delete a job that has ended; its model stays."""
    job = _find(served, job_id)
    if not served.store.delete_job(job.number):
        raise _conflict(served, job, "deleted")
    shutil.rmtree(work_folder(served.folder, job.number), ignore_errors=True)
    return {"id": job_id, "object": "fine_tuning.job", "deleted": True}


@router.post("/{job_id}/cancel")
def cancel(job_id: str, served: Served) -> dict[str, Any]:
    """End a job for good."""
    return _changed(served, job_id, served.jobs.cancel, "cancelled")


@router.post("/{job_id}/pause")
def pause(job_id: str, served: Served) -> dict[str, Any]:
    """Pause a job; it keeps its progress."""
    return _changed(served, job_id, served.jobs.pause, "paused")


@router.post("/{job_id}/resume")
def resume(job_id: str, served: Served) -> dict[str, Any]:
    """Queue a paused job again."""
    return _changed(served, job_id, served.jobs.resume, "resumed")


@router.get("/{job_id}/events")
def events(
    job_id: str,
    served: Served,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 20,
) -> dict[str, Any]:
    """Events of a job, newest first. after: an event's id; older events follow."""
    job = _find(served, job_id)
    before = None if after is None else _event_number(after)
    found = served.store.events(job.number, limit + 1, before)
    data = [_event_object(event) for event in found[:limit]]
    return {"object": "list", "data": data, "has_more": len(found) > limit}


@router.get("/{job_id}/checkpoints")
def checkpoints(
    job_id: str,
    served: Served,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> dict[str, Any]:
    """The last checkpoints of a job, newest first; each can be used as a model."""
    job = _find(served, job_id)
    found = served.store.checkpoints(job.number)
    return page([_checkpoint_object(served, job, adapter) for adapter in found], after, limit)


def job_object(served: Context, job: Job) -> dict[str, Any]:
    """OpenAI's job object, with the settings in use under "fwdllm"."""
    result = job.adapter and served.store.adapter_of_number(job.adapter)
    request, train = job.request, job.request["train"]
    error = {"code": "job_failed", "message": job.error, "param": None} if job.error else None
    hyperparameters = request["hyperparameters_used"]
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "model": request["model"],
        "created_at": int(job.created),
        "finished_at": job.finished and int(job.finished),
        "status": job.status,
        "fine_tuned_model": result.model if result else None,
        "adapter": result.id if result else None,
        "organization_id": "local",
        "result_files": [],
        "training_file": request["training_file"],
        "validation_file": request.get("validation_file"),
        "trained_tokens": job.trained_tokens,
        "error": error,
        "seed": request["seed"],
        "estimated_finish": None,
        "integrations": [],
        "metadata": request.get("metadata"),
        "hyperparameters": hyperparameters,
        "method": {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}},
        "user_provided_suffix": request["suffix"] or None,
        "fwdllm": {**train, **request["lora"], **_directions(request)},
    }


def _directions(request: dict[str, Any]) -> dict[str, Any]:
    names, found = _names(DirectionsConfig), directions_of(request)
    return {as_: getattr(found, name) for name, as_ in names.items()}


def _resolved(body: JobRequest, backend: Backend, n_labels: int, n_examples: int) -> dict[str, Any]:
    """All settings of a job with defaults filled in, as JSON. Errors: ConfigError."""
    given = body.fwdllm
    method = body.method.supervised.hyperparameters if body.method else None
    theirs = method or body.hyperparameters or Hyperparameters()
    names = {*given.of(TrainConfig), *given.of(LoRAConfig)}
    recipe = recipe_for(backend, n_labels, given.of(TrainConfig).get("method", AUTO), names)
    check_given(recipe.train.method, given.of(TrainConfig))
    changes: dict[str, Any] = {}
    if theirs.batch_size != "auto":
        changes["batch_size"] = theirs.batch_size
    if theirs.learning_rate_multiplier != "auto":
        changes["learning_rate"] = recipe.train.learning_rate * theirs.learning_rate_multiplier
    changes |= {**given.of(TrainConfig), "method": recipe.train.method}
    batch_size = min(changes.get("batch_size", recipe.train.batch_size), n_examples)
    per_epoch = max(1, math.ceil(n_examples / max(1, batch_size)))
    if theirs.n_epochs != "auto":
        changes.setdefault("steps", theirs.n_epochs * per_epoch)
    steps = changes.get("steps", recipe.train.steps)
    changes.setdefault("eval_every", max(1, steps // 10))
    train = dataclasses.replace(recipe.train, seed=body.seed, **changes)
    lora = dataclasses.replace(recipe.lora, **given.of(LoRAConfig))
    return {
        "train": train.recorded(),
        "lora": dataclasses.asdict(lora),
        "directions": dataclasses.asdict(DirectionsConfig(**given.of(DirectionsConfig))),
        "hyperparameters_used": {
            "n_epochs": math.ceil(train.steps / per_epoch),
            "batch_size": train.batch_size,
            "learning_rate_multiplier": train.learning_rate / recipe.train.learning_rate,
        },
    }


def _find(served: Context, id: str) -> Job:
    job = served.store.job(id)
    if job is None:
        raise ApiError(404, f"there is no job {id!r}", "fine_tuning_job_id", "job_not_found")
    return job


def _changed(served: Context, id: str, change: Callable[[Job], bool], what: str) -> dict[str, Any]:
    job = _find(served, id)
    if not change(job):
        raise _conflict(served, job, what)
    return job_object(served, _find(served, id))


def _conflict(served: Context, job: Job, what: str) -> ApiError:
    status = served.store.job_of_number(job.number).status
    return ApiError(409, f"a job that is {status} cannot be {what}", code="invalid_job_status")


def _event_number(id: str) -> int:
    digits = id.removeprefix("ftevent-")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise ApiError(400, f"there is no event {id!r}", "after")
    return int(digits)


def _event_object(event: Event) -> dict[str, Any]:
    return {
        "id": f"ftevent-{event.number}",
        "object": "fine_tuning.job.event",
        "created_at": int(event.created),
        "level": event.level,
        "message": event.message,
        "type": "message" if event.data is None else "metrics",
        "data": event.data,
    }


def _checkpoint_object(served: Context, job: Job, adapter: AdapterRow) -> dict[str, Any]:
    metrics: dict[str, Any] = {"step": adapter.step}
    for kind in ("step", "eval"):
        event = served.store.event_of_key(job.number, f"{kind} {adapter.step}")
        metrics |= (event and event.data) or {}
    return {
        "id": adapter.id.replace("adapter-", "ftckpt-"),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(adapter.created),
        "fine_tuned_model_checkpoint": adapter.model,
        "fine_tuning_job_id": job.id,
        "step_number": adapter.step,
        "metrics": metrics,
    }
