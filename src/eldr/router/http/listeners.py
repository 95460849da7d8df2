"""The sockets that the router listens on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Sequence
from typing import Any, cast

from eldr.router.config.groups import ClientLimits
from eldr.router.config.settings import ConfigError
from eldr.router.http.server import ClientConnection, Handler
from eldr.router.http.tls import HANDSHAKE_TIMEOUT_S, ServerTls

BACKLOG = 4096


class Listeners:
    """Opens one socket after the other, in the order of `inherited`: sockets that listen already; what is missing is
    opened anew. tls: None for plain HTTP."""

    def __init__(self, limits: ClientLimits, tls: ServerTls | None, inherited: Sequence[socket.socket]) -> None:
        self._limits = limits
        self._tls = tls
        self._inherited = list(inherited)
        self._servers: list[asyncio.Server] = []

    async def open(self, handler: Handler, host: str, port: int) -> None:
        """Hand every connection to `handler`. Raises ConfigError if the address is taken."""
        tls = self._tls
        where: dict[str, Any] = {"host": host, "port": port}
        if len(self._servers) < len(self._inherited):
            where = {"sock": self._inherited[len(self._servers)]}
        try:
            server = await asyncio.get_running_loop().create_server(
                lambda: cast(Any, ClientConnection(handler, self._limits)),
                **where,
                backlog=BACKLOG,
                ssl=None if tls is None else tls.context,
                ssl_handshake_timeout=None if tls is None else HANDSHAKE_TIMEOUT_S,
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {host}:{port}: {error}") from None
        self._servers.append(server)

    @property
    def sockets(self) -> list[socket.socket]:
        """One of each, in the order in which they were opened."""
        return [sock for server in self._servers for sock in server.sockets[:1]]

    def port(self, index: int) -> int:
        """The port of the index-th, which the system chose if 0 was asked for."""
        return int(self._servers[index].sockets[0].getsockname()[1])

    def close(self) -> None:
        """Take no more connections."""
        for server in self._servers:
            server.close()
