"""Enforces the time limits of client connections."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from typing import Protocol


class Checked(Protocol):
    def check(self, now_s: float) -> None:
        """Act on any time limit that has passed. now_s: monotonic time."""


class ConnectionWatch:
    """Checks every connection once a second, which spares a timer per connection and request.

    Each pass is split into parts. Checking a thousand connections whose data has left the CPU caches takes 5 ms, and
    tokens that arrive in the meantime would have to wait.
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
