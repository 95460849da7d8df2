"""What a client may take up: sizes, counts and times."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """Limits of every client connection; `RouterConfig` describes each."""

    max_body_bytes: int
    max_connections: int
    head_timeout_s: float
    body_timeout_s: float
    idle_timeout_s: float
    stall_timeout_s: float


class Checked(Protocol):
    def check(self, now_s: float) -> None:
        """Look whether a time limit has passed at monotonic time `now_s`."""


class ConnectionWatch:
    """Ends connections that overstay. One pass a second over all of them: no timer per connection or request."""

    PERIOD_S = 1.0

    def __init__(self, connections: Iterable[Checked]) -> None:
        self._connections = connections

    async def run(self) -> None:
        while True:
            await asyncio.sleep(self.PERIOD_S)
            now_s = time.monotonic()
            for connection in list(self._connections):
                connection.check(now_s)
