"""fwdllm on Flower (https://flower.ai): the apps of a server and of its clients, and the strategy.

``FwdLLMStrategy`` can be used in a ServerApp of one's own. The apps are those that
``fwdllm federate init`` puts into a Flower app directory.
"""

from fwdllm.protocol.flower.client_app import app as client_app
from fwdllm.protocol.flower.server_app import app as server_app
from fwdllm.protocol.flower.strategy import FwdLLMStrategy

__all__ = ["FwdLLMStrategy", "client_app", "server_app"]
