"""Which worker has which zone, while workers join and leave."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle


class ZoneOwners:
    """The zone of each worker. It follows from which workers there are, and not from when they joined.

    So several routers that see the same workers give each of them the same zone, in whatever order they find them.
    Workers take the zones in turn, in the order of their names, of which shorter ones come first: w2 before w10. With
    more workers than zones several share one. With fewer, the last zones have no owner.

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
        taken = set(kept.values())
        turns = chain((zone for zone in range(self._zones) if zone not in taken), cycle(range(self._zones)))
        others = sorted((worker for worker in self.zone_of if worker not in kept), key=lambda name: (len(name), name))
        assigned = kept | dict(zip(others, turns, strict=False))
        self.zone_of = {worker: assigned[worker] for worker in self.zone_of}
