"""Connections of uvicorn with bounds that it has none for: their number, and the time until a request has begun."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus

from uvicorn.protocols.http.h11_impl import H11Protocol

from svd_trt.serve.refusals import ErrorType, error_object

__all__ = ["Protocol"]

_MOST = 500  # connections
_SECONDS = 30.0  # from the first byte of a request, or the beginning of a connection, to the end of its headers


class Protocol(H11Protocol):
    """HTTP/1.1 that answers in the words of the API where no request reaches the application."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Refuse what is too many; otherwise wait for a request, but not for ever."""
        super().connection_made(transport)
        if len(self.connections) > _MOST:
            self._refuse(503, "queue_full", "the server has too many connections; try again later")
            return
        self._expect()

    def data_received(self, data: bytes) -> None:
        """Stop the clock when the headers of a request are complete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._forget()
        elif self._late is None and not self.transport.is_closing():
            self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._forget()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP."""
        self._refuse(400, "invalid_request", f"{msg.rstrip('.')}; send HTTP/1.1")

    def _expect(self) -> None:
        self._late = self.loop.call_later(_SECONDS, self._too_late)

    def _forget(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _too_late(self) -> None:
        if not self.transport.is_closing() and (self.cycle is None or self.cycle.response_complete):
            self._refuse(408, "invalid_request", f"no request arrived within {_SECONDS:g} s; send it again")

    def _refuse(self, status: int, kind: ErrorType, message: str) -> None:
        body = json.dumps({"error": error_object(kind, message)}).encode()
        head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body)
        self.transport.close()
