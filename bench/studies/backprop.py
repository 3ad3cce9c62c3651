"""Fine-tuning a language model by exact gradients: here, and with PyTorch and PEFT beside it.

    python bench/studies/backprop.py MODEL.gguf TRAIN.jsonl HELD_OUT.jsonl OUT.jsonl
        [--sides ours,torch-float32,torch-bfloat16,forward-ad] [--steps 60] [--rate 2e-3]
        [--rows 64] [--targets attn_q,attn_v] [--examples 8] [--max-tokens 192]

All sides begin with one adapter and see the same batches; their steps take turns, so that whatever
else a machine does befalls all of them. PyTorch has the model's weights decoded, and batches
padded to their longest example. Only steps count as time. Each evaluation is a line of OUT.jsonl,
written when it is made: the side, the step, seconds of all its steps so far, their median, and the
loss of the held out rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import TrainState, train_step
from fwdllm.protocol.seeds import batch_indices

EVALUATED = (0, 1, 2, 5, 10, 20, 30, 40, 60, 100, 200, 400)


class Side(Protocol):
    """One way to train."""

    def step(self) -> None: ...

    def loss(self, examples: Sequence[Example]) -> float: ...


class Ours:
    """This engine, by a method of its trainer."""

    def __init__(
        self, model: Path, lora: LoRAConfig, config: TrainConfig, examples: Sequence[Example]
    ) -> None:
        self.engine = Engine.load(model, lora)
        self.config, self.examples = config, examples
        self.state = TrainState.initial(config, self.engine)
        self.exact = Engine.load(model, lora, exact=True)

    def step(self) -> None:
        train_step(self.engine, self.config, self.state, self.examples)

    def loss(self, examples: Sequence[Example]) -> float:
        assert self.engine.adapter is not None and self.exact.adapter is not None
        self.exact.adapter.theta[:] = self.engine.adapter.theta
        return self.exact.evaluate(examples, self.config.max_tokens).loss


class Torch:
    """PyTorch and PEFT, weights decoded to a type, AdamW of no decay."""

    def __init__(
        self,
        model: Path,
        lora: LoRAConfig,
        config: TrainConfig,
        examples: Sequence[Example],
        dtype: str,
    ) -> None:
        import peft
        import torch

        from fwdllm.bench.peft_peer import decode
        from fwdllm.engine.adapters.peft import save_peft
        from fwdllm.kernels.cpu import num_threads

        torch.set_num_threads(num_threads())
        self.engine = Engine.load(model, lora)
        assert self.engine.adapter is not None
        args = self.engine.args
        with tempfile.TemporaryDirectory() as folder:
            save_peft(self.engine.adapter, folder, args.n_heads, args.n_kv_heads, "")
            decoded = decode(self.engine, getattr(torch, dtype))
            self.model = peft.PeftModel.from_pretrained(decoded, folder, is_trainable=True)
        self.model.train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        self.config, self.examples, self.at = config, examples, 0

    def step(self) -> None:
        config = self.config
        chosen = batch_indices(config.seed, self.at, len(self.examples), config.batch_size)
        self.at += 1
        self.optimizer.zero_grad()
        total, count = self._sum([self.examples[i] for i in chosen])
        (total / count).backward()
        self.optimizer.step()

    def loss(self, examples: Sequence[Example]) -> float:
        import torch

        with torch.no_grad():
            sums = [self._sum(examples[i : i + 8]) for i in range(0, len(examples), 8)]
        return sum(float(total) for total, _ in sums) / sum(count for _, count in sums)

    def _sum(self, examples: Sequence[Example]) -> tuple[Any, int]:
        """The losses of the label tokens added up, and their number."""
        import torch
        import torch.nn.functional as F

        tokens = [self.engine.tokenize(e, self.config.max_tokens) for e in examples]
        width = max(len(t.ids) for t in tokens)
        ids = np.zeros((len(tokens), width), np.int64)
        labels = np.full((len(tokens), width), -100, np.int64)
        mask = np.zeros((len(tokens), width), np.int64)
        for i, t in enumerate(tokens):
            n = len(t.ids)
            ids[i, :n], mask[i, :n] = t.ids, 1
            labels[i, 1:n] = np.where(t.labels[1:], t.ids[1:], -100)
        logits = self.model(
            input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask), use_cache=False
        ).logits
        wanted = torch.tensor(labels[:, 1:]).reshape(-1)
        flat = logits[:, :-1].reshape(-1, logits.shape[-1]).float()
        kept = wanted != -100
        total = F.cross_entropy(flat[kept], wanted[kept], reduction="sum")
        return total, int((labels != -100).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "held_out", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--sides", default="ours,torch-float32,torch-bfloat16")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--targets", default="attn_q,attn_v")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=192)
    given = parser.parse_args()
    lora = LoRAConfig(given.rank, 2.0 * given.rank, tuple(given.targets.split(",")))
    config = TrainConfig(
        given.steps,
        batch_size=given.examples,
        max_tokens=given.max_tokens,
        learning_rate=given.rate,
        schedule="constant",
        method="backprop",
    )
    examples, held_out = read_jsonl(given.data), read_jsonl(given.held_out)[: given.rows]
    sides: dict[str, Side] = {}
    for name in given.sides.split(","):
        if name.startswith("torch-"):
            sides[name] = Torch(given.model, lora, config, examples, name.removeprefix("torch-"))
        else:
            method = "backprop" if name == "ours" else name
            changed = TrainConfig(**{**vars(config), "method": method})
            sides[name] = Ours(given.model, lora, changed, examples)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    with open(given.out, "a", encoding="utf-8") as out:
        for step in range(given.steps + 1):
            for name, side in sides.items():
                if step:
                    began = time.perf_counter()
                    side.step()
                    seconds[name].append(time.perf_counter() - began)
                if step in EVALUATED or step == given.steps:
                    line = {
                        "side": name,
                        "step": step,
                        "seconds": sum(seconds[name]),
                        "median_step": statistics.median(seconds[name]) if step else None,
                        "loss": side.loss(held_out),
                    }
                    print(json.dumps(line), file=out, flush=True)
                    print(f"{name:16s} step {step:3d} {line['seconds']:7.1f} s {line['loss']:.4f}")


if __name__ == "__main__":
    main()
