"""/lora-adapters of llama.cpp's server, and vLLM's routes that load and unload adapters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter
from pydantic import Field

from fwdllm.adapters import as_gguf
from fwdllm.engine.adapters.peft import CONFIG_FILE, HEAD_FILE, WEIGHTS_FILE
from fwdllm.engine.engine import Engine
from fwdllm.engine.errors import AdapterError, ConfigError
from fwdllm.http import limits
from fwdllm.http.api_error import ApiError
from fwdllm.http.bodies import Route
from fwdllm.http.context import Served
from fwdllm.http.perturbations import adapter_object
from fwdllm.http.schemas import LoraScales, Strict
from fwdllm.http.store import AdapterRow, Store

router = APIRouter(tags=["adapters"], route_class=Route)

# Names of what is made here, by jobs and by /v1/adapters, begin so.
OWN = "ft:"
_NAME = re.compile(r"[A-Za-z0-9_.:-]{1,64}")


class LoadRequest(Strict):
    """An adapter to load, as for vLLM. lora_path: in the server's --adapter-folder."""

    lora_name: Annotated[str, Field(min_length=1, max_length=64)]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadRequest(Strict):
    """An adapter to unload, as for vLLM."""

    lora_name: str


@router.get("/lora-adapters")
def list_loras(served: Served) -> list[dict[str, Any]]:
    """All adapters with their numbers; scale: for requests that name no model."""
    return [
        {
            "id": id,
            "path": f"/v1/adapters/{adapter.id}/content",
            "model": adapter.model,
            "scale": served.models.loras.scale(adapter),
        }
        for id, adapter in served.models.loras.listed().items()
    ]


@router.post("/lora-adapters")
def set_loras(body: LoraScales, served: Served) -> dict[str, bool]:
    """Set the scales for requests that name no model; those of adapters not given become 0."""
    served.models.loras.use(served.models.loras.mix(body))
    return {"success": True}


@router.post("/v1/load_lora_adapter")
def load_lora(body: LoadRequest, served: Served) -> dict[str, Any]:
    """Load an adapter from the server's folder; it is a model of that name until unloaded."""
    served.check_room()
    path = _inside(served.adapter_folder, body.lora_path)
    try:
        check_name(body.lora_name, served.models.base)
        if served.store.adapter_of_model(body.lora_name) is not None:
            raise ConfigError(f"there is a model {body.lora_name!r} already: unload it first")
        adapter = keep(served.store, served.models.path, body.lora_name, path)
    except (AdapterError, ConfigError) as error:
        raise ApiError(400, str(error).replace(f"{served.adapter_folder}/", "")) from error
    return adapter_object(served, adapter)


@router.post("/v1/unload_lora_adapter")
def unload_lora(body: UnloadRequest, served: Served) -> dict[str, Any]:
    """Unload an adapter that was loaded; answers in progress are finished with it."""
    adapter = served.store.adapter_of_model(body.lora_name)
    if adapter is None:
        text = f"The adapter {body.lora_name!r} does not exist"
        raise ApiError(404, text, "lora_name", "adapter_not_found")
    if adapter.model.startswith(OWN):
        text = f"{adapter.model} was made here, so there is no file to load it from again"
        raise ApiError(400, f"{text}: DELETE /v1/models/{adapter.model} deletes it", "lora_name")
    served.check_unused(adapter)
    served.store.delete_adapter(adapter.number)
    return {"id": adapter.id, "object": "adapter", "deleted": True}


def check_name(name: str, base: str) -> None:
    """ConfigError for a name that no loaded adapter may have."""
    if name == base or name.startswith(OWN) or not _NAME.fullmatch(name):
        raise ConfigError(
            f"an adapter cannot be named {name!r}: a name has up to 64 letters, digits and ._:-, "
            f"does not begin with {OWN} and is not the model's"
        )


def keep(store: Store, model: Path, name: str, path: Path) -> AdapterRow:
    """Put an adapter, GGUF or PEFT, into the store; one of that name and other bytes is replaced.

    Errors: AdapterError if it does not fit the model, ConfigError if it is too large or llama.cpp
    would not apply all of it.
    """
    with as_gguf(path, model) as gguf:
        if gguf.exists() and gguf.stat().st_size > limits.MAX_ADAPTER_BYTES:
            raise ConfigError(f"{path} has over {limits.MAX_ADAPTER_BYTES:,} bytes")
        adapter = Engine.load(model, adapter=gguf).adapter
        assert adapter is not None
        content = gguf.read_bytes()
    known = store.adapter_of_model(name)
    if known is not None and store.adapter_content(known.number) != content:
        store.delete_adapter(known.number)
    return store.add_adapter(name, content, adapter.theta.size)


def _inside(folder: Path | None, name: str) -> Path:
    """The path of an adapter in a folder, symbolic links followed. Errors: ApiError."""
    if folder is None:
        text = "this server loads no adapters: it was started without --adapter-folder"
        raise ApiError(403, text, "lora_path")
    try:
        path = (folder / name).resolve()
        parts = [(path / part).resolve() for part in (WEIGHTS_FILE, CONFIG_FILE, HEAD_FILE)]
        # A .safetensors file is read with those beside it.
        parts += [(path.parent / part).resolve() for part in (CONFIG_FILE, HEAD_FILE)]
        inside = path != folder and all(p.is_relative_to(folder) for p in (path, *parts))
    except (OSError, RuntimeError, ValueError) as error:  # a loop of links; a NUL
        raise ApiError(400, f"{name!r} is not a path", "lora_path") from error
    if not inside:
        text = "adapters are loaded only from the folder of --adapter-folder"
        raise ApiError(403, text, "lora_path")
    if not path.exists():
        raise ApiError(404, f"there is no {name!r} in the server's folder", "lora_path")
    return path
