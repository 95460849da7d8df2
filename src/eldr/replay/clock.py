"""Simulated time and the events that lie ahead."""

from __future__ import annotations

import heapq


class Clock:
    """Goes from one end of a worker's run of steps to the next.

    now_s: seconds since the start of the simulation.
    """

    def __init__(self) -> None:
        self.now_s = 0.0
        self._ends: list[tuple[float, int, int]] = []
        self._planned: dict[int, int] = {}  # worker -> ends planned so far, of which only the last counts

    def plan(self, worker: int, end_s: float) -> None:
        """Plan the end of the worker's run. It replaces any end planned before."""
        version = self._planned.get(worker, 0) + 1
        self._planned[worker] = version
        heapq.heappush(self._ends, (end_s, worker, version))

    def next_end(self, until_s: float) -> int | None:
        """Go to the next end of a run and return its worker.

        If none lies up to and including `until_s`, go to `until_s` and return None.
        """
        while self._ends and self._ends[0][0] <= until_s:
            end_s, worker, version = heapq.heappop(self._ends)
            if version == self._planned[worker]:
                self.now_s = end_s
                return worker
        self.now_s = until_s
        return None
