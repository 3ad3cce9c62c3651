"""The ClientApp: a node's model and data, and the answer to an assignment.

The node's configuration has ``data``, the path of a JSONL file; ``model``, the path of the GGUF
file, if it differs from the path in the run's configuration; and optionally ``memory-budget``, the
most bytes to use.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fwdllm.engine.data.jsonl import check_labels, read_jsonl
from fwdllm.engine.errors import ConfigError
from fwdllm.engine.files import fingerprint
from fwdllm.engine.gguf.file import GGUFFile
from fwdllm.protocol import wire
from fwdllm.protocol.client import answer
from fwdllm.protocol.flower.messages import RECORD, Reply, Settings, Task
from fwdllm.protocol.replica import Replica

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one assignment. Errors are raised, and Flower reports them to the server."""
    began = time.perf_counter()
    settings, task = Settings.of(context.run_config), Task.of(message.content)
    model = str(context.node_config.get("model", settings.model))
    data = context.node_config.get("data")
    if not data:
        raise ConfigError("the node's configuration does not name its data")
    if json.loads(task.model) != fingerprint(*GGUFFile.open(model).paths):
        raise ConfigError(f"{model} is not the model of this federation")
    budget = context.node_config.get("memory-budget")
    engine = settings.engine(model, None if budget is None else int(budget))
    assert engine.adapter is not None
    replica = Replica(settings.federation, engine.adapter)
    assignment = wire.decode_assignment(task.assignment)
    if not _synchronize(replica, context, task.synchronization, assignment.round):
        return Message(Reply(None).content(), reply_to=message)
    examples = read_jsonl(Path(str(data)))
    if settings.labels:
        check_labels(examples, settings.labels)
    report = answer(engine, replica.space, assignment, engine.separate(examples))
    report = dataclasses.replace(report, seconds=time.perf_counter() - began)
    return Message(Reply(wire.encode_report(report)).content(), reply_to=message)


def _synchronize(replica: Replica, context: Context, data: bytes, round: int) -> bool:
    """Bring the node's adapter from its saved state to a round; False if that state was lost.

    The state is in Flower's context, which lives as long as the run and the node's process.
    Errors: WireError, NumericsError.
    """
    messages = wire.decode_many(data)
    saved = context.state.get(RECORD)
    states = [m for m in messages if wire.is_state(m)]
    if not states and isinstance(saved, ConfigRecord) and isinstance(saved["state"], bytes):
        states = [saved["state"]]
    for state in states:
        try:
            replica.load_arrays(wire.decode_state(state))
        except ValueError as error:
            raise wire.WireError(f"a state is not of this run: {error}") from error
    for message in messages:
        if not wire.is_state(message):
            update = wire.decode_update(message)
            if update.round == replica.round:  # earlier updates are in the saved state
                replica.apply(update)
    if replica.round != round:
        return False
    arrays = {name: a for name, a in replica.to_arrays().items() if name != "gradient"}
    context.state[RECORD] = ConfigRecord({"state": wire.encode_state(arrays)})
    return True
