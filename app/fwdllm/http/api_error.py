"""Errors in the format of OpenAI's API: status and {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from fwdllm.cli.console import explain
from fwdllm.engine.errors import ConfigError, DataError, FwdllmError, NumericsError
from fwdllm.http.store import GoneError

log = logging.getLogger(__name__)

# How many of pydantic's error descriptions are shown; a bad body can have thousands.
_MAX_FAULTS = 3
# A name in a message may be as long as the request.
_MAX_CHARACTERS = 1000
_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Fault(BaseModel):
    """What is wrong. param: the wrong field.  code: a name of the error, for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: Fault


class ApiError(Exception):
    """An error response to a request; see ``Fault``. headers: of the response."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers


def response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error response in OpenAI's format."""
    message, param = _short(message), param and _short(param)
    kind = "server_error" if status >= 500 else _KINDS.get(status, "invalid_request_error")
    body = ErrorBody(error=Fault(message=message, type=kind, param=param, code=code))
    return JSONResponse(body.model_dump(), status, dict(headers or {}))


def install(app: FastAPI) -> None:
    """Make an application answer every error in OpenAI's format."""

    @app.exception_handler(ApiError)
    async def _api(request: Request, error: ApiError) -> JSONResponse:
        return response(error.status, error.message, error.param, error.code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        faults = error.errors()
        message = "; ".join(map(_describe, faults[:_MAX_FAULTS]))
        return response(400, message, _param(faults[0]))

    @app.exception_handler(UnicodeEncodeError)
    async def _half(request: Request, error: UnicodeEncodeError) -> JSONResponse:
        # JSON can contain half of a surrogate pair, which cannot be encoded as UTF-8.
        return response(400, "the request has half of a surrogate pair in a text")

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        return response(error.status_code, str(error.detail), headers=error.headers)

    @app.exception_handler(GoneError)
    async def _gone(request: Request, error: GoneError) -> JSONResponse:
        return response(404, str(error))

    @app.exception_handler(FwdllmError)
    async def _ours(request: Request, error: FwdllmError) -> JSONResponse:
        if isinstance(error, (ConfigError, DataError, NumericsError)):  # caused by the request
            return response(400, str(error))
        log.error("%s %s: %s", request.method, request.url.path, error)
        return response(500, str(error))

    @app.exception_handler(Exception)
    async def _bug(request: Request, error: Exception) -> JSONResponse:
        return response(500, explain(error) or "the server has made a mistake; its log says more")


def _short(text: str) -> str:
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "..."


def _describe(fault: Mapping[str, Any]) -> str:
    if fault["type"] == "json_invalid":
        return f"the body is not JSON: {fault['ctx']['error']} at character {fault['loc'][-1]}"
    param, message = _param(fault), str(fault["msg"]).removeprefix("Value error, ")
    if fault["type"] == "extra_forbidden":
        message = "there is no such field"
    return f"{param}: {message}" if param else message


def _param(fault: Mapping[str, Any]) -> str | None:
    """The path of a wrong field, such as "messages.0.role", without the leading "body"."""
    if fault["type"] == "json_invalid":
        return None
    return ".".join(map(str, fault["loc"][1:])) or None
