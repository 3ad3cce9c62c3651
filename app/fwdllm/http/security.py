"""Checks of every request: API key, origin and size.

A page of another site can make a browser send requests here, and can let its own DNS name resolve
to this machine ("DNS rebinding"). So a request must name this machine in Host, and if the browser
says which page sent the request, that page must be this server's.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Collection, Iterable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fwdllm.http import api_error, limits

# Paths that must load without a key, so that the page can ask for the key.
_OPEN_PATHS = ("/", "/healthz")
_OPEN_PREFIX = "/assets/"

_FOREIGN = "requests from pages of other sites are refused"

_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


class Guard:
    """ASGI middleware. host: the server is bound to it.  api_key: needed unless None.

    origins: other sites whose pages may send requests.
    """

    def __init__(
        self, app: ASGIApp, host: str, api_key: str | None, origins: Collection[str]
    ) -> None:
        self._app, self._origins = app, origins
        self._names = {"localhost", host.lower(), *_names_of_this_machine()}
        self._key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            await api_error.response(*refusal)(scope, receive, _with_headers(send))
            return
        limit = _limit(scope["path"])
        declared = _first(headers, b"content-length")
        if declared and declared.isdigit() and int(declared) > limit:
            answer = api_error.response(413, f"a request may have {limit:,} bytes here")
            await answer(scope, receive, _with_headers(send))
            return
        await self._app(scope, _Bounded(receive, limit), _with_headers(send))

    def _refusal(
        self, path: str, headers: list[tuple[bytes, bytes]]
    ) -> tuple[int, str, None, str] | None:
        hosts = [v.decode("latin-1") for k, v in headers if k == b"host"]
        # With a key any Host is accepted: a rebound page has no key, a proxy has its own name.
        if len(hosts) != 1 or not (self._key or self._is_here(hosts[0])):
            return 403, "the Host header does not name this server", None, "host_not_allowed"
        origin = _first(headers, b"origin")
        if origin is not None and not self._is_known(origin.decode("latin-1"), hosts[0]):
            return 403, _FOREIGN, None, "foreign_origin"
        # Requests for images, scripts and the like have no Origin header.
        if origin is None and _first(headers, b"sec-fetch-site") == b"cross-site" and path != "/":
            return 403, _FOREIGN, None, "foreign_origin"
        if self._key is None or path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX):
            return None
        scheme, _, given = (_first(headers, b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), self._key):
            return 401, "a correct API key is needed", None, "invalid_api_key"
        return None

    def _is_known(self, origin: str, host: str) -> bool:
        return origin in self._origins or origin.partition("://")[2] == host

    def _is_here(self, host: str) -> bool:
        name = _without_port(host).lower()
        return name in self._names or _is_address(name)


class _Bounded:
    """``receive`` that limits the body, whose declared size may be missing or wrong."""

    def __init__(self, receive: Receive, limit: int) -> None:
        self._receive, self._left = receive, limit

    async def __call__(self) -> Message:
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise HTTPException(413, "the request is too large")
        return message


def _limit(path: str) -> int:
    # A multipart form has a few more bytes than the file in it.
    return limits.MAX_UPLOAD_BYTES + 2**16 if path == "/v1/files" else limits.MAX_BODY_BYTES


def _with_headers(send: Send) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), *_HEADERS]
        await send(message)

    return wrapped


def _first(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    return next((v for k, v in headers if k == name), None)


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    """Whether a Host is an IP address, which cannot be rebound like a name."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _names_of_this_machine() -> set[str]:
    name = socket.gethostname().lower()
    return {name, f"{name}.local"} if name else set()
