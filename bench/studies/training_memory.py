"""What ideas for the memory of backprop save and cost, in PyTorch on decoded weights.

    python bench/studies/training_memory.py MODEL.gguf TRAIN.jsonl HELD_OUT.jsonl [OUT.jsonl]
        [--ideas "plain;wta-crs"] [--steps 10] [--sequences 8] [--tokens 192]

For a model of the llama family. Texts of the data, one after another, are cut into sequences of
equal length; each step takes some, and every token but the first of each is a label. Each idea has
a process of its own, for its peak memory. All have the same loss, whose logits are made a block at
a time and again on the way back, so that they do not hide what an idea saves. Prints a table in
Markdown; a line of OUT.jsonl has an idea's figures.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fwdllm.bench.worker import Worker
from fwdllm.kernels.cpu import num_threads
from fwdllm.resources import rss_bytes

RANK, SCALE = 8, 2.0
ADAPTED = ("q_proj", "v_proj")
LOSS_ROWS = 256  # whose logits exist at a time
KEPT = 0.3  # of the tokens, WTA-CRS's own choice
SIDE_WIDTH = 72  # an eighth of SmolLM2's, SHERL's own choice
DRAWS = 2  # of a gradient, to see its error


@dataclass(frozen=True)
class Idea:
    """trained: "lora", "all" or "side".  kept: share of the tokens kept for weights' gradients."""

    trained: str
    rate: float
    checkpoints: bool = False
    kept: float = 1.0
    fused: bool = False


IDEAS = {
    "plain": Idea("lora", 2e-3),
    "checkpoints": Idea("lora", 2e-3, checkpoints=True),
    "wta-crs": Idea("lora", 2e-3, kept=KEPT),
    "adalomo": Idea("lora", 0.2, fused=True),
    "sherl": Idea("side", 2e-3),
    "all, plain": Idea("all", 5e-5),
    "all, checkpoints": Idea("all", 5e-5, checkpoints=True),
    "all, wta-crs": Idea("all", 5e-5, kept=KEPT),
    "all, adalomo": Idea("all", 5e-4, fused=True),
    "all, adalomo, checkpoints": Idea("all", 5e-4, checkpoints=True, fused=True),
}


# WTA-CRS, arXiv 2305.15265


def winners(mass: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k of the rows and their factors, so that sums of rows weighted so are right on average.

    The heaviest rows are certain, as many as make the variance least (its theorem 2); the others
    are drawn with replacement by their mass.
    """
    p, order = (mass / mass.sum()).sort(descending=True)
    left = 1 - torch.cat([p.new_zeros(1), p.cumsum(0)[: k - 1]])  # with so many rows certain
    certain = int((left.clamp(min=0) / torch.arange(k, 0, -1)).argmin())
    rest = p[certain:]
    if rest.sum() <= 0:
        return order[:certain], torch.ones(certain)
    drawn = torch.multinomial(rest, k - certain, replacement=True)
    factors = rest.sum() / (rest[drawn] * (k - certain))
    rows = torch.cat([order[:certain], order[certain:][drawn]])
    return rows, torch.cat([torch.ones(certain), factors])


class Sampled(torch.autograd.Function):
    """x W^T, which keeps some rows of x for the gradient of W; that of x is exact."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: SampledLinear) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        mass = flat.norm(dim=1)
        if layer.norms is not None:
            mass = mass * layer.norms
        rows, factors = winners(mass, math.ceil(layer.kept * len(flat)))
        ctx.save_for_backward(flat[rows] * factors[:, None], rows, weight)
        ctx.layer = layer
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor, None]:
        kept, rows, weight = ctx.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1])
        ctx.layer.seen = flat.norm(dim=1)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, flat[rows].T @ kept, None


class SampledLinear(nn.Module):
    """norms: of the outputs' cotangents, a row each, if they are known from an earlier visit."""

    def __init__(self, weight: nn.Parameter, kept: float) -> None:
        super().__init__()
        self.weight, self.kept = weight, kept
        self.norms: Tensor | None = None
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept < 1 and torch.is_grad_enabled():
            return Sampled.apply(x, self.weight, self)
        return F.linear(x, self.weight)


class Lora(nn.Module):
    """A frozen linear layer and its adapter. What B reads is narrow and kept whole."""

    def __init__(self, base: nn.Linear, kept: float) -> None:
        super().__init__()
        self.base = base
        self.a = SampledLinear(nn.Parameter(torch.randn(RANK, base.in_features) / RANK), kept)
        nn.init.kaiming_uniform_(self.a.weight, a=math.sqrt(5))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * F.linear(self.a(x), self.b)


# AdaLomo, arXiv 2310.10195


class AdaLomo:
    """Algorithm 1: a weight moves as soon as its gradient is there, which is then freed."""

    def __init__(self, parameters: Sequence[nn.Parameter], rate: float) -> None:
        self.rate, self.step_number = rate, 0
        self.squares = {p: [torch.zeros(n) for n in p.shape] for p in parameters}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._update)

    def step(self) -> None:
        """All is done already, on the way back."""

    def zero_grad(self) -> None:
        self.step_number += 1

    @torch.no_grad()
    def _update(self, p: Tensor) -> None:
        assert p.grad is not None
        gradient, p.grad = p.grad, None
        square, past = gradient.square() + 1e-30, self.squares[p]
        fresh = self.step_number**-0.8
        for axis, mean in enumerate(past):
            others = [i for i in range(p.ndim) if i != axis]
            mean.lerp_(square.mean(others) if others else square, fresh)
        update = gradient * past[-1].rsqrt()
        if p.ndim == 2:
            update *= (past[0] / past[0].mean()).rsqrt()[:, None]
        update /= max(1.0, _rms(update))
        p -= self.rate * max(1e-3, _rms(p)) * update


def _rms(x: Tensor) -> float:
    return float(x.norm()) / math.sqrt(x.numel())


# SHERL, arXiv 2407.07523


class Tier(nn.Module):
    """A layer's feature made narrow: equation of the adapters in its section 3."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, SIDE_WIDTH)
        self.value = nn.Linear(SIDE_WIDTH, SIDE_WIDTH)
        self.gate = nn.Linear(SIDE_WIDTH, SIDE_WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x).relu()
        return (self.value(x) + x) * self.gate(x).sigmoid()


class Sherl(nn.Module):
    """What the last layer reads, corrected by the outputs of all layers before it.

    The frozen model's layers before the last one are only run forward. The correction begins at
    zero, so that training begins with the model as it is.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        width = model.config.hidden_size
        early, last = model.model.layers[:-1], model.model.layers[-1]
        self.tiers = nn.ModuleList(Tier(width) for _ in early)
        self.attention = nn.Linear(SIDE_WIDTH, 1)
        self.out = nn.Linear(SIDE_WIDTH, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.features: list[Tensor] = []
        for layer in early:
            layer.register_forward_hook(lambda _, __, output: self.features.append(output))
        last.register_forward_pre_hook(lambda _, given: (self(given[0]), *given[1:]))

    def forward(self, x: Tensor) -> Tensor:
        narrow = [tier(f) for tier, f in zip(self.tiers, self.features, strict=True)]
        self.features = []
        guide, others = narrow[-1], torch.stack(narrow[:-1], dim=-2)
        unit = F.normalize(others, dim=-1)
        redundancy = (unit @ unit.mT).relu().sum(-1, keepdim=True)
        weights = self.attention(others * guide[..., None, :]).relu() / redundancy
        mixed = (F.normalize(weights, p=1, dim=-2) * others).sum(-2) + guide
        return x + self.out(mixed.relu())


# Measuring


class Training:
    """An idea at work, in a process of its own; see ``bench.worker``."""

    def __init__(self, model: str, data: str, name: str) -> None:
        torch.set_num_threads(num_threads())
        torch.manual_seed(0)
        self.idea = IDEAS[name]
        self.model = transformers.AutoModelForCausalLM.from_pretrained(model)
        sequences = json.loads(Path(data).read_text())
        self.batches = iter([torch.tensor(batch) for batch in sequences["train"]])
        self.held_out = torch.tensor(sequences["held_out"])
        parameters = self._prepare()
        self.parameters = parameters
        self.optimizer: Any = (
            AdaLomo(parameters, self.idea.rate)
            if self.idea.fused
            else torch.optim.Adam(parameters, lr=self.idea.rate)
        )
        count = sum(p.numel() for p in parameters)
        before = self.judge()  # reads all weights of the file, too
        self.facts = {"parameters": count, "loaded_bytes": rss_bytes(), "before": before}

    def run(self) -> None:
        self.optimizer.zero_grad()
        self._loss(next(self.batches)).backward()
        self.optimizer.step()

    def judge(self) -> float:
        with torch.no_grad():
            return statistics.mean(float(self._loss(row[None])) for row in self.held_out)

    def errors(self) -> list[float]:
        """Relative errors of the next batch's gradient: at a first visit, and at a second."""
        if self.idea.kept == 1 or self.idea.fused:
            return [0.0, 0.0]
        batch = next(self.batches)
        layers = [m for m in self.model.modules() if isinstance(m, SampledLinear)]
        self._keep(layers, 1.0)
        exact = self._gradient(batch)
        self._keep(layers, self.idea.kept)
        errors = []
        for _ in range(2):
            found = [(self._gradient(batch) - exact).norm() / exact.norm() for _ in range(DRAWS)]
            errors.append(statistics.mean(map(float, found)))
            for layer in layers:
                layer.norms = layer.seen
        return errors

    @staticmethod
    def _keep(layers: Sequence[SampledLinear], kept: float) -> None:
        for layer in layers:
            layer.kept = kept

    def _gradient(self, batch: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        self._loss(batch).backward()
        return torch.cat([p.grad.flatten() for p in self.parameters])

    def _prepare(self) -> list[nn.Parameter]:
        """Make the model what the idea trains; returns what is trained."""
        idea, model = self.idea, self.model
        if idea.checkpoints:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train(idea.checkpoints)  # there is no dropout: to compute layers again, and no more
        model.requires_grad_(idea.trained == "all")
        if idea.trained == "side":
            self.side = Sherl(model)
            return list(self.side.parameters())
        for layer in model.model.layers:
            for part in (layer.self_attn, layer.mlp):
                for name, linear in list(part.named_children()):
                    if not isinstance(linear, nn.Linear):
                        continue
                    if idea.trained == "all" and idea.kept < 1:
                        setattr(part, name, SampledLinear(linear.weight, idea.kept))
                    elif idea.trained == "lora" and name in ADAPTED:
                        setattr(part, name, Lora(linear, idea.kept))
        return [p for p in model.parameters() if p.requires_grad]

    def _loss(self, ids: Tensor) -> Tensor:
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        hidden, wanted = hidden.flatten(0, 1), ids[:, 1:].flatten()
        blocks = zip(hidden.split(LOSS_ROWS), wanted.split(LOSS_ROWS), strict=True)
        losses = [checkpoint(self._block_loss, *b, use_reentrant=False) for b in blocks]
        return torch.stack(losses).sum() / len(wanted)

    def _block_loss(self, hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(self.model.lm_head(hidden), wanted, reduction="sum")


def write_inputs(given: argparse.Namespace, folder: Path) -> None:
    """The decoded model, and sequences of token ids."""
    from fwdllm.bench.peft_peer import decode
    from fwdllm.engine import Engine, read_jsonl

    engine = Engine.load(given.model)
    decode(engine, torch.float32).save_pretrained(folder / "model")

    def sequences(path: Path, n: int) -> list[list[int]]:
        ids: list[int] = []
        for example in read_jsonl(path):
            ids += map(int, engine.tokenize(example, None).ids)
            if len(ids) >= n * given.tokens:
                return [ids[i * given.tokens :][: given.tokens] for i in range(n)]
        raise SystemExit(f"{path} has fewer than {n} sequences of {given.tokens} tokens")

    n, steps = given.sequences, given.steps + 1
    train = sequences(given.data, steps * n)
    batches = [train[i * n :][:n] for i in range(steps)]
    held_out = sequences(given.held_out, given.rows)
    (folder / "data.json").write_text(json.dumps({"train": batches, "held_out": held_out}))


def measure(folder: Path, name: str, steps: int) -> dict[str, Any]:
    """An idea's figures."""
    options = {"model": str(folder / "model"), "data": str(folder / "data.json"), "name": name}
    environment = {"PYTHONPATH": str(Path(__file__).parent)}
    with Worker("training_memory:Training", options, environment) as worker:
        answers = [worker.run() for _ in range(steps)]
        return {
            "idea": name,
            **worker.facts,
            "peak_bytes": answers[-1].peak_rss_bytes,
            "seconds": statistics.median(answer.seconds for answer in answers),
            "loss": worker.call("judge"),
            "errors": worker.call("errors"),
        }


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Markdown. Memory is what training adds to the process with the model loaded."""
    rows: list[tuple[str, Callable[[dict[str, Any]], str]]] = [
        ("idea", lambda x: x["idea"]),
        ("trained", lambda x: f"{x['parameters'] / 1e6:.1f} M"),
        ("peak MB", lambda x: f"{x['peak_bytes'] / 1e6:,.0f}"),
        ("of it training", lambda x: f"{(x['peak_bytes'] - x['loaded_bytes']) / 1e6:,.0f}"),
        ("seconds a step", lambda x: f"{x['seconds']:.1f}"),
        ("gradient's error", lambda x: _percent(x["errors"])),
        ("held-out loss", lambda x: f"{x['before']:.4f} to {x['loss']:.4f}"),
    ]
    heads = [f"| {' | '.join(name for name, _ in rows)} |", "|" + " --- |" * len(rows)]
    return "\n".join(heads + [f"| {' | '.join(f(x) for _, f in rows)} |" for x in lines])


def _percent(errors: Sequence[float]) -> str:
    return " / ".join(f"{error:.0%}" for error in errors) if any(errors) else "none"


def figures(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as name:
        write_inputs(given, Path(name))
        for idea in given.ideas.split(";"):
            yield measure(Path(name), idea, given.steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "data", "held_out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--ideas", default=";".join(IDEAS), help="names with semicolons")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--rows", type=int, default=16)
    given = parser.parse_args()
    lines = []
    for line in figures(given):
        lines.append(line)
        if given.out:
            with open(given.out, "a", encoding="utf-8") as out:
                print(json.dumps(line), file=out)
    print(table(lines))


if __name__ == "__main__":
    main()
