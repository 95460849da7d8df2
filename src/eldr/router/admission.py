"""Who may start: requests wait here, first come first served, until the decode workers have room for them.

They wait before their prefill: a hand-off's lease must not run out in a queue.
"""

from __future__ import annotations

import asyncio
from collections import deque

from eldr.fleet import Fleet


class NoWorkerError(Exception):
    """No worker of a role is available at all."""


class Admission:
    """Counts admitted requests against the decode workers' slots."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._queue: deque[asyncio.Future[None]] = deque()
        self._placing: list[asyncio.Future[None]] = []
        self.admitted = 0

    @property
    def queued(self) -> int:
        return len(self._queue)

    async def enter(self) -> None:
        """Wait for a slot. Raises NoWorkerError when there is no decode worker; a cancelled wait leaves the queue."""
        slots = self._fleet.decode_slots
        if slots == 0:
            raise NoWorkerError
        if not self._queue and self.admitted < slots:
            self.admitted += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._queue.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.leave()  # the slot came in the same moment
            elif turn in self._queue:
                self._queue.remove(turn)
            raise

    def leave(self) -> None:
        """Give the slot back."""
        self.admitted -= 1
        self.changed()

    def changed(self) -> None:
        """Look again: a request has ended, or the fleet is another."""
        placing, self._placing = self._placing, []
        for waiter in placing:
            if not waiter.done():
                waiter.set_result(None)
        slots = self._fleet.decode_slots if self._queue else 0
        while self._queue and (slots == 0 or self.admitted < slots):
            turn = self._queue.popleft()
            if turn.done():
                continue
            if slots == 0:
                turn.set_exception(NoWorkerError())
            else:
                self.admitted += 1
                turn.set_result(None)

    async def until_changed(self, timeout_s: float) -> bool:
        """Wait, having been admitted, until a worker may have become eligible; False if none did in time."""
        waiter = asyncio.get_running_loop().create_future()
        self._placing.append(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter
        except TimeoutError:
            return False
        return True
