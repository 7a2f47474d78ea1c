"""Run an application until it is stopped, hanging up on clients that keep it waiting."""

import asyncio
import socket
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from clipkit.errors import ServeError

IDLE_SECONDS = 30
"""How long a connection may go without a whole request."""
CONNECTIONS = 500
LARGEST_HEADERS = 64 << 10
"""Bytes of a request's line and headers, which hold a query of a thousand words."""


class _Impatient(H11Protocol):
    """uvicorn's protocol, which by itself waits forever for a request that trickles in.

    h11 and not the faster httptools, which bounds no header.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        super().connection_lost(exc)

    def _wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(IDLE_SECONDS, self._hang_up)

    def _hang_up(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        ServeError: the address is taken, or is none of this machine's.
    """
    found = None
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(CONNECTIONS)
    except OSError as error:
        if found is not None:
            found.close()
        raise ServeError(
            f"{host} port {port} cannot be listened on ({error.strerror or error}); name another "
            "one with --host and --port"
        ) from None
    return found


def server(app: ASGIApp) -> uvicorn.Server:
    """A server of an application; ``run(sockets=[…])`` runs it until it is stopped."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=_Impatient,
            ws="none",
            log_config=None,
            access_log=False,  # queries are private
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS,
            timeout_keep_alive=IDLE_SECONDS,
            timeout_graceful_shutdown=10,
            h11_max_incomplete_event_size=LARGEST_HEADERS,
        )
    )
