"""Long work in pieces, so that tokens move on between two of them."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

# Does one piece. Returns whether there are more.
Work = Callable[[], bool]


class Turns:
    """Does one piece of work in each turn of the event loop, however much there is. Those with work take turns."""

    def __init__(self) -> None:
        self._waiting: deque[Work] = deque()
        self._called = False

    def add(self, work: Work) -> None:
        """Call `work` in later turns of the event loop, until it returns False."""
        self._waiting.append(work)
        self._call()

    def _call(self) -> None:
        if self._waiting and not self._called:
            self._called = True
            asyncio.get_running_loop().call_soon(self._next)

    def _next(self) -> None:
        self._called = False
        work = self._waiting.popleft()
        try:
            if work():
                self._waiting.append(work)
        finally:
            self._call()
