"""The workers behind the router: their roles, load, health and draining. No IO and no policy."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from eldr.errors import EldrError
from eldr.router.config.endpoint import Role

# Length of the moving average of a worker's time per output token, in streams.
RECENT_STREAMS = 10


class FleetError(EldrError):
    """A worker cannot be added to the fleet, or is not in it."""


@dataclass(slots=True, eq=False)
class Worker:
    """One engine behind one URL. The URL identifies it within its role. Each attribute is one thing known about it.

    max_inflight: the most requests it may run at once.
    in_flight: the requests it runs now.
    healthy: whether it answers its probes and accepts connections. A new worker is unhealthy until its first probe.
    draining: whether it finishes what it runs and gets nothing new.
    source: where it comes from: static, file, dns or admin.
    problem: why it got no requests at the last check. Empty if nothing was wrong.
    ejected: whether it failed requests and gets nothing new for a while (router/fleet/ejection.py).
    on_trial: whether it was ejected and gets one request to prove itself.
    models: the names that it serves. None while unknown.
    max_model_len: by name, how many tokens a prompt and its answer may have together. Empty while unknown.
    lease_until_s: the monotonic time until which decode workers may still pull blocks from it.
    load: the engine's last report: requests waiting in it, and the share of its KV cache in use. None while unknown.
    active_experts: recent mean of the distinct experts per decode step and layer. None while unknown.
    tpot_s: mean time per output token of its last streams. None before the first.
    clock_skew_s: its clock minus ours, according to its last answer, to a second. None while unknown.
    """

    url: str
    role: Role
    max_inflight: int
    in_flight: int = 0
    healthy: bool = False
    draining: bool = False
    source: str = ""
    problem: str = ""
    ejected: bool = False
    on_trial: bool = False
    models: frozenset[str] | None = None
    max_model_len: dict[str, int] = field(default_factory=dict)
    lease_until_s: float = 0.0
    load: tuple[int, float] | None = None
    active_experts: float | None = None
    tpot_s: float | None = None
    clock_skew_s: float | None = None

    @property
    def state(self) -> str:
        """Its state in one word."""
        if self.draining:
            return "draining"
        if self.ejected:
            return "ejected"
        if self.healthy:
            return "trial" if self.on_trial else "up"
        return "joining" if self.models is None and not self.problem else "down"

    def observe_tpot(self, tpot_s: float) -> None:
        self.tpot_s = tpot_s if self.tpot_s is None else self.tpot_s + (tpot_s - self.tpot_s) / RECENT_STREAMS

    @property
    def up(self) -> bool:
        """Whether it could take requests if it were not ejected."""
        return self.healthy and not self.draining

    @property
    def available(self) -> bool:
        return self.healthy and not self.draining and not self.ejected


class Fleet:
    """All workers, and the listeners to their changes.

    The view of eligible decode workers is updated with every change and never rebuilt.
    """

    def __init__(self) -> None:
        self._workers: dict[Role, dict[str, Worker]] = {"prefill": {}, "decode": {}}
        self._eligible: dict[str, int] = {}
        self._decode_slots = 0
        # The monotonic time since when a role has had no available worker. None while it has one.
        self._gone_since_s: dict[Role, float | None] = {"prefill": -math.inf, "decode": -math.inf}
        self._listeners: list[Callable[[Worker], None]] = []
        self._held: set[Worker] | None = None

    def on_change(self, listener: Callable[[Worker], None]) -> None:
        """Call `listener` with every worker that joins, leaves, or may now get a different number of requests.

        Listeners are called after the change, in the order in which they were added. A change of the requests in flight
        does not count.
        """
        self._listeners.append(listener)

    @contextmanager
    def told_together(self) -> Iterator[None]:
        """Collect notifications and send them at the end: workers that left first, then in the order of joining."""
        self._held = set()
        try:
            yield
        finally:
            held, self._held = self._held, None
            here = [worker for workers in self._workers.values() for worker in workers.values() if worker in held]
            for worker in (*held.difference(here), *here):
                self._tell(worker)

    def _tell(self, worker: Worker) -> None:
        if self._held is not None:
            self._held.add(worker)
            return
        for listener in self._listeners:
            listener(worker)

    def add(self, url: str, role: Role, max_inflight: int) -> Worker:
        """Add a new worker, which is unhealthy until a probe succeeds.

        Raises FleetError if the fleet already has it.
        """
        if url in self._workers[role]:
            raise FleetError(f"{role} worker {url} is already in the fleet")
        worker = Worker(url, role, max_inflight)
        self._workers[role][url] = worker
        self._tell(worker)
        return worker

    def remove(self, worker: Worker) -> None:
        if self._workers[worker.role].pop(worker.url, None) is None:
            raise FleetError(f"{worker.role} worker {worker.url} is not in the fleet")
        if worker.role == "decode":
            self._eligible.pop(worker.url, None)
        self._fleet_changed(worker)

    def has(self, worker: Worker) -> bool:
        """Whether this worker object is in the fleet.

        Another worker that joined later under the same URL is a different one.
        """
        return self._workers[worker.role].get(worker.url) is worker

    def workers(self, role: Role) -> Mapping[str, Worker]:
        """URL -> worker, in the order in which they were added."""
        return self._workers[role]

    def available(self, role: Role) -> Iterator[Worker]:
        """The workers of `role` that may get new requests, whether or not they have room."""
        return (worker for worker in self._workers[role].values() if worker.available)

    def any_available(self, role: Role) -> bool:
        """Whether any worker of `role` is available."""
        return self._gone_since_s[role] is None

    def gone_for_s(self, role: Role) -> float | None:
        """How long no worker of `role` has been available. None if one is, infinite if none ever was."""
        since_s = self._gone_since_s[role]
        return None if since_s is None else time.monotonic() - since_s

    @property
    def eligible(self) -> Mapping[str, int]:
        """Decode workers that may take a request now: URL -> requests in flight.

        A live view that must not be modified.
        """
        return self._eligible

    @property
    def decode_slots(self) -> int:
        """How many requests the available decode workers may run at once."""
        return self._decode_slots

    @property
    def ready(self) -> bool:
        """Whether at least one prefill and one decode worker are available."""
        return self.any_available("prefill") and self.any_available("decode")

    def serves(self, model: str) -> bool:
        """Whether an available decode worker serves `model`, or may serve it because its models are unknown."""
        for worker in self._workers["decode"].values():
            if worker.available and (worker.models is None or model in worker.models):
                return True
        return False

    def least_busy(self, role: Role, model: str | None, avoided: Collection[str] = ()) -> Worker | None:
        """An available worker with the fewest requests in flight, any of several. None if there is none.

        model: which it must serve, or may serve because its models are unknown. None if any will do.
        avoided: URLs of workers that are taken only if there is no other.
        """
        best: Worker | None = None
        best_rank: tuple[bool, int, float] | None = None
        for worker in self.available(role):
            if not model or worker.models is None or model in worker.models:
                rank = (worker.url in avoided, worker.in_flight, random.random())
                if best_rank is None or rank < best_rank:
                    best, best_rank = worker, rank
        return best

    def max_model_len(self, model: str | None) -> int | None:
        """How many tokens a prompt and its answer may have on the decode worker that takes most. None if unknown."""
        most = 0
        for worker in self._workers["decode"].values():
            if model and worker.available and (worker.models is None or model in worker.models):
                here = worker.max_model_len.get(model)
                if here is None:
                    return None
                most = max(most, here)
        return most or None

    def started(self, worker: Worker) -> None:
        worker.in_flight += 1
        self._refresh(worker)

    def finished(self, worker: Worker) -> None:
        worker.in_flight -= 1
        self._refresh(worker)

    def set_healthy(self, worker: Worker, healthy: bool) -> None:
        worker.healthy = healthy
        self._changed(worker)

    def set_draining(self, worker: Worker, draining: bool) -> None:
        worker.draining = draining
        self._changed(worker)

    def set_ejected(self, worker: Worker, ejected: bool, on_trial: bool = False) -> None:
        worker.ejected = ejected
        worker.on_trial = on_trial
        self._changed(worker)

    def set_limit(self, worker: Worker, max_inflight: int) -> None:
        if worker.max_inflight != max_inflight:
            worker.max_inflight = max_inflight
            self._changed(worker)

    def _changed(self, worker: Worker) -> None:
        # Requests may outlive their worker's place in the fleet. They say nothing about another one under its URL.
        if self.has(worker):
            self._fleet_changed(worker)

    def _fleet_changed(self, worker: Worker) -> None:
        # A worker on trial gets one request, no matter what it still runs from before.
        self._decode_slots = sum(1 if each.on_trial else each.max_inflight for each in self.available("decode"))
        if any(self.available(worker.role)):
            self._gone_since_s[worker.role] = None
        elif self._gone_since_s[worker.role] is None:
            self._gone_since_s[worker.role] = time.monotonic()
        self._refresh(worker)
        self._tell(worker)

    def _refresh(self, worker: Worker) -> None:
        if worker.role != "decode" or not self.has(worker):
            return
        if worker.available and worker.in_flight < worker.max_inflight:
            self._eligible[worker.url] = worker.in_flight
        else:
            self._eligible.pop(worker.url, None)
