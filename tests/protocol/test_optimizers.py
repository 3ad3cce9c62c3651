"""Optimizers against torch.optim, and bit for bit against scalar arithmetic."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest

from fwdllm.protocol.optimizers import OptimizerState, apply
from fwdllm.protocol.settings import OptimizerConfig

torch = pytest.importorskip("torch")

N, N_HEAD, STEPS = 37, 5, 40

CASES = [
    OptimizerConfig(optimizer="sgd"),
    OptimizerConfig(optimizer="sgd", weight_decay=0.1),
    OptimizerConfig(optimizer="momentum", momentum=0.8),
    OptimizerConfig(optimizer="momentum", momentum=0.95, weight_decay=0.1),
    OptimizerConfig(optimizer="adam"),
    OptimizerConfig(optimizer="adamw"),
    OptimizerConfig(optimizer="adamw", eps=1e-6, weight_decay=0.2),
    OptimizerConfig(optimizer="adam", beta1=0.7, beta2=0.95, eps=1e-2, weight_decay=0.1),
]


def problem() -> tuple[np.ndarray, np.ndarray]:
    """A start float32 [N] and gradients [STEPS, N] of widely different sizes."""
    draws = np.random.default_rng(3).normal(size=(STEPS + 1, N))
    draws[1:] *= np.logspace(-4, 2, N)
    return draws[0].astype(np.float32), draws[1:].astype(np.float32)


def reference_optimizer(config: OptimizerConfig, groups: list[dict]) -> torch.optim.Optimizer:
    decay = config.weight_decay_in_use
    if config.optimizer in ("adam", "adamw"):
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        betas = (config.beta1, config.beta2)
        return kind(groups, betas=betas, eps=config.eps_in_use, weight_decay=decay)
    momentum = config.momentum if config.optimizer == "momentum" else 0.0
    return torch.optim.SGD(groups, momentum=momentum, weight_decay=decay)


def rates(step: int) -> tuple[float, float]:
    """Rates of body and head, different at each step as under a schedule."""
    return 0.02 / (1 + step), 0.05 / (1 + step)


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.optimizer}-{c.weight_decay_in_use}")
def test_follows_torch_with_a_rate_for_each_part(config: OptimizerConfig) -> None:
    theta, gradients = problem()
    body = torch.tensor(theta[:-N_HEAD].copy(), requires_grad=True)
    head = torch.tensor(theta[-N_HEAD:].copy(), requires_grad=True)
    groups = [{"params": [body], "lr": 1.0}, {"params": [head], "lr": 1.0}]
    reference = reference_optimizer(config, groups)
    state = OptimizerState.initial(config, N)
    for step, gradient in enumerate(gradients):
        vector = np.empty(N, np.float32)
        vector[:-N_HEAD], vector[-N_HEAD:] = rates(step)
        apply(config, state, theta, gradient, vector)
        body.grad = torch.tensor(gradient[:-N_HEAD])
        head.grad = torch.tensor(gradient[-N_HEAD:])
        for group, rate in zip(reference.param_groups, rates(step), strict=True):
            group["lr"] = rate
        reference.step()
        expected = torch.cat([body, head]).detach().numpy()
        np.testing.assert_allclose(theta, expected, rtol=2e-5, atol=2e-6)


def test_one_rate_is_the_same_as_equal_rates() -> None:
    theta, gradients = problem()
    for config in CASES:
        one, many = theta.copy(), theta.copy()
        states = [OptimizerState.initial(config, N) for _ in range(2)]
        for gradient in gradients:
            apply(config, states[0], one, gradient, 0.125)
            apply(config, states[1], many, gradient, np.full(N, 0.125, np.float32))
        np.testing.assert_allclose(one, many, rtol=1e-5, atol=1e-6)


def test_adam_is_one_rounding_per_operation() -> None:
    config = OptimizerConfig(optimizer="adam", weight_decay=0.01)
    theta, gradients = problem()
    scalars = [np.float32(t) for t in theta]
    mean, square = [np.float32(0)] * N, [np.float32(0)] * N
    state, f32 = OptimizerState.initial(config, N), np.float32
    for step, gradient in enumerate(gradients, start=1):
        apply(config, state, theta, gradient, 0.01)
        bias = f32(math.sqrt(1 - config.beta2**step))
        rate = f32(0.01 / (1 - config.beta1**step))
        for i in range(N):
            g = gradient[i] + f32(0.01) * scalars[i]
            mean[i] = mean[i] * f32(0.9) + f32(1 - 0.9) * g
            square[i] = square[i] * f32(0.999) + f32(1 - 0.999) * g * g
            scalars[i] = scalars[i] - rate * mean[i] / (np.sqrt(square[i]) / bias + f32(1e-8))
    assert theta.tobytes() == np.array(scalars, np.float32).tobytes()


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.optimizer}-{c.weight_decay_in_use}")
def test_gradient_and_dtypes_stay(config: OptimizerConfig) -> None:
    theta, gradients = problem()
    gradient, state = gradients[0].copy(), OptimizerState.initial(config, N)
    apply(config, state, theta, gradient, 0.1)
    np.testing.assert_array_equal(gradient, gradients[0])
    assert {theta.dtype, *(slot.dtype for slot in state.slots.values())} == {np.dtype(np.float32)}


@pytest.mark.parametrize("config", CASES, ids=lambda c: f"{c.optimizer}-{c.weight_decay_in_use}")
def test_saved_state_continues_to_the_same_bits(config: OptimizerConfig) -> None:
    theta, gradients = problem()
    straight, state = theta.copy(), OptimizerState.initial(config, N)
    for gradient in gradients:
        apply(config, state, straight, gradient, 0.01)
    state = OptimizerState.initial(config, N)
    for gradient in gradients:
        apply(config, state, theta, gradient, 0.01)
        file = io.BytesIO()
        np.savez(file, **state.to_arrays())
        file.seek(0)
        state = OptimizerState.from_arrays(config, N, dict(np.load(file)))
    assert theta.tobytes() == straight.tobytes()
    assert state.step == STEPS


def test_foreign_state_is_refused() -> None:
    adam, sgd = OptimizerConfig(optimizer="adam"), OptimizerConfig(optimizer="sgd")
    arrays = OptimizerState.initial(adam, N).to_arrays()
    with pytest.raises(ValueError, match="sgd has no state of mean"):
        OptimizerState.from_arrays(sgd, N, arrays)
    with pytest.raises(ValueError, match="not float32"):
        OptimizerState.from_arrays(adam, N + 1, arrays)
    with pytest.raises(ValueError, match="mean is not float32"):
        OptimizerState.from_arrays(adam, N, {**arrays, "mean": np.zeros(N)})
