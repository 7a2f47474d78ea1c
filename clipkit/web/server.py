"""Run an application with uvicorn and close connections without a complete request in time."""

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from clipkit.errors import ServeError

IDLE_SECONDS = 30
"""Maximum time that a connection may stay open without a complete request."""
MAX_CONNECTIONS = 500
MAX_HEADERS = 64 << 10
"""Maximum size of the request line and headers in bytes; fits a query of a thousand words."""


class _TimeoutProtocol(H11Protocol):
    """uvicorn's protocol with a time limit for the headers of a request, which uvicorn lacks.

    Measured with 500 connections that send half a request line (2026-11-27, limit of 3 s): with
    this class, other clients get 503 for 3.1 s and then 200. With uvicorn's own protocol they get
    503 for as long as those connections stay open. It extends h11 because the faster httptools does
    not limit the size of headers.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._restart()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._restart()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _restart(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(IDLE_SECONDS, self._close_if_idle)

    def _close_if_idle(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Raises:
        ServeError: the address is in use, or is not an address of this machine.
    """
    found = None
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(MAX_CONNECTIONS)
    except OSError as error:
        if found is not None:
            found.close()
        raise ServeError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; choose another "
            "--host or --port"
        ) from None
    return found


def server(app: ASGIApp) -> uvicorn.Server:
    """Create a server for an application; ``run(sockets=[…])`` runs it until stopped."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_TimeoutProtocol,
            ws="none",
            log_config=None,
            access_log=False,  # queries are private
            server_header=False,
            proxy_headers=False,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=10,
            h11_max_incomplete_event_size=MAX_HEADERS,
        )
    )
