"""Chooses the prefill worker: consistent hashing of the prompt's start, with bounded load.

Requests with the same start meet on the worker that has it in its prefix cache. No worker takes more than 1.25 times
the mean load (Mirrokni, Thorup, Zadimoghaddam: Consistent Hashing with Bounded Loads, SODA 2018). Requests beyond that
spill to the next worker on the ring. ELDR (arXiv 2607.00466) hashes the first 1,024 bytes of the prompt.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import zlib
from collections.abc import Collection

from eldr.router.fleet.groups import ModelGroup
from eldr.router.fleet.workers import Worker

LOAD_FACTOR = 1.25
# Points per worker on the ring. With eight workers, the largest share is then about 1.2 times the mean.
POINTS = 128


class PrefillRing:
    """The hash ring of the prefill workers of one group."""

    def __init__(self, group: ModelGroup) -> None:
        self._group = group
        self._urls: set[str] = set()
        self._points: list[int] = []
        self._workers: list[str] = []

    def fleet_changed(self, worker: Worker) -> None:
        """A listener of the fleet. The ring includes all prefill workers of the group, available or not."""
        if worker.leg == "prefill" and self._group.has(worker) != (worker.url in self._urls):
            self._rebuild()

    def _rebuild(self) -> None:
        self._urls = set(self._group.workers["prefill"])
        ring = sorted((_point(f"{url}#{index}".encode()), url) for url in self._urls for index in range(POINTS))
        self._points = [point for point, _ in ring]
        self._workers = [url for _, url in ring]

    def choose(
        self, start: bytes, excluded: Collection[str] = (), usable: Collection[str] | None = None
    ) -> tuple[Worker, bool] | None:
        """Choose the worker for prompts with this start. None if no prefill worker is available.

        Returns the worker, and whether the request spilled there from a full one. Workers in `excluded` are chosen only
        if there is no other, and workers that are not in `usable` never. None stands for all.
        """
        workers = self._group.workers["prefill"]
        available = [worker for worker in workers.values() if worker.available]
        if usable is not None:
            available = [worker for worker in available if worker.url in usable]
        if not available:
            return None
        if excluded:
            available = [worker for worker in available if worker.url not in excluded] or available
        total = 1 + sum(worker.in_flight for worker in available)
        most = math.ceil(LOAD_FACTOR * total / len(available))
        at = bisect.bisect(self._points, _key(start))
        first: str | None = None
        for step in range(len(self._workers)):
            worker = workers[self._workers[(at + step) % len(self._workers)]]
            if worker not in available:
                continue
            if first is None:
                first = worker.url
            if worker.in_flight < most:
                return worker, worker.url != first
        # Unreachable as long as `most` exceeds the mean, which bounded loads guarantee.
        return min(available, key=lambda worker: worker.in_flight), True


def _point(data: bytes) -> int:
    """A position on the ring, 0 to 2^64.

    Names that differ in one digit must land as if drawn at random, which needs a good hash.
    """
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def _key(data: bytes) -> int:
    """A position on the ring for a kilobyte of a prompt.

    A checksum is enough, and takes a tenth of the time. Prompts differ in more than a digit, and a client that wants
    two of them to meet can simply start them alike.
    """
    return zlib.crc32(data) << 32
