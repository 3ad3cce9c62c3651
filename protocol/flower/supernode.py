"""A SuperNode that stays warm: it takes the server's messages itself and has its worker answer.

Flower's own SuperNode looks for messages every three seconds and starts two programs for each; on a
small model that is most of a round. This one speaks to SuperLink by Flower's functions, with the
same keys and certificates, and answers as the ClientApp does. It does not run the app's code, only
its own: of the app it reads the settings.
"""

from __future__ import annotations

import signal
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from logging import ERROR, INFO
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Error, Message, MessageType
from flwr.common.config import get_fused_config_from_fab
from flwr.common.constant import ErrorCode
from flwr.common.logger import log
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_connection import http_request_response

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol.flower.messages import Reply, Saved, Task
from fwdllm.protocol.flower.node import NodeConfig
from fwdllm.protocol.flower.polling import pause
from fwdllm.protocol.flower.worker import Answer, Worker

# Seconds without a message after which the model leaves the memory: longer than rounds take, and
# loading it again is a second.
_IDLE = 600.0
# Parts of a message: itself, its content and our record in that. They travel at the same time, as
# SuperLink tells of a message with the first, and who then misses the last waits a second.
_PARTS = 3
# Instead of that second.
_BACKOFF = 0.1
# Runs whose settings and states are kept; a state is of the adapter's size, times up to three.
_MAX_RUNS = 4


@dataclass(frozen=True)
class Link:
    """The way to SuperLink.

    address: host:port.  root_certificates: PEM file, None: the system's.  key: the node's private
    key, if SuperLink asks for one.  insecure: without TLS.
    """

    address: str
    root_certificates: Path | None = None
    key: Path | None = None
    insecure: bool = False


@dataclass
class _Run:
    config: dict[str, Any]
    saved: Saved = field(default_factory=Saved)


def run(link: Link, config: NodeConfig) -> None:
    """Answer messages until the process is told to end. Errors: ConfigError."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that SuperLink is told
    worker = Worker(config)
    try:
        serve(link, worker)
    except KeyboardInterrupt:
        return
    finally:
        worker.end()
    raise ConfigError(f"the connection to {link.address} has failed; start the node again")


def serve(link: Link, worker: Worker) -> None:
    """Be a node for as long as the connection holds. Errors: ConfigError.

    worker: computes; several nodes of a process may have the same.
    """
    certificates, keys = _certificates(link), _keys(link)
    with http_request_response(link.address, link.insecure, certificates, keys) as connection:
        log(INFO, "SuperNode ID: %s", connection[0])
        _Node(connection, worker).serve()


class _Node:
    def __init__(self, connection: Any, worker: Worker) -> None:
        (
            self.id,
            self._receive,
            self._send,
            self._get_run,
            self._get_app,
            self._pull,
            self._push,
            self._confirm,
        ) = connection
        self._worker = worker
        self._runs: OrderedDict[int, _Run] = OrderedDict()

    def serve(self) -> None:
        """Answer messages, one after the other, for as long as the connection holds."""
        since, usual = time.monotonic(), 0.0
        while True:
            began = time.monotonic()
            found = self._next()
            if found is not None:
                usual = began - since
                self._try(*found)
                since = time.monotonic()
                continue
            now = time.monotonic()
            if now - since > _IDLE:
                self._worker.end()
            pause(now - since, now - began, usual)

    def _next(self) -> tuple[Message, Any] | None:
        try:
            return self._receive()
        except RunNotRunningException:
            return None

    def _try(self, head: Message, tree: Any) -> None:
        try:
            self._handle(head, tree)
        except RunNotRunningException:
            log(INFO, "run %s has ended; its message is left", head.metadata.run_id)
        except Exception as error:  # the next message may go better
            log(ERROR, "message %s got no answer: %s", tree.object_id, error)

    def _handle(self, head: Message, tree: Any) -> None:
        began, run_id = time.monotonic(), head.metadata.run_id
        message = pull_and_inflate_object_from_tree(
            tree,
            lambda object_id: self._pull(run_id, object_id),
            lambda object_id: self._confirm(run_id, object_id),
            return_type=Message,
            max_concurrent_pulls=_PARTS,
            initial_backoff=_BACKOFF,
        )
        message.metadata.__dict__["_message_id"] = tree.object_id  # it does not hold its own
        reply = self._reply(message, run_id)
        reply.metadata.__dict__["_message_id"] = reply.object_id
        wanted, session = self._send(reply, get_object_tree(reply), time.monotonic() - began)
        push_objects(
            get_all_nested_objects(reply),
            lambda object_id, content: self._push(run_id, session, object_id, content),
            object_ids_to_push=wanted,
            max_concurrent_pushes=_PARTS,
        )
        log(INFO, "a message was answered in %.2f s", time.monotonic() - began)

    def _reply(self, message: Message, run_id: int) -> Message:
        answer = self._answer(message, run_id)
        if answer.fault is None:
            return Message(Reply(answer.report).content(), reply_to=message)
        log(ERROR, "a message was not answered: %s", answer.fault)
        error = Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason=answer.fault)
        return Message(error, reply_to=message)

    def _answer(self, message: Message, run_id: int) -> Answer:
        try:
            if message.metadata.message_type != MessageType.TRAIN:
                raise ConfigError(f"a node of fwdllm does not {message.metadata.message_type}")
            run, before = self._run(run_id), self._worker.pid
            answer = self._worker.ask(run.config, Task.of(message.content), run.saved)
        except Exception as error:  # whatever the server sent, it is told
            return Answer(fault=f"{type(error)}:<'{error}'>")
        if self._worker.pid != before:
            log(INFO, "process %s computes", self._worker.pid)
        run.saved = answer.saved or run.saved
        return answer

    def _run(self, run_id: int) -> _Run:
        """A run's settings, which SuperLink has from the app, and the node's state in it."""
        if run_id not in self._runs:
            run = self._get_run(run_id)
            app = self._get_app(run.fab_hash, run_id)
            self._runs[run_id] = _Run(dict(get_fused_config_from_fab(app.content, run)))
        self._runs.move_to_end(run_id)
        while len(self._runs) > _MAX_RUNS:
            self._runs.popitem(last=False)
        return self._runs[run_id]


def _certificates(link: Link) -> bytes | None:
    if link.root_certificates is None:
        return None
    try:
        return link.root_certificates.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {link.root_certificates}: {error.strerror}") from error


def _keys(link: Link) -> Any:
    if link.key is None:
        return None
    try:
        private = load_ssh_private_key(link.key.read_bytes(), None)
    except OSError as error:
        raise ConfigError(f"cannot read {link.key}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{link.key} is not a private key of ssh-keygen: {error}") from error
    if not isinstance(private, EllipticCurvePrivateKey):
        raise ConfigError(
            f"{link.key} is no key of an elliptic curve; ssh-keygen -t ecdsa makes one"
        )
    return private, private.public_key()
