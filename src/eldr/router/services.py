"""What every request works with."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from eldr.fleet import Fleet, Worker
from eldr.router.admission import Admission
from eldr.router.config import RouterConfig
from eldr.router.logs import Throttle
from eldr.router.metrics import Metrics
from eldr.router.placement import Placements
from eldr.router.prefix import PrefillRing
from eldr.router.upstream import WorkerPool

log = logging.getLogger("eldr.router")


@dataclass
class Services:
    """The parts of one router. `pools` holds the connections to each worker."""

    config: RouterConfig
    fleet: Fleet
    pools: dict[Worker, WorkerPool]
    ring: PrefillRing
    admission: Admission
    placements: Placements
    metrics: Metrics
    throttle: Throttle
    admin_key: bytes | None

    def refused(self, worker: Worker) -> None:
        """A worker takes no connections: it gets nothing more until a probe succeeds."""
        if worker.healthy:
            log.warning("%s worker %s takes no connections", worker.role, worker.url)
        self.fleet.set_healthy(worker, False)
        self.admission.changed()
