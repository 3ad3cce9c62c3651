"""What the routes share: one ``Context`` for an application."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fastapi import Request

if TYPE_CHECKING:
    from fwdllm.server.inference import Admission
    from fwdllm.server.jobs import Jobs
    from fwdllm.server.models import Models
    from fwdllm.server.perturbations import Laboratory
    from fwdllm.server.store import Store


@dataclass
class Context:
    """folder: the server's.  runs: a folder whose runs are shown, or None.

    started: Unix seconds.  n_tokens, n_requests: generated and answered since.  streams: open now.
    """

    folder: Path
    store: Store
    models: Models
    jobs: Jobs
    laboratory: Laboratory
    admission: Admission
    runs: Path | None = None
    started: float = field(default_factory=time.time)
    n_tokens: int = 0
    n_requests: int = 0
    streams: int = 0


def context(request: Request) -> Context:
    """The context of a request's application."""
    found: Context = request.app.state.context
    return found
