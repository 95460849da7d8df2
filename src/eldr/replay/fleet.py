"""The simulated fleet: its workers and their load, and the calls that tell the routers of both."""

from __future__ import annotations

from dataclasses import dataclass, field

from eldr.cost import StepCost
from eldr.policies.base import DecodeRequest
from eldr.replay.errors import ReplayError
from eldr.replay.prompts import Prompt
from eldr.replay.reading import ReadingMaker, distinct_experts
from eldr.replay.replicas import Replica, Replicas
from eldr.replay.worker import DecodeWorker, WorkerLimits


@dataclass(frozen=True, slots=True)
class FleetSpec:
    """The decode workers of a replay.

    costs: the cost model of each worker. Hardware may differ.
    moe_costs: the cost of the MoE layers alone, accounted in addition to the step time.
    limits: the limits that all workers share.
    reading: makes what the steps of each worker wait for.
    """

    costs: tuple[StepCost, ...]
    moe_costs: tuple[StepCost, ...]
    limits: WorkerLimits = field(default_factory=WorkerLimits)
    reading: ReadingMaker = distinct_experts


class SimulatedFleet:
    """The workers of one run. Policies hear of every worker and request as they would in the router.

    workers: all that have ever joined, by index.
    by_name: the same workers by name.
    in_flight: eligible worker -> its requests in flight, from whatever router.
    """

    def __init__(self, spec: FleetSpec, routers: Replicas) -> None:
        self.workers: list[DecodeWorker] = []
        self.by_name: dict[str, DecodeWorker] = {}
        self.in_flight: dict[str, int] = {}
        self._draining: dict[str, int] = {}  # worker -> requests it still has
        self._limits = spec.limits
        self._reading = spec.reading
        self._first_costs = spec.costs[0], spec.moe_costs[0]
        self._routers = routers
        for cost, moe_cost in zip(spec.costs, spec.moe_costs, strict=True):
            self._join(cost, moe_cost)

    def change(self, workers: int) -> None:
        """Let workers join, with the first worker's cost. A negative number drains those that have been there longest.

        Raises ReplayError if none would be left.
        """
        for _ in range(workers):
            self._join(*self._first_costs)
        if -workers >= len(self.in_flight):
            raise ReplayError(f"{-workers} workers cannot leave a fleet of {len(self.in_flight)}")
        for name in list(self.in_flight)[: max(0, -workers)]:
            self._draining[name] = self.in_flight.pop(name)
            self._routers.drain(name)
            self._leave_if_idle(name)

    def cached_tokens(self, prompt: Prompt) -> dict[str, int]:
        """Eligible worker -> tokens of `prompt` that it has in its cache. Workers without any are left out."""
        found = {name: self.by_name[name].cache.cached_tokens(prompt) for name in self.in_flight}
        return {name: tokens for name, tokens in found.items() if tokens}

    def started(self, router: Replica, request: DecodeRequest, name: str, now_s: float) -> None:
        """A router has sent a request to an eligible worker."""
        self.in_flight[name] += 1
        self._routers.started(router, request, name, now_s)

    def finished(self, router: Replica, request: DecodeRequest, name: str, now_s: float) -> None:
        """A router's request has ended on its worker, which may be draining."""
        load = self._draining if name in self._draining else self.in_flight
        load[name] -= 1
        self._routers.finished(router, request, name, now_s)
        self._leave_if_idle(name)

    def _join(self, cost: StepCost, moe_cost: StepCost) -> None:
        index = len(self.workers)
        worker = DecodeWorker(index, cost, moe_cost, self._reading(index), self._limits)
        self.workers.append(worker)
        self.by_name[worker.name] = worker
        self.in_flight[worker.name] = 0
        self._routers.joined(worker.name)

    def _leave_if_idle(self, name: str) -> None:
        if self._draining.get(name) == 0:
            del self._draining[name]
            self._routers.left(name)
