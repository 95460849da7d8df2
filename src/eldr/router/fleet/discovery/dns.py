"""DNS discovery: one worker for each address of a host name, such as a headless service."""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

from eldr.router.config.endpoint import Endpoint, Endpoints, Role
from eldr.router.fleet.discovery.base import Failed, Source

log = logging.getLogger("eldr.router")

TIMEOUT_S = 5.0
# Without jitter, routers that start together would query the name server together.
JITTER = 0.2

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Resolve a host to its IPv4 and IPv6 addresses, as the system does. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class DnsSource(Source):
    """Resolves the host of `url` every `interval_s` seconds, varied by a fifth. A failure keeps the last addresses.

    url: http://NAME:PORT/PATH. Its workers are http://ADDRESS:PORT/PATH.
    """

    name = "dns"

    def __init__(
        self,
        url: str,
        role: Role,
        interval_s: float,
        resolve: Resolve = resolve,
        failed: Failed = lambda source: None,
    ) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._port = parts.port or 80
        self._path = parts.path
        self._role: Role = role
        self._interval_s = interval_s
        self._resolve = resolve
        self._failed = failed
        self._failing = False

    async def watch(self) -> AsyncIterator[Endpoints]:
        known: Endpoints | None = None
        while True:
            found = await self._look()
            if found is not None and found != known:
                known = found
                yield found
            elif known is None:
                known = frozenset()
                yield known
            await asyncio.sleep(self._interval_s * random.uniform(1 - JITTER, 1 + JITTER))

    async def _look(self) -> Endpoints | None:
        """Return the current workers at the name, or None if that cannot be found out."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                addresses = await self._resolve(self._host, self._port)
        except (OSError, UnicodeError) as error:  # a timeout is an OSError
            if not self._failing:
                log.warning("%s cannot be resolved, its workers stay as they are: %s", self._host, error or "timeout")
            self._failing = True
            self._failed(self.name)
            return None
        self._failing = False
        return frozenset(Endpoint(self._url(address), self._role) for address in addresses) or None

    def _url(self, address: str) -> str:
        host = f"[{address}]" if ":" in address else address
        return f"http://{host}:{self._port}{self._path}"
