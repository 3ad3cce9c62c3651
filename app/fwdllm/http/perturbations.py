"""The engine's operations as routes, for apps that run their own protocol: evaluate perturbations
of an adapter, and update the adapter.
"""

from __future__ import annotations

import secrets
from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from fwdllm.engine.settings import LoRAConfig
from fwdllm.http.adapter_engine import (
    AdapterRequest,
    EvaluateRequest,
    UpdateRequest,
    find_adapter,
)
from fwdllm.http.api_error import ApiError
from fwdllm.http.bodies import Route
from fwdllm.http.context import Context, Served
from fwdllm.http.store import AdapterRow

router = APIRouter(prefix="/v1", tags=["perturbations"], route_class=Route)


@router.post("/adapters")
def create_adapter(body: AdapterRequest, served: Served) -> dict[str, Any]:
    """Make an adapter, to be changed by updates."""
    served.check_room()
    if body.labels and served.models.is_causal:
        raise ApiError(400, "only an encoder has a head for labels", "labels")
    layers = None if body.layers is None else tuple(body.layers)
    config = LoRAConfig(body.rank, body.alpha, tuple(body.targets), layers)
    name = f"ft:{served.models.base}:{body.suffix}:{secrets.token_hex(4)}"
    made = served.engine.create(name, config, body.labels, body.seed)
    return adapter_object(served, made)


@router.get("/adapters")
def list_adapters(served: Served) -> dict[str, Any]:
    """All adapters, newest first, without checkpoints."""
    found = [a for a in served.store.adapters() if a.step is None]
    return {"object": "list", "data": [adapter_object(served, a) for a in found]}


@router.get("/adapters/{adapter_id}")
def get_adapter(adapter_id: str, served: Served) -> dict[str, Any]:
    """One adapter."""
    return adapter_object(served, find_adapter(served.store, adapter_id))


@router.delete("/adapters/{adapter_id}")
def delete_adapter(adapter_id: str, served: Served) -> dict[str, Any]:
    """Delete an adapter, and the model of its name."""
    adapter = find_adapter(served.store, adapter_id)
    served.check_unused(adapter)
    served.store.delete_adapter(adapter.number)
    return {"id": adapter_id, "object": "adapter", "deleted": True}


@router.get("/adapters/{adapter_id}/content")
def adapter_content(adapter_id: str, served: Served) -> Response:
    """A GGUF LoRA file, as llama.cpp, Ollama and LM Studio load it."""
    found = find_adapter(served.store, adapter_id)
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in found.model)
    return Response(
        served.store.adapter_content(found.number),
        media_type="application/octet-stream",
        headers={"Content-Disposition": f'attachment; filename="{name}.gguf"'},
    )


@router.post("/adapters/{adapter_id}/updates")
def update_adapter(adapter_id: str, body: UpdateRequest, served: Served) -> dict[str, Any]:
    """Add directions, given by seeds and coefficients, to an adapter."""
    return adapter_object(served, served.engine.update(adapter_id, body))


@router.post("/perturbations/evaluate")
def evaluate(body: EvaluateRequest, served: Served) -> dict[str, Any]:
    """Losses of examples, and directional derivatives of their mean along the seeds' directions."""
    return served.engine.evaluate(body.adapter, body)


def adapter_object(served: Context, adapter: AdapterRow) -> dict[str, Any]:
    """An adapter as a JSON object."""
    job = None if adapter.job is None else served.store.job_of_number(adapter.job).id
    return {
        "id": adapter.id,
        "object": "adapter",
        "created_at": int(adapter.created),
        "model": adapter.model,
        "base_model": served.models.base,
        "job": job,
        "version": adapter.version,
        "n_parameters": adapter.n_parameters,
        "bytes": adapter.n_bytes,
    }
