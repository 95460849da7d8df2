"""Which worker has which zone, while workers join and leave."""

from __future__ import annotations

from collections.abc import Sequence


class ZoneOwners:
    """The zone of each worker.

    A worker that joins takes the zone with the fewest owners, the first one on a tie, so several workers may share a
    zone. When a worker leaves, its zone takes over an owner from a zone that has at least two more. If there is no such
    zone, a zone may stay without an owner until another worker joins.

    zone_of: worker -> its zone, 0 to K - 1, in the order in which workers joined.
    """

    def __init__(self, zones: int) -> None:
        self.zone_of: dict[str, int] = {}
        self._owners = [0] * zones

    def join(self, worker: str) -> None:
        """Give a new worker a zone."""
        zone = self._owners.index(min(self._owners))
        self.zone_of[worker] = zone
        self._owners[zone] += 1

    def leave(self, worker: str) -> None:
        """Remove a worker. Raises KeyError for a worker without a zone."""
        self._owners[self.zone_of.pop(worker)] -= 1
        most, fewest = max(self._owners), min(self._owners)
        if most - fewest > 1:
            crowded, lonely = self._owners.index(most), self._owners.index(fewest)
            newest = [worker for worker, zone in self.zone_of.items() if zone == crowded][-1]
            self.zone_of[newest] = lonely
            self._owners[crowded] -= 1
            self._owners[lonely] += 1

    def replace(self, workers: Sequence[str]) -> None:
        """Take new zones over, one for each of `workers` in this order.

        Workers that have left since the zones were fitted get none. Workers that have joined since join again.
        """
        new_zone = {worker: zone for zone, worker in enumerate(workers)}
        joined_since = [worker for worker in self.zone_of if worker not in new_zone]
        self.zone_of = {worker: new_zone[worker] for worker in self.zone_of if worker in new_zone}
        self._owners = [0] * len(workers)
        for zone in self.zone_of.values():
            self._owners[zone] += 1
        for worker in joined_since:
            self.join(worker)
