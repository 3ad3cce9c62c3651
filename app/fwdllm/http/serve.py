"""Starting the server."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from fwdllm.engine.errors import ConfigError
from fwdllm.http.application import ServerConfig, application
from fwdllm.http.connections import Connection
from fwdllm.http.context import Context
from fwdllm.hub import local_path
from fwdllm.resources import parse_bytes

# Time for answers in progress when the server is stopped.
_GRACE_SECONDS = 5
# Time for threads that should have ended with them; one in the middle of a long text has not.
_HARD_SECONDS = 2
# How long Python lets one thread go on before another: a text that is generated needs Python some
# ten times a token, and beside the 5 ms that are its default, each would be as long as a token.
_SWITCH_SECONDS = 0.0005
# Longer than clients keep idle connections (httpx: 5 s), so that none is closed during a request.
_KEEP_ALIVE_SECONDS = 75


def run(
    model: str,
    adapters: Sequence[str],
    adapter_folder: Path | None,
    host: str,
    port: int,
    api_key: str | None,
    state: Path,
    runs: Path | None,
    memory_budget: str | None,
    context: int | None,
    allow_origins: Sequence[str],
) -> None:
    """Serve until interrupted; see ``fwdllm serve --help``.

    Errors: ConfigError for a host that is not local if there is no key, and for a host that cannot
    be bound; those of ``application``.
    """
    if api_key is None and not is_local(host):
        raise ConfigError(f"others can reach {host}: choose a key with --api-key or FWDLLM_API_KEY")
    api_key = None if api_key is None else api_key.strip()
    if api_key == "":
        raise ConfigError("the API key is empty")
    if "*" in allow_origins:
        raise ConfigError("--allow-origin takes sites, not *: any page could use the server")
    sys.setswitchinterval(_SWITCH_SECONDS)
    os.umask(0o077)  # files of the server are only for its user
    bound = _bind(host, port)
    config = ServerConfig(
        model=local_path(model),
        state=state,
        memory_budget=parse_bytes(memory_budget) if memory_budget else _half_of_memory(),
        adapters=tuple(map(named, adapters)),
        adapter_folder=None if adapter_folder is None else _existing(adapter_folder),
        host=host,
        api_key=api_key,
        runs=runs,
        context=context,
        allow_origins=tuple(allow_origins),
    )
    with bound, application(config) as app:
        address = f"[{host}]" if ":" in host else host
        bound.listen()  # a reader of the line below may connect at once
        print(f"http://{address}:{bound.getsockname()[1]}", flush=True)
        server = _Server(
            uvicorn.Config(
                app,
                http=Connection,
                ws="none",
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=_GRACE_SECONDS,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            )
        )
        with _stop_quietly():
            asyncio.run(server.serve([bound]))


class _Server(uvicorn.Server):
    """uvicorn's server; once it is told to stop, the process ends, whatever its threads do."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """As of the base class."""
        super().handle_exit(sig, frame)
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        began = time.monotonic()
        served: Context = self.config.app.state.context  # type: ignore[union-attr]
        served.jobs.close()
        time.sleep(max(0.0, began + _GRACE_SECONDS - time.monotonic()) + _HARD_SECONDS)
        served.models.end_processes()
        print("fwdllm: a request did not end and was abandoned", file=sys.stderr, flush=True)
        os._exit(1)


@contextlib.contextmanager
def _stop_quietly() -> Iterator[None]:
    """A context in which SIGINT and SIGTERM stop the server, but not the process.

    The process still has jobs to save. uvicorn raises the signal that stopped it again at its end.
    """
    stops = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.signal(number, lambda *_: None) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def named(text: str) -> tuple[str | None, Path]:
    """An adapter and its name, None if only a path is given."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return None, Path(text)
    return name, Path(path)


def _existing(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder")
    return folder.resolve()


def is_local(host: str) -> bool:
    """Whether a server bound to this host can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With an explicit protocol asyncio sets TCP_NODELAY; else every answer is delayed by 40 ms.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        if os.name == "posix":  # on Windows two servers could share the port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise ConfigError(f"cannot bind {host}:{port}: {error.strerror or error}") from error
    return bound


def _half_of_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    except (AttributeError, OSError, ValueError):
        return parse_bytes("4GiB")
