"""/v1/files: data sets for tuning, checked on upload."""

from __future__ import annotations

import io
import threading
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, UploadFile
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from fwdllm.engine.data.jsonl import Example, parse_jsonl
from fwdllm.http import limits
from fwdllm.http.api_error import ApiError
from fwdllm.http.context import Context, Served
from fwdllm.http.store import File

PURPOSE = "fine-tune"

# At most two at a time, as a file being checked is in memory; others wait in temporary files.
_uploads = threading.BoundedSemaphore(2)

router = APIRouter(prefix="/v1/files", tags=["files"])


@router.post("")
async def upload(
    file: UploadFile,
    purpose: Annotated[str, Form()],
    served: Served,
    expires_after: Annotated[str | None, Form(alias="expires_after[anchor]")] = None,
) -> dict[str, Any]:
    """Upload a JSONL file of examples."""
    if purpose != PURPOSE:
        raise ApiError(400, f"the purpose of a file is {PURPOSE!r}, not {purpose!r}", "purpose")
    if expires_after is not None:
        raise ApiError(400, "files do not expire here; delete them", "expires_after")
    return file_object(await run_in_threadpool(_keep, served, file))


@router.get("")
def list_files(
    served: Served,
    purpose: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
) -> dict[str, Any]:
    """All files, newest first."""
    files = [f for f in served.store.files() if purpose in (None, f.purpose)]
    return page([file_object(f) for f in files], after, limit)


@router.get("/{file_id}")
def get(file_id: str, served: Served) -> dict[str, Any]:
    """One file."""
    return file_object(find(served, file_id))


@router.delete("/{file_id}")
def delete(file_id: str, served: Served) -> dict[str, Any]:
    """Delete a file that no unfinished job needs."""
    if not served.store.delete_file(find(served, file_id).number):
        raise ApiError(409, "a job that has not finished needs this file", "file_id")
    return {"id": file_id, "object": "file", "deleted": True}


@router.get("/{file_id}/content")
def content(file_id: str, served: Served) -> Response:
    """The bytes of a file."""
    found = find(served, file_id)
    return Response(served.store.file_content(found.number), media_type="application/jsonl")


def find(served: Context, id: str, param: str = "file_id", status: int = 404) -> File:
    """The file with this id. Errors: ApiError."""
    found = served.store.file(id)
    if found is None:
        raise ApiError(status, f"there is no file {id!r}", param, "file_not_found")
    return found


def examples_of(served: Context, file: File) -> list[Example]:
    """The examples in a file."""
    content = served.store.file_content(file.number)
    return parse_jsonl(io.BytesIO(content), file.filename)


def page(objects: list[dict[str, Any]], after: str | None, limit: int) -> dict[str, Any]:
    """One page of a list, in OpenAI's format: ``limit`` objects after the one with id ``after``."""
    start = 0
    if after is not None:
        ids = [item["id"] for item in objects]
        start = ids.index(after) + 1 if after in ids else len(objects)
    part = objects[start : start + limit]
    return {
        "object": "list",
        "data": part,
        "first_id": part[0]["id"] if part else None,
        "last_id": part[-1]["id"] if part else None,
        "has_more": start + limit < len(objects),
    }


def file_object(file: File) -> dict[str, Any]:
    """OpenAI's file object, with the kind and number of examples."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.n_bytes,
        "created_at": int(file.created),
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "kind": file.kind,
        "n_examples": file.n_examples,
    }


def _keep(served: Context, upload: UploadFile) -> File:
    name = _display_name(upload.filename)
    with _uploads:
        content = upload.file.read()
        if len(content) > limits.MAX_UPLOAD_BYTES:
            raise ApiError(413, f"a file may have {limits.MAX_UPLOAD_BYTES:,} bytes", "file")
        examples = parse_jsonl(io.BytesIO(content), name)
        if len(examples) > limits.MAX_EXAMPLES:
            raise ApiError(400, f"a file may have {limits.MAX_EXAMPLES:,} examples", "file")
        kind, n, room = examples[0].kind, len(examples), limits.MAX_FILES_BYTES
        kept = served.store.add_file(name, PURPOSE, kind, n, content, room)
    if kept is None:
        raise ApiError(413, "the server keeps no more; delete files that are not needed", "file")
    return kept


def _display_name(name: str | None) -> str:
    """The name to show for a file: the last part of its path, only printable characters."""
    last = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(c for c in last if c.isprintable())
    return printable[-limits.MAX_NAME_CHARACTERS :] or "data.jsonl"
