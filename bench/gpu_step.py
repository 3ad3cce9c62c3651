"""Tuning steps of models on this GPU, with the engine's own graph.

With random weights, which go to the GPU without a file, this needs torch, triton and NumPy only.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fwdllm.bench.gpu_peers import PeerModel
from fwdllm.bench.shapes import Shape, matrices, random_weights, std_of, vectors
from fwdllm.engine.adapters.adapter import Adapter, Target, layout
from fwdllm.engine.data.batch import Batch, Tokens, pack
from fwdllm.engine.directions.dense import Dense
from fwdllm.engine.estimators.plan import plan
from fwdllm.engine.graph import Variants
from fwdllm.engine.models import FAMILIES, llama
from fwdllm.engine.models.dimensions import Dimensions
from fwdllm.engine.models.graph import OwnGraph
from fwdllm.engine.models.rotary import Rotary
from fwdllm.engine.models.weights import Weights
from fwdllm.engine.settings import LoRAConfig
from fwdllm.kernels import triton as ops
from fwdllm.kernels.triton import recording
from fwdllm.kernels.triton.decode import decoded
from fwdllm.kernels.triton.runtime import DEVICE, DeviceWeight
from fwdllm.kernels.types import QuantType, Weight

# So small that thousands of steps along random directions hardly change the model.
_UPDATE_RATE = 1e-6


class RandomWeights:
    """Random tensors of a llama decoder on the device, in place of ``engine.models.weights``."""

    def __init__(self, shape: Shape, type: QuantType) -> None:
        rng = np.random.default_rng(0)
        self._matrices: dict[str, DeviceWeight] = {}
        # Layers have the same rows in another order each: new ones would take a minute.
        made: dict[tuple[int, int, float], np.ndarray] = {}
        for i, (name, n_out, n_in) in enumerate(matrices(shape)):
            std = std_of(shape, name, n_in)
            if (n_out, n_in, std) not in made:
                made[n_out, n_in, std] = random_weights(rng, type, n_out, n_in, std)
            data = np.roll(made[n_out, n_in, std], 37 * i, axis=0)
            self._matrices[name] = ops.weight(Weight(data, type, n_out, n_in))
        self._vectors = vectors(rng, shape)

    def matrix(self, name: str) -> DeviceWeight:
        return self._matrices[f"{name}.weight"]

    def has(self, name: str) -> bool:
        return f"{name}.weight" in self._matrices

    def vector(self, name: str) -> np.ndarray:
        return self._vectors[name]

    def vector_or_none(self, name: str) -> np.ndarray | None:
        return self._vectors.get(name)

    @property
    def nbytes(self) -> int:
        return sum(w.data.numel() for w in self._matrices.values())


@dataclass(frozen=True)
class StepModel:
    """A model with an adapter whose B is random, not zero, as if half trained."""

    family: str
    args: Dimensions
    weights: RandomWeights | Weights
    adapter: Adapter

    @classmethod
    def open(cls, path: Path, lora: LoRAConfig) -> StepModel:
        """Of a GGUF file, which takes the gguf package to read."""
        from fwdllm.engine.backends import OWN, choose
        from fwdllm.engine.gguf.file import GGUFFile

        file = GGUFFile.open(path)
        backend = choose(file, OWN)
        family = FAMILIES[backend.architecture]
        weights = Weights(file, *family.shapes(backend.args), ops)
        return cls._of(backend.architecture, backend.args, weights, backend.linear, lora)

    @classmethod
    def make(cls, shape: Shape, type: QuantType, lora: LoRAConfig) -> StepModel:
        args = llama.Args(
            n_layers=shape.n_layers,
            width=shape.width,
            n_heads=shape.n_heads,
            n_kv_heads=shape.n_kv_heads,
            head_dim=shape.head_dim,
            hidden=shape.hidden,
            n_vocab=shape.n_vocab,
            context=shape.context,
            norm_eps=1e-5,
            rotary=Rotary(dim=shape.head_dim, base=shape.rope_base),
        )
        linear = {
            name.removesuffix(".weight"): (n_out, n_in)
            for name, n_out, n_in in matrices(shape)
            if name.startswith("blk.")
        }
        return cls._of("llama", args, RandomWeights(shape, type), linear, lora)

    @classmethod
    def _of(
        cls,
        family: str,
        args: Dimensions,
        weights: RandomWeights | Weights,
        linear: Mapping[str, tuple[int, int]],
        lora: LoRAConfig,
    ) -> StepModel:
        adapter = Adapter.empty(family, layout(linear, lora), lora, 0, ops)
        rng = np.random.default_rng(0)
        for t in adapter.targets:
            at = t.offset + lora.rank * t.n_in
            size = lora.rank * t.n_out
            adapter.theta[at : at + size] = rng.normal(scale=0.01, size=size)
        return cls(family, args, weights, adapter)

    def graph(self, exact: bool = False) -> OwnGraph:
        weights: Any = self.weights
        return OwnGraph(
            self.args, FAMILIES[self.family], weights, ops, adapter=self.adapter, exact=exact
        )


def random_batch(n_vocab: int, examples: int, tokens: int) -> tuple[np.ndarray, Batch]:
    """Token ids [examples, tokens], and their batch; all tokens but each first are labels."""
    ids = np.random.default_rng(0).integers(0, n_vocab, (examples, tokens))
    return ids, pack([Tokens(row, [True] * tokens) for row in ids.tolist()])


def slopes(
    model: StepModel, batch: Batch, seeds: np.ndarray, method: str, exact: bool = False
) -> tuple[float, np.ndarray]:
    """The loss, and its derivative along every seed's direction."""
    p = plan(seeds, method)
    graph, directions = model.graph(exact), Dense(model.adapter)
    most = graph.plan(batch, len(p.lanes)).lanes
    nll: list[np.ndarray] = []
    for lanes in p.parts(most):
        found = graph.token_losses(batch, Variants(lanes, directions))
        nll.append(found[int(p.plain) if nll else 0 :])
    losses = np.concatenate(nll).mean(axis=1)
    return p.loss(losses), p.derivative(losses)


def update_by_gradient(model: StepModel, batch: Batch) -> tuple[float, np.ndarray]:
    """One step down the exact gradient: the loss before it, and the gradient."""
    losses, gradient = model.graph().token_gradient(batch)
    np.subtract(model.adapter.theta, _UPDATE_RATE * gradient, out=model.adapter.theta)
    return float(losses.mean()), gradient


def measure_gpu_step(
    model: StepModel,
    batch: Batch,
    perturbations: int,
    rounds: int,
    on_side: Callable[[str], None],
) -> dict[str, Any]:
    """Seconds and peak bytes of a step with each method, the update included."""
    seeds = np.arange(perturbations, dtype=np.uint64)
    found: dict[str, Any] = {}
    for method in ("forward-ad", "central"):

        def step(method: str = method) -> tuple[float, np.ndarray]:
            loss, found = slopes(model, batch, seeds, method)
            model.adapter.add(seeds, -_UPDATE_RATE / len(seeds) * found)
            return loss, found

        found[method] = timed(step, rounds)
        found[method]["tokens_per_s"] = (
            batch.n_rows * len(plan(seeds, method).lanes) / found[method]["seconds"]
        )
        on_side(method)
    found["backprop"] = timed(lambda: update_by_gradient(model, batch), rounds)
    on_side("backprop")
    weights = model.weights
    assert isinstance(weights, RandomWeights)
    return {**found, "weight_bytes": weights.nbytes}


def measure_recording(
    model: StepModel, batch: Batch, perturbations: int, rounds: int
) -> dict[str, Any]:
    """Seconds of a pass with tangents, launched kernel by kernel and as a recording.

    "difference": the largest absolute difference between what the two find: of a decoder
    derivatives, of an encoder the features of all lanes.
    """
    seeds = np.arange(perturbations, dtype=np.uint64)
    lanes = Variants(plan(seeds, "forward-ad").lanes, Dense(model.adapter))

    def step() -> tuple[float, np.ndarray]:
        if FAMILIES[model.family].encoder:
            return 0.0, model.graph().features(batch, lanes)
        return slopes(model, batch, seeds, "forward-ad")

    found: dict[str, Any] = {}
    values = []
    for name, recorded in (("kernel by kernel", False), ("recorded", True)):
        recording.enabled = recorded
        try:
            step()  # the second time, the pass is recorded
            values.append(step()[1])
            found[name] = timed(step, rounds)
            if recorded and not recording.enabled:
                found[name]["skipped"] = "this card or driver does not record the passes"
        finally:
            recording.enabled = True
    return {**found, "difference": float(np.abs(values[0] - values[1]).max())}


def timed(step: Callable[[], tuple[float, np.ndarray]], rounds: int) -> dict[str, Any]:
    """Median wall-clock seconds of a step and its peak bytes, after one warm-up step."""
    loss, _ = step()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        step()  # ends with losses on the host, so the GPU is done
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else None
    return {
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "peak_bytes": peak,
        "loss": loss,
    }


def peer_model(model: StepModel) -> PeerModel:
    """The weights of a llama decoder in bfloat16, with rows of q and k in transformers' order."""
    args, config = model.args, model.adapter.config
    assert isinstance(args, llama.Args)
    assert args.rotary is not None

    def rows(name: str, x: torch.Tensor) -> torch.Tensor:
        heads = {"attn_q": args.n_heads, "attn_k": args.n_kv_heads}.get(name.split(".")[2])
        if heads is None:
            return x
        halves = x.reshape(heads, args.head_dim // 2, 2, -1).transpose(1, 2)
        return halves.reshape(x.shape)

    def weight(name: str) -> torch.Tensor:
        stem = name.removesuffix(".weight")
        if not model.weights.has(stem):
            return torch.from_numpy(model.weights.vector(name)).to(DEVICE, torch.bfloat16)
        x = decoded(ops.weight(model.weights.matrix(stem)), torch.bfloat16)
        return rows(name, x) if name.startswith("blk.") else x

    def factors(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        target: Target | None = model.adapter.target(name)
        assert target is not None
        lora = model.adapter.factors(target)
        a, b = (torch.from_numpy(factor.copy()).to(DEVICE) for factor in (lora.a, lora.b))
        return a, rows(name, b)

    return PeerModel(
        n_layers=args.n_layers,
        width=args.width,
        n_heads=args.n_heads,
        n_kv_heads=args.n_kv_heads,
        head_dim=args.head_dim,
        hidden=args.hidden,
        n_vocab=args.n_vocab,
        context=args.context,
        norm_eps=args.norm_eps,
        rope_base=args.rotary.base,
        weight=weight,
        factors=factors,
        rank=config.rank,
        alpha=config.alpha,
        targets=config.targets,
    )
