"""fwdllm on Flower (https://flower.ai): a ServerApp, a ClientApp, the strategy, and a warm node.

``FwdLLMStrategy`` can be used in your own ServerApp. ``fwdllm federate init`` puts the two apps
into a Flower app directory. ``fwdllm federate node`` is a node that keeps its model.

Names are imported when they are first used: a ClientApp is a new process for every message and
needs nothing of the server, and the process that computes needs nothing of Flower.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fwdllm.protocol.flower.client_app import app as client_app
    from fwdllm.protocol.flower.server_app import app as server_app
    from fwdllm.protocol.flower.strategy import FwdLLMStrategy

__all__ = ["FwdLLMStrategy", "client_app", "server_app"]

_WHERE = {
    "FwdLLMStrategy": ("strategy", "FwdLLMStrategy"),
    "client_app": ("client_app", "app"),
    "server_app": ("server_app", "app"),
}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE[name]
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), attribute)
    return value
