"""The ClientApp: a node's model and data, and the answer to an assignment.

The node's configuration has ``data``, the path of a JSONL file; ``model``, the path of the GGUF
file, if it differs from the path in the run's configuration; and optionally ``memory-budget``, the
most bytes to use. Flower starts a process for every message; ``fwdllm federate node`` does not.
"""

from __future__ import annotations

from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from fwdllm.protocol.flower.messages import RECORD, Reply, Saved, Settings, Task
from fwdllm.protocol.flower.node import Node, NodeConfig

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer one assignment. Errors are raised, and Flower reports them to the server.

    The state of the adapter is in Flower's context, which lives as long as the run and the
    SuperNode's process.
    """
    task, settings = Task.of(message.content), Settings.of(context.run_config)
    node = Node(NodeConfig.of(context.node_config))
    report, saved = node.answer(settings, task, _saved(context))
    known = {name: value for name, value in vars(saved).items() if value is not None}
    context.state[RECORD] = ConfigRecord(known)
    return Message(Reply(report).content(), reply_to=message)


def _saved(context: Context) -> Saved:
    record = context.state.get(RECORD)
    if not isinstance(record, ConfigRecord):
        return Saved()
    return Saved(**{name: value for name, value in record.items() if isinstance(value, bytes)})
