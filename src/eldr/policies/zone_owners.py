"""Which worker has which zone, while workers join and leave."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


class ZoneOwners:
    """The zone of each worker. It follows from which workers there are, and not from when they joined.

    So several routers that see the same workers give each of them the same zone, in whatever order they find them. With
    more workers than zones several share one, and no zone has two workers more than another. With fewer, some zones
    have no owner.

    Every pair of a worker and a zone has a number that looks drawn at random. The lowest pair is taken, then the lowest
    of those that are left: a stable matching, by the weights of rendezvous hashing (Thaler and Ravishankar 1998). Where
    one worker comes or goes, few others change their zones, mostly one or none. Dealt out in the order of names, half
    of them would, and run requests of two zones until the old ones end.

    zone_of: worker -> its zone, 0 to K - 1, in the order in which workers joined.
    """

    def __init__(self, zones: int) -> None:
        self.zone_of: dict[str, int] = {}
        self._zones = zones
        self._of_refit: dict[str, int] = {}

    def join(self, worker: str) -> None:
        """Give a new worker a zone. Others may change theirs."""
        self.zone_of[worker] = 0
        self._assign()

    def leave(self, worker: str) -> None:
        """Remove a worker. Others may change their zones. Raises KeyError for a worker without a zone."""
        del self.zone_of[worker]
        self._assign()

    def replace(self, workers: Sequence[str]) -> None:
        """Take new zones over, one for each of `workers` in this order, which they keep until the next ones.

        Other workers take the zones of those that are not there, and then all zones in turn.
        """
        self._of_refit = {worker: zone for zone, worker in enumerate(workers)}
        self._zones = len(workers)
        self._assign()

    def _assign(self) -> None:
        kept = {worker: zone for worker, zone in self._of_refit.items() if worker in self.zone_of}
        others = sorted(worker for worker in self.zone_of if worker not in kept)
        assigned = dict(kept)
        zones = sorted(set(range(self._zones)).difference(kept.values()))
        while others:
            matched = _match(_numbers(others, zones))
            assigned |= {worker: zones[at] for worker, at in zip(others, matched, strict=True) if at >= 0}
            others = [worker for worker in others if worker not in assigned]
            zones = list(range(self._zones))
        self.zone_of = {worker: assigned[worker] for worker in self.zone_of}


def _numbers(workers: Sequence[str], zones: Sequence[int]) -> NDArray[np.uint64]:
    """A number for each pair, uint64 [workers, zones]: splitmix64 (Steele, Lea and Flood 2014), seeded by the name."""
    seeds = [int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") for name in workers]
    steps = (np.array(zones, dtype=np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    number = np.array(seeds, dtype=np.uint64)[:, None] + steps
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(number ^ (number >> np.uint64(31)))


def _match(numbers: NDArray[np.uint64]) -> list[int]:
    """The column of each row [n, K], -1 if there are too few: the lowest pair of all, then the lowest of the others.

    A pair that is the lowest of its row and of its column is taken by that rule, whatever comes before it. There always
    is one.
    """
    found = np.full(len(numbers), -1)
    rows, columns = np.arange(numbers.shape[0]), np.arange(numbers.shape[1])
    while len(rows) and len(columns):
        left = numbers[np.ix_(rows, columns)]
        row_of = left.argmin(axis=0)
        taken = np.flatnonzero(left.argmin(axis=1)[row_of] == np.arange(len(columns)))
        found[rows[row_of[taken]]] = columns[taken]
        rows, columns = np.delete(rows, row_of[taken]), np.delete(columns, taken)
    return [int(column) for column in found]
