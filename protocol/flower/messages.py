"""The contents of Flower's messages, and a run's settings in Flower's run configuration."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.settings import LoRAConfig
from fwdllm.protocol.federation import FederationConfig
from fwdllm.protocol.presets import preset
from fwdllm.protocol.wire import WireError, check_version

if TYPE_CHECKING:  # the process that computes does without Flower, which takes a second to import
    from flwr.app import ConfigRecord, RecordDict

# The key of our record in a message, and of a client's state in its Flower context.
RECORD = "fwdllm"


@dataclass(frozen=True)
class Task:
    """A message from the server to a client.

    assignment: see ``wire.encode_assignment``.  synchronization: see ``Server.synchronize``.
    model: the model's fingerprint, as JSON.  letter: of secure aggregation, of which only one stage
    has an assignment and a synchronization; empty without.
    """

    assignment: bytes
    synchronization: bytes
    model: str
    letter: bytes = b""

    def content(self) -> RecordDict:
        """As the content of a message."""
        return _content(dict(vars(self)))

    @staticmethod
    def of(content: RecordDict) -> Task:
        """The inverse of ``content``. Errors: WireError, VersionError.

        The version is looked at before anything else of a run: what this program does not know in
        a newer one's settings would be a puzzle.
        """
        record = _record(content)
        found = record.get("assignment"), record.get("synchronization"), record.get("model")
        if not (isinstance(found[0], bytes) and isinstance(found[1], bytes)):
            raise WireError("a message has no assignment")
        letter = record.get("letter", b"")
        if not isinstance(letter, bytes):
            raise WireError("a message has no letter but something else in its place")
        check_version(found[0] or letter)
        return Task(found[0], found[1], str(found[2]), letter)


@dataclass(frozen=True)
class Saved:
    """What a client remembers of a run from one message to the next.

    state: of the adapter, see ``wire.encode_state``.  member: see ``secure.member.Member``.
    history: what has led to the state, where sums alone are seen, see ``secure.history``.
    """

    state: bytes | None = None
    member: bytes | None = None
    history: bytes | None = None


@dataclass(frozen=True)
class Reply:
    """From a client: its report or letter, or None if the state that updates build on is lost."""

    report: bytes | None

    def content(self) -> RecordDict:
        """As the content of a message."""
        value: dict[str, Any] = {"lost": True} if self.report is None else {"report": self.report}
        return _content(value)

    @staticmethod
    def of(content: RecordDict) -> Reply:
        """The inverse of ``content``; any other content becomes an empty report, to be rejected."""
        try:
            record = _record(content)
        except WireError:
            return Reply(b"")
        if record.get("lost") is True:
            return Reply(None)
        report = record.get("report")
        return Reply(report if isinstance(report, bytes) else b"")


def _content(value: dict[str, Any]) -> RecordDict:
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({RECORD: ConfigRecord(value)})


def _record(content: RecordDict) -> ConfigRecord:
    from flwr.app import ConfigRecord

    record = content.get(RECORD)
    if not isinstance(record, ConfigRecord):
        raise WireError(f"a message has no record {RECORD!r}")
    return record


@dataclass(frozen=True)
class Settings:
    """A run's settings, from [tool.flwr.app.config] of the app.

    model: path of a GGUF file on the server; nodes may give a path of their own.  labels: of a
    classification head.  run_dir: the server's folder for ledger and adapter.  eval_data: path of a
    JSONL file on the server, or "".  min_nodes: number of nodes the server waits for.
    """

    federation: FederationConfig
    lora: LoRAConfig
    labels: tuple[str, ...]
    model: str
    run_dir: str
    eval_data: str
    min_nodes: int

    @staticmethod
    def of(run_config: Mapping[str, Any]) -> Settings:
        """Settings from a run configuration. Errors: ConfigError."""
        federation, lora = _table(run_config, "federation"), _table(run_config, "lora")
        name = federation.pop("preset", None)
        for key in ("model", "run-dir"):
            if not run_config.get(key):
                raise ConfigError(f"the run configuration has no {key}")
        for key in ("targets", "layers"):
            if key in lora:
                lora[key] = tuple(json.loads(str(lora[key])))
        try:
            config = FederationConfig(**federation) if name is None else preset(name, **federation)
            return Settings(
                config,
                LoRAConfig(**lora),
                tuple(json.loads(str(run_config.get("labels", "[]")))),
                str(run_config["model"]),
                str(run_config["run-dir"]),
                str(run_config.get("eval-data", "")),
                int(run_config.get("min-nodes", 2)),
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"the run configuration is not usable: {error}") from error

    def engine(self, model: str, memory_budget: int | None = None) -> Engine:
        """An engine for the model, with an empty adapter. Errors: ModelError, ConfigError."""
        return Engine.load(
            model,
            self.lora,
            labels=self.labels,
            literal=self.federation.literal,
            seed=self.federation.seed,
            memory_budget=memory_budget,
        )


def _table(run_config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One table of a configuration that Flower has flattened to keys like "federation.rounds"."""
    prefix = name + "."
    return {
        key.removeprefix(prefix).replace("-", "_"): value
        for key, value in run_config.items()
        if key.startswith(prefix)
    }
