"""The exact gradient of what a decoder's last layer writes, and no way back through any layer.

Above the last product of the last layer, ``ffn_down``, are only the stream it adds to, the norm
of the output and the output matrix. So the gradient of the loss by what it writes follows in closed
form from the logits that a pass forward ends with:

    dL/dy = norm_vjp((softmax(logits) - onehot(label)) W_output),   dL/dW = sum over rows dL/dy x^T,

where x is what ffn_down reads. An adapter of this matrix alone learns far more from it than all
layers do from the slopes along random directions (docs/estimators.md).
"""

from __future__ import annotations

from fwdllm.engine.adapters.adapter import Adapter
from fwdllm.engine.errors import ConfigError

TARGET = "ffn_down"


def check(adapter: Adapter, n_layers: int) -> None:
    """ConfigError if the adapter has anything but ``TARGET`` of the last layer, or a head."""
    names = {target.name for target in adapter.targets}
    if adapter.head is not None or names != {f"blk.{n_layers - 1}.{TARGET}"}:
        raise ConfigError(
            f"method readout is for decoders, and trains {TARGET} of the last layer alone: choose "
            f"--targets {TARGET} --layers {n_layers - 1}, or another method"
        )
