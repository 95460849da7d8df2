"""The sockets that the router listens on."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Any, cast

from eldr.router.config.groups import ClientLimits
from eldr.router.config.settings import ConfigError
from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.server import ClientConnection, Handler
from eldr.router.http.tls import HANDSHAKE_TIMEOUT_S, ServerTls
from eldr.router.http.turns import Turns

BACKLOG = 4096


class Listeners:
    """Opens the listening sockets: first for clients, then for the admin API, and last for gRPC.

    inherited: sockets that already listen, in that order. They are used first; missing ones are opened.
    tls: None for plain HTTP.
    """

    def __init__(
        self, limits: ClientLimits, memory: BodyMemory, tls: ServerTls | None, inherited: Sequence[socket.socket]
    ) -> None:
        self._limits = limits
        self._memory = memory
        self._decoding_turns = Turns()
        self._tls = tls
        self._inherited = list(inherited)
        self._servers: list[asyncio.Server] = []

    async def open(self, handler: Handler, host: str, port: int) -> None:
        """Listen, and give each connection to `handler`. Raises ConfigError if the router cannot listen there."""
        limits, memory, turns = self._limits, self._memory, self._decoding_turns
        await self.open_for(lambda: cast(Any, ClientConnection(handler, limits, memory, turns)), host, port, self._tls)

    async def open_for(
        self, make: Callable[[], asyncio.BaseProtocol], host: str, port: int, tls: ServerTls | None
    ) -> None:
        """Listen, with a protocol of `make` for each connection. Raises ConfigError if the router cannot listen there.

        tls: None for plain text.
        """
        where: dict[str, Any] = {"host": host, "port": port}
        if len(self._servers) < len(self._inherited):
            where = {"sock": self._inherited[len(self._servers)]}
        try:
            server = await asyncio.get_running_loop().create_server(
                make,
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
        """One listening socket per address, in the order in which they were opened."""
        return [sock for server in self._servers for sock in server.sockets[:1]]

    def port(self, index: int) -> int:
        """The port of the socket number `index`. The system chose it if the configured port is 0."""
        return int(self._servers[index].sockets[0].getsockname()[1])

    def close(self) -> None:
        """Accept no more connections."""
        for server in self._servers:
            server.close()
