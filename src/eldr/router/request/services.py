"""What every request works with."""

from __future__ import annotations

import logging
import math
from collections import defaultdict
from dataclasses import dataclass, field

from eldr.router.config.endpoint import Role
from eldr.router.config.settings import RouterConfig
from eldr.router.fleet.outcomes import Outcomes
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.client import ConnectError
from eldr.router.http.pool import WorkerPool
from eldr.router.observe.counters import Metrics
from eldr.router.observe.logs import Throttle
from eldr.router.observe.tracing import Tracing
from eldr.router.placement.admission import Admission
from eldr.router.placement.decode import Placements
from eldr.router.placement.prefill import PrefillRing
from eldr.router.request.attempts import RetryBudget
from eldr.router.request.verdict import Names

log = logging.getLogger("eldr.router")


@dataclass
class Services:
    """The parts of one router.

    pools: the connections to each worker. answer_names, handoff_names: whether answers bear their
    request's name, by role, path and stream, and whether hand-offs do.
    """

    config: RouterConfig
    fleet: Fleet
    pools: dict[Worker, WorkerPool]
    ring: PrefillRing
    admission: Admission
    placements: Placements
    metrics: Metrics
    outcomes: Outcomes
    budget: RetryBudget
    throttle: Throttle
    admin_key: bytes | None
    client_header: bytes | None
    tracing: Tracing | None
    answer_names: defaultdict[tuple[Role, bytes, bool | None], Names] = field(
        default_factory=lambda: defaultdict(Names)
    )
    handoff_names: Names = field(default_factory=Names)

    def patience_s(self, role: Role) -> float:
        """How much longer to wait for a worker of `role`: without end while one is available.

        A worker that is restarted is back within seconds. A role that stays away is refused at once.
        """
        gone_s = self.fleet.gone_for_s(role)
        return math.inf if gone_s is None else self.config.worker_wait_s - gone_s

    def refused(self, worker: Worker, error: ConnectError) -> None:
        """A worker takes no connections: it gets nothing more until a probe succeeds."""
        if worker.healthy:
            log.warning("%s worker %s takes no connections", worker.role, worker.url)
        self.metrics.timeouts["connect"] += error.timed_out
        self.fleet.set_healthy(worker, False)
        self.outcomes.failed(worker, error.reason)
        self.outcomes.fleet_changed()

    def went_down(self, worker: Worker) -> None:
        """A worker answers no probes: what waits there for an answer is tried elsewhere, if there is an elsewhere.

        Streams that have begun are left to their own deadline; the worker may only be slow.
        """
        if self.fleet.any_available(worker.role):
            moved = self.pools[worker].give_up_waiting("the worker answers no probes", int(self.budget.left))
            if moved:
                log.warning("%d waiting exchanges leave %s worker %s", moved, worker.role, worker.url)
