"""Repeated passes of the same shape: recorded once as a CUDA graph, then launched as a whole.

A small model's kernels take less time than Python takes to launch them. A CUDA graph always uses
the memory it was recorded with, so inputs that differ between passes are copied to fixed tensors.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fwdllm.kernels.triton.runtime import DEVICE, array, displace, place, recorded

Run = Callable[[], list[torch.Tensor]]

# Above this many elements kernels take longer than launching them, so recording gains nothing. Of a
# 7B model on an H200: 2.4 million 53 ms without and 27 with, 9.4 million 67 and 65, 19 million 119
# and 116. A recording also holds the memory of its pass.
_LARGEST = 1 << 23
# Recordings that are kept; each holds the memory of its pass.
_MOST = 4


@dataclass
class _Recording:
    """A recorded pass. inputs: its fixed tensors.  launch: runs the pass, None until recorded.

    outputs: tensors that ``launch`` fills.  held: tensors that it reads, kept alive so that nothing
    else gets their memory.
    """

    inputs: list[torch.Tensor]
    launch: Callable[[], object] | None = None
    outputs: list[torch.Tensor] | None = None
    held: list[torch.Tensor] | None = None


recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
# Whether passes are recorded; False after a recording has failed.
enabled = True


def repeated(
    key: Hashable | None, size: int, inputs: Sequence[np.ndarray], run: Run
) -> list[torch.Tensor]:
    """What ``run`` returns; from the second call with a key on, by a recording of it.

    key: equal for passes that differ only in the contents of ``inputs``; None for a pass that must
    not be recorded.  size: elements of a layer's activations.  inputs: all arrays that ``run``
    reads by ``constant`` or ``array`` and that differ between passes. The result is valid until the
    next call.
    """
    if key is None or size > _LARGEST or not enabled:
        return run()
    found = recordings.get(key)
    if found is None:
        found = recordings[key] = _Recording([array(x).clone() for x in inputs])
        if len(recordings) > _MOST:
            recordings.popitem(last=False)
        # Also compiles the kernels, which cannot be recorded.
        return _on(inputs, found.inputs, run)
    recordings.move_to_end(key)
    for x, there in zip(inputs, found.inputs, strict=True):
        there.copy_(array(x))
    if found.launch is None:
        try:
            found.launch, found.outputs, found.held = _record(
                lambda: _on(inputs, found.inputs, run)
            )
        except RuntimeError as error:
            return _give_up(error, run)
    found.launch()
    assert found.outputs is not None
    return found.outputs


def _on(
    inputs: Sequence[np.ndarray], there: Sequence[torch.Tensor], run: Run
) -> list[torch.Tensor]:
    """What ``run`` returns when it reads the tensors ``there`` instead of the arrays."""
    for x, tensor in zip(inputs, there, strict=True):
        place(x, tensor)
    try:
        return run()
    finally:
        for x in inputs:
            displace(x)


def _record(run: Run) -> tuple[Callable[[], object], list[torch.Tensor], list[torch.Tensor]]:
    """Record ``run``: a function that repeats it, the outputs that fills, the tensors it reads."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with recorded() as held, torch.cuda.graph(graph):
            outputs = run()
        return graph.replay, outputs, held
    # The interpreter has no CUDA graphs: run() is called again, on the inputs' contents by then.
    with recorded() as held:
        outputs = [x.clone() for x in run()]

    def launch() -> None:
        with recorded():
            for to, x in zip(outputs, run(), strict=True):
                to.copy_(x)

    return launch, outputs, held


def _give_up(error: RuntimeError, run: Run) -> list[torch.Tensor]:
    global enabled
    enabled = False
    recordings.clear()
    warnings.warn(f"passes are not recorded as CUDA graphs: {error}", stacklevel=3)
    return run()
