"""The application: all routes around one model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import fingerprint, lock
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.http import (
    api_error,
    completions,
    files,
    fine_tuning,
    loading,
    metrics,
    perturbations,
    predict,
    stream,
)
from fwdllm.http.adapter_engine import AdapterEngine
from fwdllm.http.context import Context
from fwdllm.http.jobs import Jobs
from fwdllm.http.models import Models
from fwdllm.http.runs import Runs
from fwdllm.http.security import Guard
from fwdllm.http.store import AdapterRow, Store, open_folder


@dataclass(frozen=True)
class ServerConfig:
    """The settings of a server.

    model: a GGUF file.  state: the server's folder.  memory_budget: bytes for a job, and the same
    for the engine.  adapters: GGUF or PEFT, and their names or None; the first is used for requests
    that name no model.  adapter_folder: where requests may load adapters from, or None.
    host: the address the server is bound to.  api_key: None: no key is needed.  runs: a folder
    whose runs are shown.  context: tokens of a conversation; None: ``models.DEFAULT_CONTEXT``.
    allow_origins: other sites whose pages may send requests.
    """

    model: Path
    state: Path
    memory_budget: int
    adapters: tuple[tuple[str | None, Path], ...] = ()
    adapter_folder: Path | None = None
    host: str = "127.0.0.1"
    api_key: str | None = None
    runs: Path | None = None
    context: int | None = None
    allow_origins: tuple[str, ...] = ()


@contextlib.contextmanager
def application(config: ServerConfig) -> Iterator[FastAPI]:
    """A context with the application; its jobs run until the context ends.

    Errors: ModelError, AdapterError, ConfigError if another server uses the folder, StoreError.
    """
    folder = open_folder(config.state)
    with contextlib.ExitStack() as stack:
        stack.callback(lock(folder / "lock").close)
        store = Store(folder)
        stack.callback(store.close)
        base = config.model.stem
        store.claim(base, fingerprint(*GGUFFile.open(config.model).paths))
        given = _keep_adapters(store, base, config)
        models = Models(config.model, base, given, store, config.context)
        stack.callback(models.close)
        jobs = Jobs(store, folder, config.model, config.memory_budget)
        stack.callback(jobs.close)
        engine = AdapterEngine(config.model, store, config.memory_budget)
        runs = Runs(store, folder, config.runs)
        served = Context(folder, store, models, jobs, engine, runs, config.adapter_folder)
        yield _routes(served, config)


def _routes(served: Context, config: ServerConfig) -> FastAPI:
    # The pages of docs_url and redoc_url would load scripts from the network.
    app = FastAPI(
        title="fwdllm",
        version=version("fwdllm"),
        docs_url=None,
        redoc_url=None,
        responses={"4XX": {"model": api_error.ErrorBody, "description": "An error of the request"}},
    )
    app.state.context = served
    for part in (completions, files, fine_tuning, loading, perturbations, predict, stream):
        app.include_router(part.router)
    api_error.install(app)
    metrics.install(app, served)
    app.add_middleware(
        Guard, host=config.host, api_key=config.api_key, origins=config.allow_origins
    )
    if config.allow_origins:  # outside the guard: browsers send preflight requests without a key
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allow_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["Content-Disposition", "Retry-After"],
        )
    return app


def _keep_adapters(store: Store, base: str, config: ServerConfig) -> list[AdapterRow]:
    """Put the given adapters into the store, under names of their own."""
    named: dict[str, Path] = {}
    for name, path in config.adapters:
        if name is None:
            name = f"{base}:{path.stem}"
        else:
            loading.check_name(name, base)
        if name in named:
            raise ConfigError(
                f"{path} and {named[name]} would both be {name}: name them, as in "
                f"--adapter NAME={path}"
            )
        named[name] = path
    return [loading.keep(store, config.model, name, path) for name, path in named.items()]
