"""What every request passes first: host name, origin and key; and headers that every answer gets."""

from __future__ import annotations

import secrets
from collections.abc import Collection, Mapping
from contextlib import suppress
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from svd_trt.serve.addresses import LOOPBACK, host_name
from svd_trt.serve.refusals import RequestError
from svd_trt.serve.service import Service
from svd_trt.serve.streaming import BrokenStream
from svd_trt.serve.uploads import discard

__all__ = ["Guard", "error_response"]

_HEADERS: Mapping[str, str] = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_OPEN = ("/", "/healthz", "/readyz")  # without a key: the page asks for it, and a supervisor has none
_FOREIGN = (
    "pages of other sites may not use this server; if a proxy shows this page, let it pass the header Host, or start "
    "the server with --allow-host and the proxy's name"
)
_API_POLICY = "default-src 'none'; frame-ancestors 'none'"


class Guard:
    """ASGI middleware; refuses what may not reach the routes."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        begun = replaced = False

        async def sending(message: Message) -> None:
            nonlocal begun, replaced
            if replaced:
                return
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                if message["status"] >= 400 and headers.get("content-type") != "application/json":
                    # Of a library, such as a range that cannot be met.
                    kept = {"Content-Range": headers["content-range"]} if "content-range" in headers else {}
                    await error_response(_plain(message["status"], kept))(scope, receive, sending)
                    replaced = True
                    return
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Content-Security-Policy", _API_POLICY)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        error = _refusal(self._service, scope)
        if error is not None:
            self._service.metrics.refused(error.error["type"])
            await discard(receive)
            await error_response(error)(scope, receive, sending)
            return
        try:
            with suppress(BrokenStream):  # a response that is not complete ends its connection
                await self._app(scope, receive, sending)
        except Exception:
            if not begun:
                await error_response(self._failure())(scope, receive, sending)
            raise  # to the log

    def _failure(self) -> RequestError:
        """What a request is answered that failed for no reason of its own."""
        error = RequestError(500, "server_error", "the server failed; its log says why")
        self._service.metrics.refused(error.error["type"])
        return error


def error_response(error: RequestError) -> JSONResponse:
    """The answer to a request that is refused."""
    return JSONResponse({"error": error.error}, error.status, error.headers)


def _plain(status: int, headers: Mapping[str, str]) -> RequestError:
    if status == 416:
        return RequestError(status, "invalid_request", "the video has no bytes in this range", headers=headers)
    return RequestError(status, "invalid_request", f"{HTTPStatus(status).phrase}: check the request", headers=headers)


def _refusal(service: Service, scope: Scope) -> RequestError | None:
    headers = Headers(scope=scope)
    if service.names and host_name(headers.get("host", "")) not in service.names:
        # A page of another site could give its own name this address (DNS rebinding).
        return RequestError(
            403,
            "unauthorized",
            "this server answers only to its own names; open it as localhost, or allow the name with --allow-host",
        )
    if scope["path"] != "/" and _foreign(headers, service.names):
        return RequestError(403, "unauthorized", _FOREIGN)
    if service.api_key is None or scope["path"] in _OPEN:
        return None
    scheme, _, key = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secrets.compare_digest(key.strip().encode(), service.api_key.encode()):
        return None
    words = "this server needs a key; send it as Authorization: Bearer KEY"
    if scheme:
        words = "the key is wrong; this server needs another one as Authorization: Bearer KEY"
    return RequestError(401, "unauthorized", words, headers={"WWW-Authenticate": "Bearer"})


def _foreign(headers: Headers, names: Collection[str]) -> bool:
    """Whether a page of another site makes the request.

    Browsers send Sec-Fetch-Site to addresses that they trust alone, which a bare address in a network is not, and
    Origin with every request that could change something. A proxy may give another Host than the page's, whose name
    is then one of ``names``.
    """
    if headers.get("sec-fetch-site", "none") in ("cross-site", "same-site"):
        return True
    origin = headers.get("origin")
    if origin is None:
        return False
    place = origin.lower().partition("://")[2]
    return place != headers.get("host", "").lower() and host_name(place) not in set(names) - LOOPBACK
