"""Fine-tuning a language model by several ways, on the same batches from the same adapter.

    python bench/studies/training.py measure MODEL.gguf TRAIN.jsonl HELD_OUT.jsonl OUT.jsonl
        [--ways backprop,forward-ad,peft-float32] [--steps 60] [--seconds 3600] [--rate 2e-3]
        [--forward-rate 1e-3] [--perturbations 8] [--rows 64] [--targets attn_q,attn_v] [--rank 8]
        [--examples 8] [--max-tokens 192]
    python bench/studies/training.py draw OUT.jsonl PLOT.png

Each way has a process of its own, for its peak memory to be known, and their steps take turns, so
that whatever else a machine does befalls all of them. A way ends after so many steps, or when its
steps have taken so many seconds. PyTorch has the model's weights decoded, and batches padded to
their longest example. The held-out loss is that of the adapters in this engine's fp32 arithmetic,
found in another process, so neither its time nor its memory counts. Each evaluation is a line of
OUT.jsonl, written when it is made: the way, the step, seconds of all its steps so far, their
median, the loss, and the most bytes its process has had resident.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fwdllm.bench.pictures import curves
from fwdllm.bench.worker import Worker
from fwdllm.engine import Engine, Example, LoRAConfig, read_jsonl
from fwdllm.engine.adapters.io import save_gguf
from fwdllm.kernels.cpu import num_threads
from fwdllm.protocol.config import TrainConfig
from fwdllm.protocol.local import TrainState, train_step
from fwdllm.protocol.seeds import batch_indices

EVALUATED = (0, 1, 2, 5, 10, 20, 30, 40, 60, 100, 200, 400)
OURS = ("backprop", "forward-ad", "central")
# The type of the decoded weights, and whether layers are computed again on the way back.
PEFT = {
    "peft-float32": ("float32", False),
    "peft-float32-checkpoints": ("float32", True),
    "peft-bfloat16": ("bfloat16", False),
}


class Ours:
    """This engine, by a method of its trainer. adapter: a file to begin with, and to save to."""

    def __init__(self, model: str, data: str, adapter: str, config: Mapping[str, Any]) -> None:
        self.engine = Engine.load(model, adapter=adapter)
        self.config, self.adapter = TrainConfig(**config), adapter
        self.examples = read_jsonl(data)
        self.state = TrainState.initial(self.config, self.engine)
        self.facts: dict[str, Any] = {}

    def run(self) -> None:
        train_step(self.engine, self.config, self.state, self.examples)

    def save(self) -> None:
        assert self.engine.adapter is not None
        save_gguf(self.engine.adapter, self.adapter)


class Peft:
    """PyTorch and PEFT, AdamW of no decay; nothing of this engine is in the process.

    model: a folder of transformers.  batches: a file of steps' ``tokens_of``.  adapter: a PEFT
    folder to begin with, and to save to.
    """

    def __init__(
        self, model: str, batches: str, adapter: str, rate: float, dtype: str, checkpoints: bool
    ) -> None:
        import peft
        import torch
        import transformers

        torch.set_num_threads(num_threads())
        base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        if checkpoints:
            base.gradient_checkpointing_enable()
            base.enable_input_require_grads()
        self.model = peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).train()
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(parameters, lr=rate)
        self.batches: Iterator[list[Any]] = iter(json.loads(Path(batches).read_text()))
        self.adapter = adapter
        self.facts = {"peft": peft.__version__, "torch": torch.__version__}

    def run(self) -> None:
        self.optimizer.zero_grad()
        self._loss(next(self.batches)).backward()
        self.optimizer.step()

    def save(self) -> None:
        self.model.save_pretrained(self.adapter)

    def _loss(self, batch: Sequence[tuple[list[int], list[bool]]]) -> Any:
        """Mean loss of the label tokens."""
        import torch
        import torch.nn.functional as F

        width = max(len(ids) for ids, _ in batch)
        ids = torch.zeros((len(batch), width), dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (tokens, marked) in enumerate(batch):
            n = len(tokens)
            ids[i, :n], mask[i, :n], labels[i, :n] = torch.tensor(tokens), 1, torch.tensor(marked)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        wanted = labels[:, 1:]
        return F.cross_entropy(logits[:, :-1][wanted].float(), ids[:, 1:][wanted])


@dataclass
class Runner:
    """A way's process. adapter: the file its ``save`` writes.  seconds: of its steps."""

    worker: Worker
    adapter: Path
    seconds: list[float]
    peak: int = 0

    def step(self) -> None:
        answer = self.worker.run()
        self.seconds.append(answer.seconds)
        self.peak = answer.peak_rss_bytes


def tokens_of(
    engine: Engine, config: TrainConfig, examples: Sequence[Example]
) -> list[list[tuple[list[int], list[bool]]]]:
    """The token ids and label marks of each example of each step."""
    steps = []
    for step in range(config.steps):
        chosen = batch_indices(config.seed, step, len(examples), config.batch_size)
        tokens = [engine.tokenize(examples[i], config.max_tokens) for i in chosen]
        steps.append([(list(map(int, t.ids)), list(map(bool, t.labels))) for t in tokens])
    return steps


def open_peft(name: str, engine: Engine, config: TrainConfig, data: Path, folder: Path) -> Runner:
    """The process of a way of ``PEFT``; files that all of them read are made by the first."""
    from fwdllm.engine.adapters.peft import save_peft

    model, batches, adapter = folder / "model", folder / "batches.json", folder / name
    if not batches.exists():
        import torch

        from fwdllm.bench.peft_peer import decode

        decode(engine, torch.float32).save_pretrained(model)
        batches.write_text(json.dumps(tokens_of(engine, config, read_jsonl(data))))
    assert engine.adapter is not None
    save_peft(engine.adapter, adapter, engine.args.n_heads, engine.args.n_kv_heads, "")
    dtype, checkpoints = PEFT[name]
    options = {
        "model": str(model),
        "batches": str(batches),
        "adapter": str(adapter),
        "rate": config.learning_rate,
        "dtype": dtype,
        "checkpoints": checkpoints,
    }
    return Runner(_worker("Peft", options), adapter, [])


def open_ours(engine: Engine, config: TrainConfig, data: Path, folder: Path) -> Runner:
    """The process of a way of ``OURS``."""
    assert engine.adapter is not None
    adapter = folder / f"{config.method}.gguf"
    save_gguf(engine.adapter, adapter)
    options = {
        "model": str(engine.file.path),
        "data": str(data),
        "adapter": str(adapter),
        "config": asdict(config),
    }
    return Runner(_worker("Ours", options), adapter, [])


def _worker(side: str, options: Mapping[str, Any]) -> Worker:
    return Worker(f"training:{side}", options, {"PYTHONPATH": str(Path(__file__).parent)})


def measure(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Train by all ways in turns; a value for each evaluation."""
    config = TrainConfig(
        given.steps,
        batch_size=given.examples,
        max_tokens=given.max_tokens,
        learning_rate=given.rate,
        perturbations=given.perturbations,
        schedule="constant",
        method="backprop",
    )
    lora = LoRAConfig(given.rank, 2.0 * given.rank, tuple(given.targets.split(",")))
    held_out = read_jsonl(given.held_out)[: given.rows]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        engine = Engine.load(given.model, lora)
        runners = {}
        for name in given.ways.split(","):
            if name in PEFT:
                runners[name] = open_peft(name, engine, config, given.data, folder)
            else:
                rate = given.rate if name == "backprop" else given.forward_rate
                changed = {**asdict(config), "method": name, "learning_rate": rate}
                runners[name] = open_ours(engine, TrainConfig(**changed), given.data, folder)
            stack.enter_context(runners[name].worker)
        for step in range(given.steps + 1):
            for name, runner in list(runners.items()):
                if step:
                    runner.step()
                seconds = sum(runner.seconds)
                ended = step == given.steps or seconds >= given.seconds
                if ended or step in EVALUATED:
                    runner.worker.call("save")
                    judge = Engine.load(given.model, adapter=runner.adapter, exact=True)
                    yield {
                        "way": name,
                        "step": step,
                        "seconds": seconds,
                        "median_step": statistics.median(runner.seconds) if step else None,
                        "loss": judge.evaluate(held_out, given.max_tokens).loss,
                        "peak_rss_bytes": runner.peak,
                    }
                if ended:
                    del runners[name]


def draw(out: Path, plot: Path) -> None:
    """Draw the held-out loss of all ways by the seconds their steps have taken."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for text in out.read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        if line["step"]:
            lines.setdefault(line["way"], []).append((line["seconds"], line["loss"]))
        else:
            before = line["loss"]
    curves(lines, {"before": before}, "seconds", "held-out loss (nats)", plot, log=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    for name in ("model", "data", "held_out", "out"):
        measuring.add_argument(name, type=Path)
    measuring.add_argument("--ways", default=",".join([*OURS, *PEFT]))
    measuring.add_argument("--steps", type=int, default=60)
    measuring.add_argument("--seconds", type=float, default=3600)
    measuring.add_argument("--rate", type=float, default=2e-3)
    measuring.add_argument("--forward-rate", type=float, default=1e-3)
    measuring.add_argument("--perturbations", type=int, default=8)
    measuring.add_argument("--rows", type=int, default=64)
    measuring.add_argument("--targets", default="attn_q,attn_v")
    measuring.add_argument("--rank", type=int, default=8)
    measuring.add_argument("--examples", type=int, default=8)
    measuring.add_argument("--max-tokens", type=int, default=192)
    drawing = commands.add_parser("draw")
    for name in ("out", "plot"):
        drawing.add_argument(name, type=Path)
    given = parser.parse_args()
    if given.command == "draw":
        draw(given.out, given.plot)
        return
    with open(given.out, "a", encoding="utf-8") as out:
        for line in measure(given):
            print(json.dumps(line), file=out, flush=True)
            print(
                f"{line['way']:25s} step {line['step']:3d} {line['seconds']:7.1f} s "
                f"{line['peak_rss_bytes'] / 1e6:6.0f} MB {line['loss']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
