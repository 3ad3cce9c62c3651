"""Differential privacy on the scalars (DPZero, arXiv 2310.09639), accounted by dp-accounting.

All scalars that a client sends in a part are clipped as one vector to L2 norm ``clip``. The server
sums over clients, adds Gaussian noise of standard deviation ``sigma * clip`` to each sum and
divides by a fixed number. Each client takes part with a fixed probability, so a part is a
Poisson-sampled Gaussian mechanism. The unit of privacy is a client with all its data. The server is
trusted; the guarantee is for what the server publishes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from fwdllm.engine.errors import ConfigError
from fwdllm.kernels import cpu
from fwdllm.protocol.federation import FederationConfig

_TINY = np.finfo(np.float64).tiny


def private_sum(rows: np.ndarray, clip: float, sigma: float, noise_seed: int) -> np.ndarray:
    """The sum of clipped rows [n, k] with noise: float64 [k].

    noise_seed: a 64-bit number, known only to the server and used only once.
    """
    noise = cpu.normal(noise_seed, 0, rows.shape[1]).astype(np.float64)
    total: np.ndarray = clipped(rows, clip).sum(axis=0) + sigma * clip * noise
    return total


def clipped(rows: np.ndarray, clip: float) -> np.ndarray:
    """Rows [n, k], each shortened to an L2 norm of clip at most: float64 [n, k]."""
    rows = rows.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    shortened: np.ndarray = rows * np.minimum(1, clip / np.maximum(norms, _TINY))
    return shortened


def spent_epsilon(config: FederationConfig, available: Sequence[int]) -> float | None:
    """The privacy loss epsilon of all parts so far, at ``config.delta``; None without noise.

    available: for each part, the number of clients that could be asked; on average,
    config.per_round of them took part. With ``secure`` the guarantee is against the server, too,
    which knows who they were: then nothing is won by chance, and the noise, a sum of discrete
    Gaussians, has the zCDP of a Gaussian (Kairouz et al., arXiv 2102.06387; what a sum of several
    differs from one is exp(-pi^2 variance), with variances of 10^6 and more nothing).

    ConfigError where dp-accounting is not installed.
    """
    if config.sigma == 0:
        return None
    try:
        import dp_accounting
        from dp_accounting import rdp
    except ImportError:
        raise ConfigError(
            "differential privacy needs dp-accounting: pip install 'fwdllm[federation]'"
        ) from None

    accountant = rdp.RdpAccountant()
    if config.secure:
        for _ in filter(None, available):
            accountant.compose(dp_accounting.ZCDpEvent(0.5 / config.sigma**2))
        return float(accountant.get_epsilon(config.delta))
    for n_clients, n_parts in Counter(n for n in available if n).items():
        share = min(1.0, config.per_round / n_clients)
        noise = dp_accounting.GaussianDpEvent(config.sigma)
        accountant.compose(dp_accounting.PoissonSampledDpEvent(share, noise), n_parts)
    return float(accountant.get_epsilon(config.delta))
