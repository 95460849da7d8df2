"""The workers behind the router: their roles, load, health and draining. No IO and no policy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from eldr.errors import EldrError
from eldr.learning.step_counters import StepCounters
from eldr.router.config.endpoint import LegName, Role, leg_of
from eldr.router.fleet.groups import ModelGroup, Names, Served

# Length of the moving average of a worker's time per output token, in streams.
RECENT_STREAMS = 10
# The least time per output token rises at most so fast, per stream.
RISE = 1.1


class FleetError(EldrError):
    """A worker cannot be added to the fleet, or is not in it."""


@dataclass(slots=True, eq=False)
class Worker:
    """One engine behind one URL. The URL identifies it among those that run the same leg of requests.

    Each attribute is one thing known about it.

    max_inflight: the most requests it may run at once, for all routers.
    in_flight: the requests it runs now for this router.
    elsewhere: the decode legs that it runs for other replicas.
    healthy: whether it answers its probes and accepts connections. A new worker is unhealthy until its first probe.
    draining: whether it finishes what it runs and gets nothing new.
    source: where it comes from: static, file, dns, kubernetes or admin.
    problem: why it got no requests at the last check. Empty if nothing was wrong.
    ejected: whether it failed requests and gets nothing new for a while (router/fleet/ejection.py).
    on_trial: whether it was ejected and gets one request to prove itself.
    free: how many more requests it may take, if it runs decode legs and is in a group.
    gone_since_s: the monotonic time since when it has not been available. None while it is, -inf if it never was.
    models: the names that it serves, of base models and adapters. None while unknown.
    bases: the names among them that are of base models.
    listed_s: the monotonic time at which it was asked for that list. -inf before the first answer.
    max_model_len: by name, how many tokens a prompt and its answer may have together. Empty while unknown.
    lease_until_s: the monotonic time until which decode workers may still pull blocks from it.
    cache_tokens: how many tokens its KV cache has room for; 0 if it keeps no prefixes. None while unknown.
    load: the engine's last report: requests waiting in it, and the share of its KV cache in use. None while unknown.
    active_experts: recent mean of the distinct experts per decode step and layer. None while unknown.
    tpot_s: mean time per output token of its last streams. None before the first.
    least_tpot_s: about the least of them. A slow client makes a stream slow, but none makes one fast.
    clock_skew_s: its clock minus ours, according to its last answer, to a second. None while unknown.
    bootstrap_port: where decode workers of SGLang ask for its blocks, if it is a prefill worker of SGLang.
    """

    url: str
    role: Role
    max_inflight: int
    in_flight: int = 0
    elsewhere: int = 0
    healthy: bool = False
    draining: bool = False
    source: str = ""
    problem: str = ""
    ejected: bool = False
    on_trial: bool = False
    free: int = 0
    gone_since_s: float | None = -math.inf
    models: frozenset[str] | None = None
    max_model_len: dict[str, int] = field(default_factory=dict)
    bases: frozenset[str] = frozenset()
    listed_s: float = -math.inf
    lease_until_s: float = 0.0
    cache_tokens: int | None = None
    load: tuple[int, float] | None = None
    active_experts: float | None = None
    tpot_s: float | None = None
    least_tpot_s: float = 0.0
    clock_skew_s: float | None = None
    bootstrap_port: int = 0

    @property
    def leg(self) -> LegName:
        """The leg of requests that it runs."""
        return leg_of(self.role)

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

    @property
    def busy(self) -> int:
        """The requests that it runs now, for this router and for other replicas."""
        return self.in_flight + self.elsewhere

    def observe_tpot(self, tpot_s: float) -> None:
        if self.tpot_s is None:
            self.tpot_s = self.least_tpot_s = tpot_s
            return
        self.tpot_s += (tpot_s - self.tpot_s) / RECENT_STREAMS
        self.least_tpot_s = min(tpot_s, self.least_tpot_s * RISE)

    @property
    def up(self) -> bool:
        """Whether it could take requests if it were not ejected."""
        return self.healthy and not self.draining

    @property
    def available(self) -> bool:
        return self.healthy and not self.draining and not self.ejected


class Fleet:
    """All workers, in groups by the model that they serve, and the listeners to their changes.

    A worker belongs to no group until it is first healthy.

    groups: there is at least one. It has no workers at first.
    """

    def __init__(self) -> None:
        self._workers: dict[LegName, dict[str, Worker]] = {"prefill": {}, "decode": {}}
        self.groups = [ModelGroup()]
        self._group_of: dict[Worker, ModelGroup] = {}
        self._names = Names()
        self._decode_slots = 0
        self._listeners: list[Callable[[Worker], None]] = []
        self._step_listeners: list[Callable[[Worker, StepCounters], None]] = []
        self._held: set[Worker] | None = None

    def on_change(self, listener: Callable[[Worker], None]) -> None:
        """Call `listener` with every worker that joins, leaves, or may now get a different number of requests.

        Listeners are called after the change, in the order in which they were added. A change of the requests in flight
        does not count.
        """
        self._listeners.append(listener)

    def on_steps(self, listener: Callable[[Worker, StepCounters], None]) -> None:
        """Call `listener` with what a worker that runs decode legs counts of its steps, at every look at it."""
        self._step_listeners.append(listener)

    def tell_steps(self, worker: Worker, counted: StepCounters) -> None:
        """A worker has counted so much since its engine started."""
        for listener in self._step_listeners:
            listener(worker, counted)

    @contextmanager
    def told_together(self) -> Iterator[None]:
        """Collect notifications and send them at the end: workers that left first, then in the order of joining."""
        self._held = set()
        try:
            yield
        finally:
            held, self._held = self._held, None
            self._refresh_names()
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
        worker = Worker(url, role, max_inflight)
        workers = self._workers[worker.leg]
        if url in workers:
            raise FleetError(f"{workers[url].role} worker {url} is already in the fleet")
        workers[url] = worker
        if not any(self.groups[0].members()):  # so that whoever waits for it is told what is missing
            self.groups[0].aggregated = role == "aggregated"
        self._tell(worker)
        return worker

    def remove(self, worker: Worker) -> None:
        if self._workers[worker.leg].pop(worker.url, None) is None:
            raise FleetError(f"{worker.role} worker {worker.url} is not in the fleet")
        group = self._group_of.pop(worker, None)
        moved: list[Worker] = []
        if group is not None:
            group.remove(worker)
            moved = self._regrouped(group)
        self._fleet_changed(worker)
        for member in moved:
            self._tell(member)

    def has(self, worker: Worker) -> bool:
        """Whether this worker object is in the fleet.

        Another worker that joined later under the same URL is a different one.
        """
        return self._workers[worker.leg].get(worker.url) is worker

    def workers(self, leg: LegName) -> Mapping[str, Worker]:
        """The workers that run this leg: URL -> worker, in the order in which they were added."""
        return self._workers[leg]

    def of_role(self, role: Role) -> Iterator[Worker]:
        """The workers of `role`, in the order in which they were added."""
        return (worker for workers in self._workers.values() for worker in workers.values() if worker.role == role)

    def any_of_role_available(self, role: Role) -> bool:
        return any(worker.available for worker in self.of_role(role))

    def available(self, leg: LegName) -> Iterator[Worker]:
        """The workers for `leg` that may get new requests, whether or not they have room."""
        return (worker for worker in self._workers[leg].values() if worker.available)

    def any_available(self, leg: LegName) -> bool:
        """Whether any worker for `leg` is available."""
        return any(self.available(leg))

    @property
    def eligible(self) -> Mapping[str, int]:
        """Workers for decode legs, of all groups, that may take a request now: URL -> requests in flight."""
        return {url: load for group in self.groups for url, load in group.eligible.items()}

    @property
    def decode_slots(self) -> int:
        """How many decode legs the available workers may run at once."""
        return self._decode_slots

    @property
    def ready(self) -> bool:
        """Whether some model has available workers for every leg of its requests."""
        return any(group.ready for group in self.groups)

    # Models.

    def group(self, worker: Worker) -> ModelGroup | None:
        """The group of a worker. None before it was first healthy, and after it has left the fleet."""
        return self._group_of.get(worker)

    def served(self, model: str | None) -> Served | None:
        """Who serves `model`. None if nobody answers for it, or if it is not given and could be several models."""
        if not model:
            return self.groups[0].whole if len(self.groups) == 1 else None
        served = self._names.get(model)
        if served is not None and (served.decode is None or served.decode):
            return served
        for group in self.groups:
            unlisted = group.unlisted
            if unlisted.decode is None or unlisted.decode:
                return unlisted
        return None

    def any_served(self) -> Served:
        """The workers of a model that some available worker answers for. Of any model if none does."""
        return next((group.whole for group in self.groups if group.whole.any_available("decode")), self.groups[0].whole)

    def listed(self) -> Iterator[Served]:
        """Every name that a worker lists."""
        return self._names.listed()

    def serving_otherwise(self, worker: Worker) -> Worker | None:
        """A worker that serves the model of `worker` in the other way: in two legs, or whole. None if there is none.

        Workers that are draining do not count, so that one way can follow the other.
        """
        for group in self.groups:
            if group.shares_base(worker) if worker.bases else group is self.groups[0]:
                for other in group.members():
                    if (other.role == "aggregated") != (worker.role == "aggregated") and not other.draining:
                        return other
        return None

    def set_models(self, worker: Worker, cards: Sequence[dict[str, Any]] | None, asked_s: float) -> None:
        """Note what a worker serves.

        cards: the entries of its /v1/models, each with an id. None if it lists them only for clients.
        asked_s: the monotonic time at which it was asked. An answer to an older question changes nothing.
        """
        if asked_s < worker.listed_s:
            return
        worker.listed_s = asked_s
        models: frozenset[str] | None = None
        bases: frozenset[str] = frozenset()
        lengths: dict[str, int] = {}
        if cards is not None:
            models = frozenset(card["id"] for card in cards)
            bases = frozenset(card["id"] for card in cards if not card.get("parent")) or models
            lengths = {
                card["id"]: most for card in cards if type(most := card.get("max_model_len")) is int and most > 0
            }
            self._names.note_cards(list(cards))
        changed = (models, bases, lengths) != (worker.models, worker.bases, worker.max_model_len)
        worker.models, worker.bases, worker.max_model_len = models, bases, lengths
        if changed and worker in self._group_of:
            self._join_group(worker)
            self._tell(worker)

    def _join_group(self, worker: Worker) -> None:
        """Put a worker into the group of its base model.

        A worker with names of two groups makes them one, until they have no name in common any more.
        """
        before = self._group_of.get(worker)
        matching = [group for group in self.groups if group.shares_base(worker)] if worker.bases else []
        if worker.models is None:
            group = before or self.groups[0]
        elif before in matching:
            group = before
        elif matching:
            group = matching[0]
        elif not self.groups[0].bases:
            group = self.groups[0]
        else:
            group = ModelGroup()
            self.groups.append(group)
        moved = [member for other in matching if other is not group for member in other.members()]
        for member in (*moved, worker):
            self._move(member, group)
        moved += self._regrouped(*matching, group, *(() if before is None else (before,)))
        for member in moved:
            self._tell(member)

    def _move(self, worker: Worker, group: ModelGroup) -> None:
        before = self._group_of.get(worker)
        if before is group:
            return
        if before is not None:
            before.remove(worker)
        self._group_of[worker] = group
        group.add(worker)

    def _regrouped(self, *groups: ModelGroup) -> list[Worker]:
        """Bring these groups and all names up to date. Returns the workers that are in a new group now."""
        moved: list[Worker] = []
        for group in groups:
            for part in group.parts()[1:]:
                new = ModelGroup()
                self.groups.append(new)
                for worker in part:
                    self._move(worker, new)
                new.name_members()
                moved += part
            group.name_members()
            # The last group stays when its last worker leaves, with the policy's state, for workers that come back.
            if not any(group.members()) and len(self.groups) > 1 and group in self.groups:
                self.groups.remove(group)
        if self._held is None:
            self._refresh_names()
        return moved

    def _refresh_names(self) -> None:
        self._names.refresh(self.groups, (w for workers in self._workers.values() for w in workers.values()))

    # Changes.

    def started(self, worker: Worker) -> None:
        worker.in_flight += 1
        self._refresh(worker)

    def finished(self, worker: Worker) -> None:
        worker.in_flight -= 1
        self._refresh(worker)

    def set_elsewhere(self, worker: Worker, requests: int) -> None:
        """Note how many decode legs it runs for other replicas."""
        if worker.elsewhere != requests:
            worker.elsewhere = requests
            self._refresh(worker)

    def set_healthy(self, worker: Worker, healthy: bool) -> None:
        worker.healthy = healthy
        if healthy and self.has(worker):
            self._join_group(worker)
        self._changed(worker)

    def set_draining(self, worker: Worker, draining: bool) -> None:
        worker.draining = draining
        self._changed(worker)

    def set_ejected(self, worker: Worker, ejected: bool, on_trial: bool = False) -> None:
        worker.ejected = ejected
        worker.on_trial = on_trial
        self._changed(worker)

    def set_role(self, worker: Worker, role: Role) -> None:
        """Let a worker that runs decode legs be of the other role that does."""
        worker.role = role
        group = self._group_of.get(worker)
        if group is not None:
            group.name_members()
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
        if worker.available:
            worker.gone_since_s = None
        elif worker.gone_since_s is None:
            worker.gone_since_s = time.monotonic()
        self._refresh(worker)
        self._tell(worker)

    def _refresh(self, worker: Worker) -> None:
        # Requests may outlive their worker's place in its group.
        group = self._group_of.get(worker)
        if group is not None:
            group.refresh(worker)
