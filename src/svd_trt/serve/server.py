"""The process: a socket, uvicorn, and an end by signals or because no more videos can be made."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

from svd_trt.errors import OutputError, SvdTrtError
from svd_trt.serve.events import Hub
from svd_trt.serve.protocol import Protocol

__all__ = ["Ended", "bind", "run_server"]

_GRACE = 10  # seconds for answers that are being sent


class Ended:
    """Why the server should end by itself, which any thread may say."""

    def __init__(self) -> None:
        self.error: SvdTrtError | None = None
        self.call: Callable[[], object] | None = None

    def say(self, error: SvdTrtError) -> None:
        """End the server with ``error``."""
        self.error = self.error or error
        if self.call is not None:
            self.call()


class _Server(uvicorn.Server):
    """Ends streams of events before it waits for open connections."""

    hub: Hub

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.hub.close()
        await super().shutdown(sockets)


def bind(host: str, port: int, stalled: float) -> socket.socket:
    """A socket at an address, which does not listen yet.

    Args:
        host: name or address.
        port: 0 takes a free one.
        stalled: seconds after which a connection ends whose client takes nothing of what is sent.

    Raises:
        OutputError: there is no such address, or another program has it.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Connections inherit it. The kernel then also ends one whose last bytes wait, which no timer here would see.
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(stalled * 1000))
        opened.bind((host, port))
    except OSError as error:
        opened.close()
        raise _taken(host, port, error) from error
    return opened


def _taken(host: str, port: int, error: OSError) -> OutputError:
    reason = error.strerror or error
    return OutputError(f"cannot serve at {host}, port {port}: {reason}; choose another --host or --port")


def run_server(
    application: FastAPI, hub: Hub, opened: socket.socket, ended: Ended, ready: Callable[[], object]
) -> None:
    """Serve until a signal, or until ``ended`` says so.

    Raises:
        SvdTrtError: no more videos can be made.
    """
    config = uvicorn.Config(
        application,
        log_config=None,
        access_log=False,
        server_header=False,
        http=Protocol,
        timeout_graceful_shutdown=_GRACE,
        timeout_keep_alive=30,
        lifespan="on",
        ws="none",
    )
    server = _Server(config)
    server.hub = hub

    async def serve() -> None:
        loop = asyncio.get_running_loop()

        def end() -> None:
            server.should_exit = True

        ended.call = lambda: loop.call_soon_threadsafe(end)
        task: asyncio.Task[Any] = loop.create_task(server.serve(sockets=[opened]))
        while not server.started and not task.done():
            await asyncio.sleep(0.01)
        if server.started:
            ready()
        await task

    try:
        asyncio.run(serve())
    except OSError as error:  # another program began to listen after `bind`
        host, port = opened.getsockname()[:2]
        raise _taken(host, port, error) from error
    if ended.error is not None:
        raise ended.error
