"""A least-squares model behind the engine's interface: small, real and exactly checkable.

Run as a script it trains in a run directory, for tests that kill it:
``python toy_engine.py DIRECTORY``.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.kernels import reference
from fwdllm.protocol.config import TrainConfig
from fwdllm.tuning.run_directory import RunDirectory, train_recorded

N_LORA, N_HEAD = 13, 3


@dataclass(frozen=True)
class Example:
    x: np.ndarray  # float64 [N_LORA + N_HEAD]
    y: float


@dataclass
class Adapter:
    theta: np.ndarray
    n_lora: int


@dataclass(frozen=True)
class ToyDirections:
    """The stream itself, for the first N_LORA parameters."""

    distribution: str = "normal"
    size: int = N_LORA
    targets: tuple[()] = ()

    def combine(self, seeds: np.ndarray, coefficients: np.ndarray) -> np.ndarray:
        out = np.zeros(self.size, np.float32)
        reference.seeded_axpy(out, seeds, coefficients, distribution=self.distribution)
        return out

    def expand(self, coordinates: np.ndarray) -> np.ndarray:
        return coordinates

    def project(self, theta: np.ndarray) -> np.ndarray:
        return theta


@dataclass(frozen=True)
class Probe:
    loss: float
    seeds: np.ndarray
    derivative: np.ndarray
    head_gradient: np.ndarray | None
    n_tokens: int


@dataclass(frozen=True)
class Evaluation:
    loss: float
    n_tokens: int
    n_examples: int
    accuracy: float | None


class ToyEngine:
    """loss = mean (x . theta - y)^2 / 2 over a batch; the last ``n_head`` inputs are the head's."""

    ops = reference

    def __init__(self, n_head: int = 0, pause: float = 0.0) -> None:
        theta = np.linspace(-1, 1, N_LORA + n_head, dtype=np.float32)
        self.adapter = Adapter(theta, N_LORA)
        self.directions = ToyDirections()
        self.pause = pause
        self.options: dict[str, object] = {}

    def encode(self, examples: list[Example], max_tokens: int | None = None) -> list[Example]:
        self.options["max_tokens"] = max_tokens
        return examples

    def evaluate(self, examples: list[Example], max_tokens: int | None = None) -> Evaluation:
        self.options["evaluate_max_tokens"] = max_tokens
        return Evaluation(self._loss(examples, 0.0), len(examples), len(examples), None)

    def directional_derivatives(
        self,
        batch: list[Example],
        seeds: np.ndarray,
        method: str = "forward-ad",
        epsilon: float = 1e-3,
        *,
        per_example: bool = False,
    ) -> Probe:
        self.options |= {"method": method, "epsilon": epsilon, "per_example": per_example}
        time.sleep(self.pause)
        if per_example:
            seeds = np.stack([seeds + np.uint64(i) for i in range(len(batch))], axis=1)
            parts = [[example] for example in batch]
            columns = zip(parts, seeds.T, strict=True)
            slopes = [[self._slope(part, s, method, epsilon) for s in own] for part, own in columns]
            derivative = np.array(slopes).T / len(batch)
        else:
            derivative = np.array([self._slope(batch, seed, method, epsilon) for seed in seeds])
        head = self.gradient(batch)[N_LORA:] if self.adapter.theta.size > N_LORA else None
        n_tokens = (1 + len(seeds)) * len(batch)
        return Probe(self._loss(batch, 0.0), seeds, derivative, head, n_tokens)

    def _slope(self, batch: list[Example], seed: int, method: str, epsilon: float) -> float:
        v = self.directions.combine(np.array([seed], np.uint64), np.ones(1, np.float32))
        step = np.zeros(self.adapter.theta.size)
        step[:N_LORA] = v
        if method == "forward-ad":
            return float(self.gradient(batch) @ step)
        above = self._loss(batch, epsilon * step)
        if method == "central":
            return (above - self._loss(batch, -epsilon * step)) / (2 * epsilon)
        return (above - self._loss(batch, 0.0)) / epsilon

    def gradient(self, batch: list[Example]) -> np.ndarray:
        """The true gradient, float32 [n]."""
        x, residual = self._residual(batch, 0.0)
        return (residual @ x / len(batch)).astype(np.float32)

    def _loss(self, batch: list[Example], shift: np.ndarray | float) -> float:
        return float(np.mean(np.square(self._residual(batch, shift)[1])) / 2)

    def _residual(
        self, batch: list[Example], shift: np.ndarray | float
    ) -> tuple[np.ndarray, np.ndarray]:
        theta = self.adapter.theta.astype(np.float64) + shift
        x = np.stack([example.x for example in batch])[:, : theta.size]
        return x, x @ theta - np.array([example.y for example in batch])


def make_examples(count: int, seed: int = 0) -> list[Example]:
    """Examples of one fixed linear function, without noise."""
    truth = np.random.default_rng(7).normal(size=N_LORA + N_HEAD)
    inputs = np.random.default_rng(seed).normal(size=(count, N_LORA + N_HEAD))
    return [Example(x, float(x @ truth)) for x in inputs]


CONFIG = TrainConfig(
    steps=60,
    method="forward-ad",
    batch_size=4,
    perturbations=3,
    learning_rate=0.02,
    head_learning_rate=0.05,
    warmup=5,
    eval_every=4,
    checkpoint_every=3,
    seed=11,
)


def train_toy(directory: Path, config: TrainConfig = CONFIG, pause: float = 0.0) -> ToyEngine:
    """Start the run in ``directory``, or resume it if it has begun, and train to the end."""
    engine = ToyEngine(N_HEAD, pause)
    resume = (directory / "config.json").exists()
    with RunDirectory(directory, asdict(config), resume=resume) as run:
        for _ in train_recorded(run, engine, config, make_examples(10), make_examples(5, 1)):
            pass
    return engine


if __name__ == "__main__":
    print("ready", flush=True)
    try:
        train_toy(Path(sys.argv[1]), pause=0.002)
    except ConfigError as error:
        sys.exit(f"ConfigError: {error}")
