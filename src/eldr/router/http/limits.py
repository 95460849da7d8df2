"""Enforces the time limits of client connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Protocol


class Checked(Protocol):
    def check(self, now_s: float) -> None:
        """Look whether a time limit has passed at monotonic time `now_s`."""


class ConnectionWatch:
    """Ends connections that overstay. One pass a second over all of them: no timer per connection or request.

    In parts: to look at a thousand connections, of which nothing is in a cache any more, takes 5 ms, and every token
    that comes meanwhile would wait.
    """

    PERIOD_S = 1.0
    PARTS = 20

    def __init__(self, connections: Collection[Checked]) -> None:
        self._connections = connections

    async def run(self) -> None:
        while True:
            connections = list(self._connections)
            for part in range(self.PARTS):
                await asyncio.sleep(self.PERIOD_S / self.PARTS)
                now_s = time.monotonic()
                for connection in connections[part :: self.PARTS]:
                    if connection in self._connections:
                        connection.check(now_s)
