"""Settings from papers, by name; comments say what each paper used and what differs here.

The learning rates are not the papers', because they depend on the adapter and the model.
"""

from __future__ import annotations

from typing import Any

from fwdllm.engine.errors import ConfigError
from fwdllm.protocol.federation import WEIGHTED_POOL, FederationConfig

# FedKSeed (arXiv 2312.06353): local steps along seeds from a pool of K = 4,096; in the paper
# 200 steps a round and 5% of the clients; clients upload the scalars of all steps.
_FEDKSEED: dict[str, Any] = {
    "per_round": 50,
    "upload": "steps",
    "seeds": "pool",
    "pool_size": 4096,
    "local_steps": 200,
    "perturbations": 1,
    "head_perturbations": 1,
    "batch_size": 8,
    "method": "central",
    "epsilon": 1e-3,
    "client_learning_rate": 1e-3,
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "schedule": "constant",
}

PRESETS: dict[str, dict[str, Any]] = {
    # FwdLLM (arXiv 2308.13894): central differences with h = 0.01, batch 8 of 64 tokens, 100 of
    # 1,000 clients a round, each perturbation the best of 10 by the cosine with the last
    # gradient, more perturbations until the variance is below a threshold (0.1 to 0.2 in the paper,
    # in units of its gradients; calibrated here), SGD with linear warmup and decay.
    "fwdllm": {
        "per_round": 100,
        "perturbations": 1,
        "batch_size": 8,
        "max_tokens": 64,
        "method": "central",
        "epsilon": 1e-2,
        "pacing": True,
        "candidates": 10,
        "optimizer": "sgd",
        "learning_rate": 1e-2,
        "head_learning_rate": 1.0,
        "schedule": "linear",
    },
    # Spry (arXiv 2405.15551): exact directional derivatives, layers split among clients, one
    # perturbation for each batch of 8, Yogi on the server. Per-iteration mode: scalars go up.
    "spry": {
        "per_round": 100,
        "perturbations": 1,
        "batch_size": 8,
        "method": "forward-ad",
        "split": True,
        "optimizer": "yogi",
        "learning_rate": 3e-3,
        "head_learning_rate": 1e-2,
        "eps": 1e-3,
        "beta2": 0.99,
        "schedule": "constant",
    },
    # Spry's per-epoch mode: clients train their layers by local AdamW steps and upload weights.
    "spry-epoch": {
        "per_round": 10,
        "upload": "weights",
        "local_steps": 8,
        "perturbations": 1,
        "batch_size": 8,
        "method": "forward-ad",
        "split": True,
        "client_optimizer": "adamw",
        "client_learning_rate": 1e-3,
        "optimizer": "yogi",
        "learning_rate": 1e-2,
        "eps": 1e-3,
        "beta2": 0.99,
        "schedule": "constant",
    },
    # P-RGE (arXiv 2409.15520): many perturbations of LoRA-FA, both sides of their central
    # differences in one batched pass; here all clients have the same perturbations.
    "p-rge": {
        "per_round": 100,
        "seeds": "shared",
        "perturbations": 16,
        "batch_size": 16,
        "method": "central",
        "epsilon": 1e-2,
        "directions": "lora-fa",
        "optimizer": "sgd",
        "learning_rate": 1e-2,
    },
    # MeZO (arXiv 2305.17333) in a federation: one shared direction a round, eps = 1e-3, batch 16,
    # constant SGD.
    "mezo": {
        "per_round": 100,
        "seeds": "shared",
        "perturbations": 1,
        "batch_size": 16,
        "method": "central",
        "epsilon": 1e-3,
        "optimizer": "sgd",
        "learning_rate": 3e-3,
        "head_learning_rate": 1.0,
        "schedule": "constant",
    },
    "fedkseed": _FEDKSEED,
    # Its variant: seeds along which slopes were large are drawn more often.
    "fedkseed-pro": {**_FEDKSEED, "seeds": WEIGHTED_POOL},
    # FedAvg of adapters (McMahan et al., arXiv 1602.05629), with forward gradients on the clients.
    "fedavg": {
        "per_round": 10,
        "upload": "weights",
        "local_steps": 10,
        "perturbations": 8,
        "batch_size": 8,
        "method": "forward-ad",
        "client_optimizer": "sgd",
        "client_learning_rate": 1e-2,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "schedule": "constant",
    },
    # Ferret (arXiv 2409.06277): first-order local steps, whose sum goes up as K = 4,096 scalars of
    # random directions. Its code has the same directions for all clients in all rounds and momentum
    # on the server; here clients have their own, so that the mean over clients errs less.
    "ferret": {
        "per_round": 10,
        "upload": "projection",
        "local_steps": 10,
        "perturbations": 4096,
        "head_perturbations": 256,
        "batch_size": 8,
        "method": "backprop",
        "client_optimizer": "sgd",
        "client_learning_rate": 1e-2,
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "schedule": "constant",
    },
    # No paper's: slopes of the exact gradient of what a decoder's last layer writes, which cost a
    # client no more than two passes forward, however many they are (engine/estimators/readout.py).
    "readout": {
        "per_round": 10,
        "perturbations": 256,
        "batch_size": 8,
        "method": "readout",
        "optimizer": "yogi",
        "learning_rate": 1e-2,
        "beta2": 0.99,
        "schedule": "constant",
    },
    # DPZero (arXiv 2310.09639): shared +-1 directions, clipped scalars with Gaussian noise.
    "dpzero": {
        "per_round": 100,
        "seeds": "shared",
        "perturbations": 8,
        "directions": "rademacher",
        "batch_size": 8,
        "method": "forward-ad",
        "weighted": False,
        "clip": 10.0,
        "sigma": 1.0,
        "optimizer": "sgd",
        "learning_rate": 1e-2,
        "schedule": "constant",
    },
}


def preset(name: str, **changes: Any) -> FederationConfig:
    """A preset's settings with changes, which must include ``rounds``. Errors: ConfigError."""
    if name not in PRESETS:
        raise ConfigError(f"presets are {', '.join(PRESETS)}; there is no {name!r}")
    known = FederationConfig.__dataclass_fields__
    for change in changes:
        if change not in known:
            raise ConfigError(f"there is no setting {change!r}; docs/federated.md lists them")
    if "rounds" not in changes:
        raise ConfigError("say how many rounds there are")
    return FederationConfig(**{**PRESETS[name], **changes})
