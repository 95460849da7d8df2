"""Membership: the one place where workers join, drain and leave the fleet."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from eldr.errors import EldrError
from eldr.router.config.endpoint import Endpoint, Endpoints, Role, leg_of, rank_of
from eldr.router.config.groups import WorkerSettings
from eldr.router.fleet import sglang
from eldr.router.fleet.discovery.base import Source
from eldr.router.fleet.lists import ModelLists
from eldr.router.fleet.load_watch import LoadWatch, parse_load, parse_steps
from eldr.router.fleet.probe import HealthProbe
from eldr.router.fleet.workers import Fleet, Worker
from eldr.router.http.body_memory import BodyMemory
from eldr.router.http.client import ExchangeError
from eldr.router.http.pool import WorkerPool

log = logging.getLogger("eldr.router")

# A prefill worker has its own queue, so the router does not limit its requests.
PREFILL_MAX_INFLIGHT = 2**31
IDLE_POLL_S = 0.05
# How long requests that were cut off may take to end before their worker leaves anyway.
CUT_S = 5.0


class MembershipError(EldrError):
    """A worker cannot join, or is not in the fleet."""


@dataclass(slots=True, eq=False)
class _Member:
    """The state that belongs to one worker.

    load: watches the load of the engine.
    refusal: why it can never be used. Empty if it can.
    fit: whether it was found fit for service since it came up.
    watching: the tasks of probe and load.
    leaving: the task that waits for its last request.
    """

    worker: Worker
    probe: HealthProbe
    load: LoadWatch
    refusal: str = ""
    fit: bool = False
    watching: list[asyncio.Task[None]] = field(default_factory=list)
    leaving: asyncio.Task[None] | None = None


class Membership:
    """Lets workers join and leave the fleet, by hand or as sources say.

    A new worker gets no request until a probe has found it alive and fit for service. `pools` gains and loses the
    connections of each worker.

    lists: reads what the workers serve.
    went_down: called with a worker that stopped answering its probes.
    came_back: called with each worker that joins because a source names it anew, whoever let it go before.
    """

    def __init__(
        self,
        config: WorkerSettings,
        fleet: Fleet,
        pools: dict[Worker, WorkerPool],
        lists: ModelLists,
        went_down: Callable[[Worker], None],
        worker_key: bytes | None,
        ssl_context: ssl.SSLContext,
        memory: BodyMemory,
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._pools = pools
        self._lists = lists
        self._went_down = went_down
        self._worker_key = worker_key
        self._ssl_context = ssl_context
        self._memory = memory
        self._is_sglang = config.engine == "sglang"
        self._members: dict[Worker, _Member] = {}
        self._watching: list[asyncio.Task[None]] = []
        self.came_back: Callable[[Endpoint], None] = lambda endpoint: None

    # Driven by sources.

    async def follow(self, sources: list[Source]) -> None:
        """Add and probe the workers that the sources name now, then follow the sources' changes.

        The first workers join together and in configured order, no matter which answers its probe first, because
        policies number them. Changes wait until then.
        """
        following: list[tuple[str, AsyncIterator[Endpoints], Endpoints]] = []
        for source in sources:
            snapshots = aiter(source.watch())
            known = await anext(snapshots)
            for endpoint in sorted(known, key=self._config_order):
                if self._at(endpoint) is None:
                    self._add(endpoint, source.name)
            following.append((source.name, snapshots, known))
        with self._fleet.told_together():
            await asyncio.gather(*(member.probe.probe() for member in self._members.values()))
        for member in self._members.values():
            if member.refusal:
                raise MembershipError(f"{member.worker.role} worker {member.worker.url}: {member.refusal}")
            self._start_watching(member)
        self._watching = [asyncio.create_task(self._keep_up(*each)) for each in following]

    def _config_order(self, endpoint: Endpoint) -> tuple[bool, int, str]:
        """Sort workers given by URL in the order of the configuration, which determines zones and turns."""
        given = self._config.urls(endpoint.role)
        at = given.index(endpoint.url) if endpoint.url in given else len(given)
        return endpoint.role != "prefill", at, endpoint.url

    async def _keep_up(self, name: str, snapshots: AsyncIterator[Endpoints], known: Endpoints) -> None:
        async for found in snapshots:
            for endpoint in sorted(found - known, key=self._config_order):
                self._join_if_new(endpoint, name)
            for endpoint in known - found:
                worker = self._at(endpoint)
                # A worker that was added by hand since then is no longer this source's to remove.
                if worker is not None and worker.role == endpoint.role and worker.source == name:
                    self.drain(worker)
            known = found

    def _join_if_new(self, endpoint: Endpoint, source: str) -> None:
        worker = self._at(endpoint)
        if worker is None or worker.draining:
            self.join(endpoint, source)
            self.came_back(endpoint)
        elif worker.role != endpoint.role:
            self._change_role(worker, endpoint.role)

    # By hand.

    def worker(self, url: str, role: Role | None) -> Worker:
        """Return the worker with this URL. If no role is given, it must have only one. Raises MembershipError."""
        found = [w for w in self._members if w.url == url and role in (None, w.role)]
        if not found:
            raise MembershipError(f"no {role + ' ' if role else ''}worker {url} is in the fleet")
        if len(found) > 1:
            roles = " and ".join(worker.role for worker in found)
            raise MembershipError(f"{url} is {roles} worker; say which with role")
        return found[0]

    def workers(self) -> list[Worker]:
        return list(self._members)

    def join(self, endpoint: Endpoint, source: str) -> Worker:
        """Add a worker.

        A draining worker stays in the fleet. Raises MembershipError if it is there and not draining.
        """
        worker = self._at(endpoint)
        if worker is None:
            member = self._add(endpoint, source)
            self._start_watching(member)
            log.info("%s worker %s joins (%s)", endpoint.role, endpoint.url, source)
            return member.worker
        if not worker.draining:
            raise MembershipError(f"{worker.role} worker {endpoint.url} is already in the fleet")
        member = self._members[worker]
        if member.leaving is not None:
            member.leaving.cancel()
            member.leaving = None
        worker.source = source
        if worker.role != endpoint.role:
            self._change_role(worker, endpoint.role)
        self._pools[worker].reopen()  # it may just have been cut off
        self._fleet.set_draining(worker, False)
        return worker

    def drain(self, worker: Worker, timeout_s: float | None = None) -> None:
        """Stop sending requests to a worker. It leaves once its running requests have ended, or after `timeout_s`."""
        member = self._members[worker]
        if member.leaving is not None:
            member.leaving.cancel()
        log.info("%s worker %s is draining", worker.role, worker.url)
        self._fleet.set_draining(worker, True)
        timeout_s = self._config.drain_timeout_s if timeout_s is None else timeout_s
        member.leaving = asyncio.create_task(self._leave(member, timeout_s))

    async def _leave(self, member: _Member, timeout_s: float) -> None:
        worker = member.worker
        await self._until_idle(worker, timeout_s)
        if worker.in_flight:
            log.warning("%s worker %s leaves with %d requests cut off", worker.role, worker.url, worker.in_flight)
            self._pools[worker].cut("the worker was taken out of the fleet")
            await self._until_idle(worker, CUT_S)
        self._remove(member)

    async def _until_idle(self, worker: Worker, timeout_s: float) -> None:
        """Wait until nothing runs there, and until no blocks of a prefill worker may be pulled any more."""
        deadline_s = time.monotonic() + timeout_s
        while (worker.in_flight or time.monotonic() < worker.lease_until_s) and time.monotonic() < deadline_s:
            await asyncio.sleep(IDLE_POLL_S)

    def _remove(self, member: _Member) -> None:
        worker = member.worker
        del self._members[worker]
        for task in member.watching:
            task.cancel()
        self._pools.pop(worker).close()
        self._fleet.remove(worker)
        log.info("%s worker %s has left", worker.role, worker.url)

    def set_max_inflight(self, most: int) -> None:
        """Change the configured limit of the workers for decode legs, which bounds their learned limits."""
        for member in self._members.values():
            if member.worker.leg == "decode":
                member.load.capacity.most = most
                if member.worker.load is None:
                    self._fleet.set_limit(member.worker, most)

    # Internal.

    def _at(self, endpoint: Endpoint) -> Worker | None:
        """The worker that runs the same leg under this URL. It may be of the other role that does."""
        return self._fleet.workers(leg_of(endpoint.role)).get(endpoint.url)

    def _change_role(self, worker: Worker, role: Role) -> None:
        log.info("%s worker %s becomes %s", worker.role, worker.url, role)
        self._members[worker].fit = False  # so that its next probe finds out whether it fits the others
        self._fleet.set_role(worker, role)

    def _add(self, endpoint: Endpoint, source: str) -> _Member:
        config = self._config
        limit = PREFILL_MAX_INFLIGHT if endpoint.role == "prefill" else config.max_inflight
        worker = self._fleet.add(endpoint.url, endpoint.role, limit)
        worker.source = source
        pool = WorkerPool(
            endpoint.url,
            connect_timeout_s=config.connect_timeout_s,
            memory=self._memory,
            authorization=self._worker_key,
            ssl_context=self._ssl_context,
        )
        self._pools[worker] = pool
        probe = HealthProbe(
            self._fleet,
            worker,
            pool,
            self._lists,
            interval_s=config.health_interval_s,
            timeout_s=config.health_timeout_s,
            changed=lambda: self._changed(member),
            check=lambda: self._check(member),
        )
        parse, steps = (sglang.parse_load, sglang.parse_steps) if self._is_sglang else (parse_load, parse_steps)
        load = LoadWatch(self._fleet, worker, pool, config.load_interval_s, parse, steps)
        member = self._members[worker] = _Member(worker, probe, load)
        return member

    def _start_watching(self, member: _Member) -> None:
        member.watching = [asyncio.create_task(member.probe.run()), asyncio.create_task(member.load.run())]

    def _changed(self, member: _Member) -> None:
        """A probe has found the worker up or down."""
        member.fit &= member.worker.healthy
        if not member.worker.healthy:
            self._went_down(member.worker)

    async def _check(self, member: _Member) -> None:
        """Raise ExchangeError, which keeps the worker out of service, if its requests could not be served."""
        if not member.fit:  # a worker in service does not lose its place because of slow metrics
            engines = await member.load.look()
            if self._is_sglang:
                await sglang.meet(member.worker, self._pools[member.worker], self._config.health_timeout_s)
                member.refusal = sglang.why_never(member.worker.url)
            else:
                member.refusal = _wrong_rank(member.worker.url, len(engines))
            member.refusal = member.refusal or self._mixed(member.worker)
        if member.refusal:
            raise ExchangeError(member.refusal)
        if member.worker.models is None and not member.fit and len(self._fleet.groups) > 1:
            raise ExchangeError(
                "it lists its models only to clients with a key, so that it is unknown which of the fleet's models "
                "it serves; set worker_api_key_file"
            )
        member.fit = True

    def _mixed(self, worker: Worker) -> str:
        """Why a worker does not fit its model's others. Empty if it does.

        No policy could choose between the two ways: one places a request before its prompt is computed, the other after
        it, and a slot that is promised to a hand-off is none for a request that runs whole.
        """
        other = self._fleet.serving_otherwise(worker)
        if other is None:
            return ""
        return (
            f"{other.role} worker {other.url} serves the same model: a model has either aggregated workers, or prefill "
            "and decode workers; let those of the other kind drain first"
        )

    async def close(self) -> None:
        tasks = list(self._watching)
        for member in self._members.values():
            tasks += member.watching
            if member.leaving is not None:
                tasks.append(member.leaving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _wrong_rank(url: str, engines: int) -> str:
    """Why a URL does not name one engine. Empty if it does, or if the number of engines is unknown."""
    rank = rank_of(url)
    if rank is None and engines > 1:
        return f"it runs {engines} data-parallel engines behind one URL; write {url}#dp={engines} to address each one"
    if rank is not None and 0 < engines <= rank:
        return f"it has {engines} data-parallel engine{'s' if engines > 1 else ''}, and none of rank {rank}"
    return ""
