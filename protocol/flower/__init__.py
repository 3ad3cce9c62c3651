"""fwdllm on Flower (https://flower.ai): a ServerApp, a ClientApp and the strategy.

``FwdLLMStrategy`` can be used in your own ServerApp. ``fwdllm federate init`` puts these two apps
into a Flower app directory.
"""

from fwdllm.protocol.flower.client_app import app as client_app
from fwdllm.protocol.flower.server_app import app as server_app
from fwdllm.protocol.flower.strategy import FwdLLMStrategy

__all__ = ["FwdLLMStrategy", "client_app", "server_app"]
