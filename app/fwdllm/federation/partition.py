"""How examples are spread over simulated clients."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fwdllm.engine.data.jsonl import Example
from fwdllm.engine.errors import ConfigError, DataError


def iid(n_examples: int, n_clients: int, seed: int) -> list[np.ndarray]:
    """Equal shares at random: indices of each client's examples. Errors: ConfigError."""
    if not 1 <= n_clients <= n_examples:
        raise ConfigError(f"cannot spread {n_examples} examples over {n_clients} clients")
    order = np.random.Generator(np.random.PCG64(seed)).permutation(n_examples)
    return [np.sort(share) for share in np.array_split(order, n_clients)]


def dirichlet(
    examples: Sequence[Example], n_clients: int, alpha: float, seed: int
) -> list[np.ndarray]:
    """Shares of about equal size whose labels follow Dirichlet(alpha).

    Hsu et al., arXiv 1909.06335. Every client draws its own mixture of labels and takes its
    n / n_clients examples by that mixture, from the examples that are left. Small alpha: few labels
    for each client; large: like iid. Errors: ConfigError, DataError.
    """
    if not alpha > 0:
        raise ConfigError(f"Dirichlet's alpha must be above 0, not {alpha}")
    if not 1 <= n_clients <= len(examples):
        raise ConfigError(f"cannot spread {len(examples)} examples over {n_clients} clients")
    labels = sorted({e.label for e in examples if e.label is not None})
    if not labels:
        raise DataError("a Dirichlet partition goes by labels, and the examples have none")
    random = np.random.Generator(np.random.PCG64(seed))
    left = {
        label: list(random.permutation([i for i, e in enumerate(examples) if e.label == label]))
        for label in labels
    }
    sizes = [len(share) for share in np.array_split(np.arange(len(examples)), n_clients)]
    found = []
    for size in sizes:
        mixture = random.dirichlet(np.full(len(labels), alpha))
        mine = []
        for _ in range(size):
            open_labels = np.array([bool(left[label]) for label in labels])
            weights = np.where(open_labels, mixture, 0)
            if not weights.sum() > 0:  # no examples are left of the labels in its mixture
                weights = open_labels.astype(float)
            label = labels[int(random.choice(len(labels), p=weights / weights.sum()))]
            mine.append(left[label].pop())
        found.append(np.sort(np.array(mine, np.int64)))
    return found


def by_user(path: Path, examples: Sequence[Example], field: str) -> list[np.ndarray]:
    """One client for each value of a field of the JSONL lines, in sorted order of the values."""
    lines = path.read_bytes().split(b"\n")
    users: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        value = json.loads(lines[example.line - 1].decode("utf-8-sig")).get(field)
        if value is None:
            raise DataError(f"{example.where}: it has no field {field!r} to tell its client")
        users.setdefault(str(value), []).append(i)
    return [np.array(users[user], np.int64) for user in sorted(users)]
