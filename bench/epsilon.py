"""Which epsilon? Correlation of 64 directional derivatives with PyTorch's, by epsilon.

    python -m fwdllm.bench.epsilon MODEL.gguf DATA.jsonl [--examples 8] [--max-tokens 64]

The adapter's B is random, as in the middle of training. docs/decisions.md keeps the results.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from fwdllm.bench.inputs import half_trained
from fwdllm.bench.torch_model import TorchModel, gradient
from fwdllm.engine import Engine, LoRAConfig, read_jsonl
from fwdllm.engine.data import labels_of
from fwdllm.kernels import cpu

EPSILONS = (1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
SEEDS = np.arange(64, dtype=np.uint64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    examples = read_jsonl(options.data)[: options.examples]
    labels = labels_of(read_jsonl(options.data))

    def load(exact: bool) -> Engine:
        return half_trained(Engine.load(options.model, LoRAConfig(), labels=labels, exact=exact))

    engine = load(exact=True)
    assert engine.adapter is not None
    batch = engine.encode(examples, options.max_tokens)
    true = gradient(TorchModel(engine), batch)[: engine.adapter.n_lora]
    want = engine.ops.seeded_dot(true.astype(np.float32), SEEDS)
    print("| arithmetic, method |", " | ".join(f"{e:g}" for e in EPSILONS), "|")
    print("| --- |" + " --- |" * len(EPSILONS))
    for exact in (True, False):
        engine = load(exact)
        for method in ("central", "forward-difference"):
            row = []
            for epsilon in EPSILONS:
                probe = engine.directional_derivatives(batch, SEEDS, method, epsilon)
                row.append(f"{np.corrcoef(probe.derivative, want)[0, 1]:.5f}")
            name = "fp32" if exact else "bf16" if cpu.isa == "avx512_bf16" else "int8"
            print(f"| {name}, {method} |", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
